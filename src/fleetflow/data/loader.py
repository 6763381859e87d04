"""Pairs decoded by worker processes ahead of their use."""

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


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
