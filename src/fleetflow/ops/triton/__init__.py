"""The operators as Triton kernels, which CUDA tensors take where Triton can be used; same names as in `ops.kernels`.

They are the CUDA side of the registered operators (`ops.kernels`) and launch kernels only: no value is read back and
no tensor is sent, so CUDA graphs can record them. Sums are in float32 or wider, places in memory 64 bits
wide. All gradients are the same at every run: they are gathered, or, where that is not possible, added up as whole
numbers (`fixed_point`), of which the order does not matter.
"""

import functools
import warnings
from importlib.util import find_spec

import torch


@functools.cache
def usable() -> bool:
    """Returns True where Triton is installed and makes kernels that this GPU (compute capability 7 or more) runs."""
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (7, 0):
        return False
    try:
        from fleetflow.ops.triton.warp import warp

        with torch.inference_mode():
            warp(torch.zeros(1, 1, 1, 1, device="cuda"), torch.zeros(1, 2, 1, 1, device="cuda"))
    except Exception as error:  # no C compiler, no folder to write to, a Triton of another age
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        warnings.warn(f"Triton makes no kernels here ({reason}); flow operators run in plain torch", stacklevel=2)
        return False
    return True
