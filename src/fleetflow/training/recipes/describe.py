"""Recipes in words: two lines for each stage, for `fleetflow recipes`."""

import math
from collections.abc import Callable
from itertools import groupby

from fleetflow.data.generate.worlds import MIXTURE, World
from fleetflow.models.base import FlowModel
from fleetflow.training import schedules
from fleetflow.training.recipe import Source, Stage


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
        f"half start from {stage.initial_flow}" if stage.initial_flow else "",
        f"learns from {stage.teacher}" if stage.teacher else "",
        f"begins by {_called(stage.init)}" if stage.init else "",
        f"grows by {_called(stage.grow)}" if stage.grow else "",
        "norm frozen" if stage.freeze_norm else "",
        "needs weights" if stage.needs_weights else "",
        f"every {stage.generated_every}. batch generated" if stage.generated_every else "",
        f"each generated pair {stage.echo} times" if stage.echo > 1 else "",
        "best weights kept" if stage.keep_best else "",
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
