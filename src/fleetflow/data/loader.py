"""Pairs decoded by worker processes ahead of their use, and how fast that is."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from fleetflow.data.dataset import Files
from fleetflow.types import FleetflowError, Sample

AHEAD = 4  # samples that each worker keeps ready


def decoded(files: Files, *, workers: int = 2, order: Iterable[int] | None = None) -> Iterator[Sample]:
    """Yields samples of any sizes in `order` (None: all, as they are listed), read by `workers` processes.

    workers: 0 reads in this process. What a reader raises in a worker is raised here, as one line.
    """
    order = range(len(files)) if order is None else order
    queue = {"num_workers": workers, "prefetch_factor": AHEAD, "worker_init_fn": _one_thread} if workers else {}
    try:
        yield from DataLoader(files, batch_size=None, sampler=order, **queue)
    except FleetflowError as error:  # that of a worker ends with the line, behind a traceback
        raise FleetflowError(str(error).strip().rpartition("FleetflowError: ")[2]) from None


def loading_speed(files: Files, workers: int = 2, *, seconds: float = 5.0, seed: int = 0) -> float:
    """Returns samples per second that `workers` processes read in random order, measured over about `seconds`.

    The clock starts when what the workers prepare at first has been taken. Files that were read before may come from
    the memory of the system, here as in training.
    """
    generator = torch.Generator().manual_seed(seed)
    order = iter(lambda: int(torch.randint(len(files), (), generator=generator)), None)
    samples = decoded(files, workers=workers, order=order)
    for _ in range(workers * AHEAD + 1):
        next(samples)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(samples)
        count += 1
    return count / (time.perf_counter() - start)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
