"""Memory: what is kept between predictions, what a network needs, and what fits a limit.

glibc hands large blocks back to the system as they are freed and asks for new ones, page by page, at the next use: a
Light Flow that predicts 448x1024 touches 25 MB of new pages every time, which takes as long as its convolutions
(docs/performance.md). Keeping what is freed avoids it. Frames of ever new sizes would leave it in pieces, of which none
fits the next: then it is handed back after all.
"""

import ctypes
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetflow.types import FleetflowError

KEPT = 1 << 30  # bytes of freed memory that stay with the process at most
LARGEST = (1 << 29, 1 << 25)  # bytes of the largest block that is kept; older versions of glibc allow the second only
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of malloc.h


def keep_freed() -> bool:
    """Tells malloc to keep freed memory, up to 1 GiB, for the rest of this process; returns whether it does.

    It does nothing where there is no glibc, and where the environment sets malloc's behavior itself
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST) and bool(mallopt(TRIM_THRESHOLD, KEPT))


VARIED = 16  # sizes of frames, after which memory is handed back
MANY = 1 << 21  # pixels of all these sizes, after which it is, too
_sizes: dict[tuple[int, ...], None] = {}  # those in use, the last one at the end
_sizes_lock = threading.Lock()


def hand_back_if_varied(size: tuple[int, ...], *, limited: bool = False) -> None:
    """Hands freed memory back to the system after 16 different sizes of frames, of large ones sooner.

    A few sizes in turn keep it, and so do any two. Without it a raft_small grew from 350 to 890 MB over 500 pictures of
    128 to 360 pixels; all but 30 MB was free. With sizes counted alone it took 3.5 GB for twelve of 360x1024 to 448x1024.

    Args:
        size: of the frames [N, 3, H, W] that come next.
        limited: whether memory is limited: then it is handed back at every change of the size.
    """
    with _sizes_lock:
        known, last = size in _sizes, next(reversed(_sizes), size)
        _sizes.pop(size, None)
        _sizes[size] = None
        few = len(_sizes) <= VARIED and sum(map(math.prod, _sizes)) <= 3 * MANY
        if size == last or ((known or few) and not limited):
            return
        _sizes.clear()
        _sizes.update({last: None, size: None})
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, and the most that there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


PROBE = 256  # pixels of either side of the frames that a network is probed with
RESERVE = 1.3  # what oneDNN takes beside the tensors, and what lies between them
FRAME = 48  # bytes per pixel of the whole frames: both as they were read and as floats, the flow, its sum over tiles
STORED = (
    0.25  # of the memory beside the weights may be stored correlations; where they are larger, they are computed anew
)
PAIR = 24  # bytes per pixel of two RGB frames of float32
LARGE = 1 << 24  # pixels, from which on it is asked what memory there is
FIXED = 96 << 20  # bytes: code and buffers of the kernels that do not grow with the frames


def bytes_per_pixel(run: Callable, device: torch.device) -> float:
    """Returns what a network needs for each pixel of its frames, measured on two small ones of noise.

    Args:
        run: called with two frames [1, 3, H, W] in [0, 1].
        device: of the frames.
    """
    frames = torch.rand(2, 1, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(device)
    run(*frames)  # weights are packed at the first call
    with _Peak() as peak:
        run(*frames)
    return RESERVE * peak.most / PROBE**2


def resident(device: torch.device) -> int:
    """Returns the bytes that this process has now: of the device's memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available() -> int | None:
    """Returns the bytes of main memory that this process may still take, or None where nobody knows."""
    found = []
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as file:
        found.append(int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm") as file:
                found.append(limit - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(min(found), 0) if found else None


def fits_nothing(height: int, width: int, pairs: int = 1) -> bool:
    """Whether main memory cannot hold even the frames of so many pairs, as floats.

    Systems that promise more memory than they have end the process when it is used, without an error.
    """
    pixels = pairs * height * width
    free = available() if pixels > LARGE else None
    return free is not None and pixels * PAIR > free


def limit_model(model: torch.nn.Module, memory: int, device: torch.device) -> None:
    """Lets the networks of `model` store only as many correlations as suit a process of `memory` bytes."""
    free = max(memory - resident(device) - FIXED, 0)
    for part in model.modules():
        limit = getattr(part, "memory_limit", None)
        if isinstance(limit, int):
            part.memory_limit = min(limit, int(STORED * free))  # pyright: ignore[reportArgumentType]


class Budget(NamedTuple):
    """What a process of `memory` bytes has left for predictions."""

    memory: int
    free: int  # bytes beside what the process had before the first one
    per_pixel: float  # bytes that the network needs for each pixel it sees

    def pixels(self, whole: int, smallest: int) -> int:
        """Returns how many pixels the network may see at once of frames of `whole` pixels.

        Raises:
            FleetflowError: those are fewer than `smallest`.
        """
        pixels = int((self.free - FRAME * whole) * (1 - STORED) / self.per_pixel)
        smallest = min(smallest, whole)
        if pixels < smallest:
            least = self.memory - self.free + FRAME * whole + smallest * self.per_pixel / (1 - STORED)
            raise FleetflowError(
                f"a memory of {in_words(self.memory)} is too small for this network and its frames, which need "
                f"{in_words(least)}; give more, or take a smaller --size or network, such as fastflownet"
            )
        return pixels


def in_words(size: float) -> str:
    """Returns a number of bytes as it is given to --memory, rounded up: 10B, 700M, 3.5G."""
    if size < 2**20:
        return f"{math.ceil(size)}B"
    if size < 2**30:
        return f"{-(-size // 2**20):.0f}M"
    return f"{-(-size * 10 // 2**30) / 10:g}G"


def parse_bytes(text: str) -> int:
    """Returns the bytes that "4G", "500M" or "4.5GB" mean; raises FleetflowError for anything else."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(number[-1:], 1)
    try:
        size = float(number.rstrip("KMGT")) * unit
        if not 0 < size < 2**60:
            raise ValueError
    except ValueError:
        raise FleetflowError(f'memory is "{text}"; expected a size such as 4G or 500M') from None
    return int(size)
