"""Pairs decoded by worker processes ahead of their use."""

from collections.abc import Iterable, Iterator

from fleetflow.data.dataset import Files
from fleetflow.data.workers import Ahead
from fleetflow.types import Sample


def decoded(files: Files, *, workers: int = 2, order: Iterable[int] | None = None) -> Iterator[Sample]:
    """Yields samples of any sizes in `order` (None: all, as they are listed), read by `workers` processes.

    Args:
        workers: 0 reads in this process. What a reader raises in a worker is raised here, as one line.
    """
    yield from Ahead(files, range(len(files)) if order is None else order, workers=workers)
