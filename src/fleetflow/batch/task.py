"""What a run and its workers say to each other: settings, tasks, reports; no torch is needed for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fleetflow.batch.manifest import Item
from fleetflow.batch.records import Store
from fleetflow.types import FleetflowError

if TYPE_CHECKING:  # the command line reads this file before it needs torch
    from fleetflow.inference.device import Precision

MOTION = "motion.json"  # what `motion` writes for each clip


@dataclass(frozen=True)
class Settings:
    """What the results of a batch depend on; those that `fleetflow predict` has, too, mean the same here.

    Attributes:
        do: "predict", "motion", "track" or "evaluate".
        format: of predict.
        split: pairs in a range of a long clip, each done by itself and then joined; 0: clips are not split.
        grid: of track: pixels between the points in the first frame.
        dataset: of evaluate: how the pairs lie in each folder.
    """

    do: str = "predict"
    model: str = "fastflownet"
    format: tuple[str, ...] = ("flo", "color")
    size: tuple[int, int] | None = None
    scale: float | None = None
    iterations: int | None = None
    warm_start: bool = False
    device: str = "auto"
    precision: "Precision" = "auto"
    memory: str | None = None
    split: int = 1000
    grid: int = 32
    dataset: str = "pairs"

    def __post_init__(self):
        if self.split < 0:
            raise FleetflowError(f"--split is {self.split}; expected pairs of a range, or 0 for whole clips")
        if self.grid < 1:
            raise FleetflowError(f"--grid is {self.grid}; expected 1 pixel or more between points")


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told.

    Attributes:
        settings: what to do.
        store: where to.
        run: the name of the run, of `Store.claimed`.
        threads: of each worker on the CPU.
        tries: how often a worker may begin with a task before the item counts as failed.
        label: what its network must be, when another worker has said it: machines of a cluster may differ.
    """

    settings: Settings
    store: Store
    run: str
    threads: int = 1
    tries: int = 5
    label: dict | None = None

    def __post_init__(self):
        for name in ("threads", "tries"):
            if getattr(self, name) < 1:
                raise FleetflowError(f"--{name} is {getattr(self, name)}; expected a number from 1 on")


class Task(NamedTuple):
    """An item, or a range of the pairs of a long one."""

    item: Item
    part: int | None = None
    parts: int = 1


class Report(NamedTuple):
    """What came of a task.

    `outcome` is "done", "skipped" (it had results), "failed", "part" (ranges of the clip are missing), "split" (a long
    clip, see `tasks`), or "stop" (the run cannot go on).
    """

    id: str
    outcome: str
    reason: str | None = None
    frames: int = 0
    seconds: float = 0.0
    worker: str = ""
    tasks: tuple[Task, ...] = ()
    input: str = ""


class Ready(NamedTuple):
    """A worker has loaded its network. gpus: of its machine, 0 if it does not use one."""

    label: dict
    gpus: int
