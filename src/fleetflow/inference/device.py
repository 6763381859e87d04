"""Device and precision of a prediction."""

from contextlib import nullcontext
from typing import Literal

import torch

from fleetflow.types import FleetflowError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; "auto" takes a GPU where there is one. Raises FleetflowError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise FleetflowError(f'device "{name}" cannot be used ({reason}); use "auto" or "cpu"') from None
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the convolutions; "auto" takes bfloat16 where the processor or GPU has units for it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device.type == "cpu" and (
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
        precision = "bf16" if fast else "fp32"
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in known:
        raise FleetflowError(f'precision is "{precision}"; expected auto, fp32, bf16 or fp16')
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise FleetflowError("this processor has no float16 convolutions; use --precision auto, bf16 or fp32")
    return known[precision]


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which convolutions run in `dtype`; for float32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
