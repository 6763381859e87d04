"""Device and precision of a prediction."""

import importlib
import platform
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from fleetflow.types import FleetflowError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MOST_THREADS = 1024  # where OpenMP cannot make so many, it ends the process
PLUGINS = {"npu": "torch_npu", "hpu": "habana_frameworks.torch.core"}  # kind of device -> what brings it to torch
NEEDS = {
    "cuda": "an NVIDIA or AMD GPU, its driver, and a torch built for it",
    "hpu": "an Intel Gaudi and the package habana_frameworks",
    "mps": "a Mac with Apple silicon",
    "npu": "an Ascend NPU and the package torch_npu",
    "xpu": "an Intel GPU, its driver, and a torch built for it",
}


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`, one of any kind that torch has here; "auto" takes an accelerator if there is one.

    Raises:
        FleetflowError: torch cannot use the device; the message says what is missing.
    """
    name = str(name)  # a torch.device, too
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    kind = name.partition(":")[0]
    if kind in PLUGINS:  # most announce themselves to torch; older ones must be imported
        with suppress(ImportError):
            importlib.import_module(PLUGINS[kind])
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        reason = f"it needs {NEEDS[kind]}" if kind in NEEDS and not _has(kind) else reason
        raise FleetflowError(f'device "{name}" cannot be used ({reason}); use "auto" or "cpu"') from None
    return device


def _has(kind: str) -> bool:
    """Whether torch has devices of this kind here, so that it is something else that is wrong."""
    module = getattr(torch, kind, None)
    try:
        return module is not None and bool(module.is_available())
    except (AttributeError, RuntimeError, AssertionError):
        return False


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the convolutions; "auto" takes bfloat16 where the processor or GPU is faster in it."""
    if isinstance(precision, str) and precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device.type == "cpu" and _fast_bf16()
        precision = "bf16" if fast else "fp32"
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if not isinstance(precision, str) or precision not in known:
        raise FleetflowError(f'precision is "{precision}"; expected auto, fp32, bf16 or fp16')
    if precision != "fp32" and not torch.amp.is_autocast_available(device.type):
        raise FleetflowError(f"torch computes in float32 alone on {device.type}; use --precision auto or fp32")
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise FleetflowError("this processor has no float16 convolutions; use --precision auto, bf16 or fp32")
    return known[precision]


def _fast_bf16() -> bool:
    """Whether the processor convolves faster in bfloat16 than in float32.

    With matrix units (AMX) it does. With AVX-512 alone AMD's cores multiply at twice the rate, Intel's at the same, and
    there the conversions make FastFlowNet 1.5, LiteFlowNet2 1.7 times as slow (docs/performance.md).
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "GenuineIntel" not in _processor()


@cache
def _processor() -> str:
    """What the system says of its first processor."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return platform.processor()


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which convolutions run in `dtype`; for float32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def use_threads(count: int) -> None:
    """Lets torch use so many threads on the CPU; 0 leaves it all of them. Raises FleetflowError below 0 and over 1024."""
    if not 0 <= count <= MOST_THREADS:
        raise FleetflowError(f"--threads is {count}; expected a number from 1 to {MOST_THREADS}, or 0 for all")
    if count:
        torch.set_num_threads(count)
