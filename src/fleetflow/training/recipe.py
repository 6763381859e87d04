"""What a training run depends on besides the code: a recipe of stages. The rows are in `recipes`."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from fleetflow.data.dataset import Files
from fleetflow.data.generate.worlds import MIXTURE, World
from fleetflow.models.base import FlowModel
from fleetflow.registry import unknown
from fleetflow.training import schedules
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

    sources: data sets, mixed by their repeats; none means generated pairs, of the worlds in `mixture`.
    schedule: (step, steps) -> factor on the learning rate.
    ema: decay of the averaged weights, which are then the ones saved; 0 saves the weights themselves.
    clip: largest norm of the gradient.
    freeze_norm: batch normalization keeps its statistics (RAFT after its first stage).
    iterations: refinement steps in training, for networks that refine; None takes the network's own.
    network: of this stage, where it differs from the recipe's.
    build: makes the network, where training needs arguments of it.
    opening: a network with weights of ours, whose flow every other pair begins with.
    begin: what is done to fresh weights, where nothing comes before.
    grow: grow(model, earlier, ...) moves weights of networks that are smaller than this one; None copies like to like.
    tunes: the stage needs trained weights to start from.
    validation, validate_every: pairs measured every so many steps and at the end; 0 never measures.
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
    opening: str | None = None
    begin: Callable[[FlowModel], None] | None = None
    grow: Callable[..., None] | None = None
    tunes: bool = False
    validation: tuple[Source, ...] = ()
    validate_every: int = 5_000

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


def described(stage: Stage) -> str:
    """Returns two lines on all that the training of a stage depends on; what is as in every other stage is left out.

    First name, steps, batches, rate and schedule, optimizer and decay, clip, EMA, what is special about the network.
    Then loss and pairs: data sets, what their readers are told, repeats, (augmentation).
    """
    parts = [f"{part.batch} x {part.height}x{part.width}" for part in stage.batches]
    if len(parts) > 1:
        parts = [f"{part.steps:,} of {size}" for part, size in zip(stage.batches, parts)]
    clip = "no clip" if stage.clip == math.inf else f"clip {stage.clip:g}"
    words = [
        f"{stage.name:<10} {stage.steps:>9,} steps",
        f"{', '.join(parts):<13}",
        f"rate {stage.learning_rate:g} {_schedule(stage.schedule)}",
        f"{_called(stage.optimizer).replace('optimizers', 'muon')}, decay {stage.weight_decay:g}",
        clip if stage.clip != Stage.clip else "",
        f"EMA {stage.ema:g}" if stage.ema else "",
        f"network {stage.network}" if stage.network else "",
        _built(stage.build) if stage.build else "",
        f"{stage.iterations} iterations" if stage.iterations else "",
        f"half begin with {stage.opening}" if stage.opening else "",
        f"begins by {_called(stage.begin)}" if stage.begin else "",
        f"grows by {_called(stage.grow)}" if stage.grow else "",
        "norm frozen" if stage.freeze_norm else "",
        "needs weights" if stage.tunes else "",
    ]
    pairs = _sets(stage.sources) if stage.sources else _generated(stage.mixture)
    return f"{'  '.join(word for word in words if word)}\n{'':15}{_called(stage.loss)}  {pairs}"


def _called(function: Callable, name: str = "") -> str:
    """Returns the name of a function and what a partial binds: "raft scale -0.1 1, mirror"."""
    bound = [_value(value) for value in getattr(function, "args", ())]
    bound += [_bound(key, value) for key, value in getattr(function, "keywords", {}).items()]
    return f"{name or getattr(function, 'func', function).__name__} {', '.join(bound)}".strip()


def _schedule(schedule: Callable) -> str:
    """Returns the name that `schedules` has for it, such as s_long, and what it binds, but not the rows of a table."""
    name = next((name for name, value in vars(schedules).items() if value is schedule), "")
    return name if name and getattr(schedule, "func", None) is schedules.table else _called(schedule, name)


def _bound(key: str, value: object) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return f"{key} {_value(value)}"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_value, value))
    if isinstance(value, int):
        return f"{value // 1000}k" if value and value % 1000 == 0 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    return _called(value) if callable(value) else str(value)


def _sets(sources: tuple[Source, ...]) -> str:
    """Returns, for example, Sintel clean + final x10 (irr); KITTI2012, KITTI2015 (irr_kitti)."""
    found = []
    for augment, alike in groupby(sources, key=lambda source: _called(source.augment) if source.augment else ""):
        sets = []
        for (folder, repeat), group in groupby(alike, key=lambda source: (source.folder, source.repeat)):
            told = (" ".join(map(_value, getattr(source.files, "keywords", {}).values())) for source in group)
            words = (folder, " + ".join(told), f"x{repeat}" if repeat > 1 else "")
            sets.append(" ".join(word for word in words if word))
        found.append(", ".join(sets) + (f" ({augment})" if augment else ""))
    return "; ".join(found)


def _generated(mixture: dict[World, float]) -> str:
    if mixture == MIXTURE:
        return "generated pairs"
    return "generated pairs: " + ", ".join(f"{world.__name__[:-6]} {share:g}" for world, share in mixture.items())


def _built(build: Callable[[], FlowModel]) -> str:
    """Returns what makes a network; of an equilibrium: solver, evaluations, terms of the loss, differentiated steps."""
    found = getattr(build, "keywords", {}).get("equilibrium")
    if found is None:
        return _called(build)
    terms, steps = len(found.keep) + 1, getattr(found.gradient, "steps", 0)
    words = [
        f"{build.func.__name__}: {type(found.solver).__name__}",
        f"{found.iterations} evaluations",
        f"{terms} loss term{'s' * (terms > 1)}",
        f"{steps} phantom step{'s' * (steps > 1)}" if steps else type(found.gradient).__name__,
        *(["through the flow"] if found.through_flow else []),
    ]
    return ", ".join(words)


_KINDS = {int: "a whole number", float: "a number"}
_RANGES = {  # of settings, both ends allowed; all others go from 1 on
    "learning_rate": (1e-12, 1e3),
    "weight_decay": (0.0, 1.0),
    "clip": (1e-12, math.inf),
    "ema": (0.0, 1 - 1e-9),
    "validate_every": (0, math.inf),
}


def changed(plan: Recipe, settings: dict[str, str]) -> Recipe:
    """Returns the recipe with settings of all its stages replaced: steps, batch, height, width, learning_rate, ...

    steps is the number of steps of the whole recipe, which its parts share as before, at least one each.
    Raises FleetflowError for a name that no stage has and for a value of another type or out of range.
    """
    stages = plan.stages
    inside = {field.name: field.type for field in dataclasses.fields(Batches)}
    kinds = {field.name: field.type for field in dataclasses.fields(Stage)} | inside
    kinds = {name: kind for name, kind in kinds.items() if kind in (int, float, bool, int | None)}
    for name, text in settings.items():
        inner = name in inside
        if name not in kinds:
            raise unknown("setting", name, list(kinds))
        old = plan.steps if name == "steps" else getattr(stages[0].batches[0] if inner else stages[0], name)
        kind = int if kinds[name] == int | None else kinds[name]
        low, high = _RANGES.get(name, (1, math.inf))
        if name == "steps":
            low = sum(len(stage.batches) for stage in stages)
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            if kind is not bool and not (low <= value <= high):
                raise ValueError
        except (ValueError, KeyError):
            limits = f"from {low:g} " + ("on" if high == math.inf else f"to {high:g}")
            expected = "true or false" if kind is bool else f"{_KINDS[kind]} {limits}"
            example = low if old is None else old
            raise FleetflowError(f'{name} is "{text}"; expected {expected}, such as {example}') from None
        if not inner:
            stages = tuple(dataclasses.replace(stage, **{name: value}) for stage in stages)
            continue
        share = value / plan.steps if name == "steps" else None
        stages = tuple(
            dataclasses.replace(
                stage,
                batches=tuple(
                    dataclasses.replace(part, **{name: value if share is None else max(1, round(part.steps * share))})
                    for part in stage.batches
                ),
            )
            for stage in stages
        )
    return dataclasses.replace(plan, stages=stages)
