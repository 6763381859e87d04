"""Items of a data set, made by worker processes ahead of their use.

Tensors come through shared memory where there is room, else through the pipe of the worker: a container with little
/dev/shm works. A worker that dies ends the run with one line.
"""

import signal
import weakref
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fleetflow.io.atomic import reason
from fleetflow.types import FleetflowError

AHEAD = 4  # items that each worker keeps ready
# When a worker dies torch raises a RuntimeError, wherever this process is; a worker that hands over an item is missed first.
LOST = (RuntimeError, ConnectionError, EOFError)


class Ahead:
    """An iterator over `dataset[key]` for each key, and a context in which the death of a worker is one line.

    Args:
        dataset: its items are tuples, or named tuples, of tensors and None.
        keys: in the order in which the items are wanted.
        workers: processes; 0 makes the items in this process, when they are asked for.
    """

    def __init__(self, dataset: Dataset, keys: Iterable, *, workers: int):
        queue = {"num_workers": workers, "prefetch_factor": AHEAD, "worker_init_fn": _begin} if workers else {}
        loader = DataLoader(_Handed(dataset), batch_size=None, sampler=keys, collate_fn=_same, **queue)
        try:
            self._items: Any = iter(loader)
        except OSError as error:  # no semaphores, no processes left
            raise FleetflowError(f"worker processes cannot start ({reason(error)}); use --workers 0") from None
        if workers:  # or Python, at its end, would wait for workers that do not hear its SIGTERM
            weakref.finalize(self, self._items._shutdown_workers)

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        with self:
            item = next(self._items)
        if isinstance(item, FleetflowError):
            raise item
        return _changed(item, lambda value: value if isinstance(value, Tensor) else torch.from_numpy(value))

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not isinstance(error, LOST):
            return
        patience = 0 if isinstance(error, RuntimeError) else 1
        try:
            died = self._died(patience)
        except RuntimeError:  # torch speaks up at the signal that a worker has ended, once, and it can be here
            died = self._died(patience)
        if died:
            how = f"signal {signal.Signals(-died[0]).name}" if died[0] < 0 else f"exit status {died[0]}"
            raise FleetflowError(
                f"a worker process that makes pairs died ({how}), perhaps for want of memory; "
                "use fewer --workers, or 0, which makes them in the process itself"
            ) from None

    def _died(self, patience: float) -> list[int]:
        """The exit statuses of workers that have failed, or do so within `patience` seconds: their pipes close first."""
        workers = {worker.sentinel: worker for worker in getattr(self._items, "_workers", ())}
        for sentinel in wait(list(workers), patience) if workers else ():
            workers[sentinel].join(1)
        return [worker.exitcode for worker in workers.values() if worker.exitcode]


class _Handed(Dataset):
    """The items of another data set as a worker hands them over; a FleetflowError is handed over, too."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        if get_worker_info() is None:
            return self.dataset[key]
        try:
            item = self.dataset[key]
        except FleetflowError as error:
            return FleetflowError(str(error))
        try:
            return _changed(item, Tensor.share_memory_)
        except RuntimeError:  # /dev/shm is full
            return _changed(item, Tensor.numpy)


def _changed(item: tuple, change) -> tuple:
    make = getattr(type(item), "_make", tuple)  # a named tuple stays one
    return make(None if value is None else change(value) for value in item)


def _same(item):
    return item


def _begin(worker: int) -> None:
    """One thread each; and signals to the whole group are for the training process, which finishes its step first."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with suppress(AttributeError, ValueError):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
