"""How fast the pairs of a data set are read on this machine."""

import os
import time
from typing import NamedTuple

import torch

from fleetflow.data.dataset import Files
from fleetflow.data.loader import decoded
from fleetflow.data.workers import AHEAD


class ReadingSpeed(NamedTuple):
    """Samples per second that so many worker processes read; 0 workers read in the process that asks."""

    workers: int
    samples_per_second: float


def reading_speeds(files: Files, seconds: float) -> list[ReadingSpeed]:
    """Returns the speeds without workers and with 1, 2, 4, ... up to the cores, measured over `seconds` together."""
    counts = [0, *(2**k for k in range((os.cpu_count() or 1).bit_length()))]
    return [ReadingSpeed(count, loading_speed(files, count, seconds=seconds / len(counts))) for count in counts]


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
