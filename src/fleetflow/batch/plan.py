"""Which tasks an item is made of; no torch is needed for it, so that Ray plans with little memory."""

import os
from contextlib import suppress

from fleetflow.batch.manifest import Item
from fleetflow.batch.task import Job, Task
from fleetflow.io.video import VideoReader
from fleetflow.types import FleetflowError

SMALLEST = 4  # bytes of a frame in a file, with what the file says of it


def plan(job: Job, item: Item) -> list[Task]:
    """Returns the tasks that an item is made of: one, or the ranges of a long clip."""
    split = job.settings.split
    if job.settings.do != "predict" or not split or job.store.record(item.id):
        return [Task(item)]
    frames = item.frames or _frames(item.input)
    parts = -(-(frames - 1) // split) if frames else 1
    return [Task(item, part, parts) for part in range(parts)] if parts > 1 else [Task(item)]


def _frames(url: str) -> int | None:
    """How many pictures a local video has, as its header says; None of anything else."""
    if "://" in url or not os.path.isfile(url):
        return None
    with suppress(FleetflowError):  # the work itself says what is wrong
        frames = VideoReader(url).frames
        return frames and min(frames, os.path.getsize(url) // SMALLEST)  # a damaged header may promise billions
    return None
