"""What a training run depends on besides the code: a recipe of stages. The rows are in `recipes`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fleetflow.data.dataset import Files
from fleetflow.data.generate.worlds import MIXTURE, World
from fleetflow.models.base import FlowModel
from fleetflow.registry import unknown
from fleetflow.training.losses import multi_scale
from fleetflow.training.optimizers import optimizers
from fleetflow.types import FleetflowError, Prediction, Sample

# A batch of samples of one size -> a batch of samples of the size (height, width), all chance from the generator.
Augment = Callable[[Sample, torch.Generator, tuple[int, int]], Sample]


@dataclass(frozen=True)
class Source:
    """Pairs of a data set: `files(ROOT / folder)`, each `repeat` times an epoch, changed by `augment`."""

    files: Callable[..., Files]
    folder: str
    repeat: int = 1
    augment: Augment | None = None


@dataclass(frozen=True)
class Batches:
    """So many steps with batches of `batch` pairs of height x width pixels."""

    steps: int
    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer, from a fresh state. A later stage starts from the weights of the one before.

    Args:
        sources: data sets, mixed by their repeats; none means generated pairs, of the worlds in `mixture`.
        schedule: (step, steps) -> factor on the learning rate.
        ema: decay of the averaged weights, which are then the ones saved; 0 saves the weights themselves.
        clip: largest norm of the gradient.
        freeze_norm: batch normalization keeps its statistics (RAFT after its first stage).
        iterations: of refinement in training, for networks that refine; None takes the network's own.
        network: of this stage, where it differs from the recipe's.
        build: makes the network, where training needs arguments of it.
        initial_flow: a network with weights of ours, whose flow every other pair starts from (those between start from
            0).
        teacher: a network with weights of ours, whose flow the stage learns where it is not wrong (`distill.taught`).
        init: what is done to fresh weights, where nothing comes before.
        grow: grow(model, earlier, ...) moves weights of networks that are smaller than this one; None copies like to
            like.
        needs_weights: the stage starts from trained weights only.
        validation, validate_every: pairs measured every so many steps and at the end; 0 never measures.
        generated_every: every so many batches one is of generated pairs, though there are sources; 0: none is.
        echo: so many times a generated pair is learned from, each time as another mirror image (`echo.Echo`).
        keep_best: the weights that are saved are those with the lowest validation EPE, which may be those of the start.
    """

    name: str
    batches: tuple[Batches, ...]
    learning_rate: float
    schedule: Callable[[int, int], float]
    loss: Callable[[Prediction, Sample], Tensor] = multi_scale
    optimizer: Callable[[nn.Module, float, float], list[torch.optim.Optimizer]] = optimizers
    weight_decay: float = 0.0
    clip: float = 20.0
    ema: float = 0.999
    sources: tuple[Source, ...] = ()
    mixture: dict[World, float] = field(default_factory=MIXTURE.copy)
    freeze_norm: bool = False
    iterations: int | None = None
    network: str | None = None
    build: Callable[[], FlowModel] | None = None
    initial_flow: str | None = None
    teacher: str | None = None
    init: Callable[[Any], None] | None = None
    grow: Callable[..., None] | None = None
    needs_weights: bool = False
    validation: tuple[Source, ...] = ()
    validate_every: int = 5_000
    generated_every: int = 0
    echo: int = 1
    keep_best: bool = False

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.batches)

    def at(self, step: int) -> Batches:
        """Returns the batch size and the frame size of `step` (from 0)."""
        for part in self.batches:
            if step < part.steps:
                return part
            step -= part.steps
        return self.batches[-1]

    def samples(self, step: int) -> int:
        """Returns the number of pairs seen before `step`."""
        total = 0
        for part in self.batches:
            total += min(max(step, 0), part.steps) * part.batch
            step -= part.steps
        return total


@dataclass(frozen=True)
class Recipe:
    """A network and the stages that train it; `source` says whose schedule it is."""

    network: str
    stages: tuple[Stage, ...]
    source: str

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        return sum(stage.samples(stage.steps) for stage in self.stages)


_KINDS = {int: "a whole number", float: "a number"}
_RANGES = {  # of settings, both ends allowed; all others go from 1 on
    "learning_rate": (1e-12, 1e3),
    "weight_decay": (0.0, 1.0),
    "clip": (1e-12, math.inf),
    "ema": (0.0, 1 - 1e-9),
    "validate_every": (0, math.inf),
    "generated_every": (0, math.inf),
}


def changed(plan: Recipe, settings: dict[str, str]) -> Recipe:
    """Returns the recipe with settings of all its stages replaced: steps, batch, height, width, learning_rate, ...

    steps is the number of steps of the whole recipe, which its parts share as before, at least one each.

    Raises:
        FleetflowError: no stage has a setting of this name, or the value is of another type or out of range.
    """
    for name, text in settings.items():
        value, of = _value(plan, name, text), plan.steps
        plan = dataclasses.replace(plan, stages=tuple(_replaced(stage, name, value, of) for stage in plan.stages))
    return plan


def _replaced(stage: Stage, name: str, value: int | float | bool, of: int) -> Stage:
    """A stage with one setting replaced; `of` is the number of steps of its recipe so far."""
    if name not in _fields(Batches):
        return dataclasses.replace(stage, **{name: value})
    batches = []
    for part in stage.batches:
        new = max(1, round(part.steps * (value / of))) if name == "steps" else value
        batches.append(dataclasses.replace(part, **{name: new}))
    return dataclasses.replace(stage, batches=tuple(batches))


def _value(plan: Recipe, name: str, text: str) -> int | float | bool:
    """The value of a setting; raises FleetflowError where `text` is none."""
    kinds = _fields(Stage) | _fields(Batches)
    if name not in kinds:
        raise unknown("setting", name, list(kinds))
    first = plan.stages[0]
    old = plan.steps if name == "steps" else getattr(first.batches[0] if name in _fields(Batches) else first, name)
    kind = int if kinds[name] == int | None else kinds[name]
    low, high = _RANGES.get(name, (1, math.inf))
    if name == "steps":
        low = sum(len(stage.batches) for stage in plan.stages)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is bool or low <= value <= high:
            return value
    except (ValueError, KeyError):
        pass
    limits = f"from {low:g} " + ("on" if high == math.inf else f"to {high:g}")
    expected = "true or false" if kind is bool else f"{_KINDS[kind]} {limits}"
    raise FleetflowError(f'{name} is "{text}"; expected {expected}, such as {low if old is None else old}')


def _fields(kind: type) -> dict[str, type]:
    """The fields of a dataclass that a setting can replace, with their types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    return {name: kind for name, kind in fields.items() if kind in (int, float, bool, int | None)}
