"""Compiles every Triton kernel for a GPU that need not be there: python triton_compile.py CAPABILITY (such as 90).

`test_triton.py` runs this file in a process of its own. Prints one line a kernel.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fleetflow.ops.triton import all_pairs, cells, correlation, warp


class Absent:
    """What Triton asks a GPU while it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(kernel, *arguments, grid, warmup, **options):
    binary = launch(kernel, *arguments, grid=grid, warmup=True, **options)
    print(kernel.__module__, kernel.__name__, len(binary.asm["cubin"]), "bytes, shared", binary.metadata.shared)


launch, JITFunction.run = JITFunction.run, compiled
driver.set_active(Absent())


def last(*shape, dtype):
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()


features, flow = last(1, 32, 16, 24, dtype=torch.float16), torch.zeros(1, 2, 16, 24).requires_grad_()
warp.warp_gradients(warp.warp(features, flow), features, flow)
volume = correlation.local_correlation(features, features, 4, (0, 40, 44, 80))
correlation.local_correlation_gradients(volume, features, features, 4, (0, 40, 44, 80))
features = last(1, 32, 16, 24, dtype=torch.float32)
positions, volume = torch.zeros(1, 2, 16, 24).requires_grad_(), torch.zeros(1, 384, 8, 12).requires_grad_()
all_pairs._read(volume, positions, 4, 1, False).sum().backward()
all_pairs._read(cells.cells(features, features, positions, 4, 0), positions, 4, 0, True).sum().backward()
