"""What a run starts from: what is asked, what there is of it already, its data, and the network of each stage."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fleetflow.data.dataset import Files
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.registry import models
from fleetflow.training import checkpoint as disk
from fleetflow.training.checkpoint import Checkpoint, Run
from fleetflow.training.dataloader import open_sources
from fleetflow.training.recipe import Recipe, Source, Stage
from fleetflow.training.recipes.finetune import FINETUNE, crop_for, network_of
from fleetflow.types import FleetflowError


@dataclass(frozen=True)
class Options:
    """How a run is carried out. Nothing here changes a number that it reaches."""

    folder: Path
    report: Callable[[str], object]
    resume: bool
    minutes: float | None
    steps: int | None
    workers: int | None
    compile: bool
    save_memory: bool
    checkpoint_every: int


def expect(*numbers: tuple[str, float | None, float]) -> None:
    """Returns if all numbers (option, value, least) that are given are in range; raises FleetflowError otherwise."""
    for option, value, least in numbers:
        if value is not None and not least <= value < 2**32:
            raise FleetflowError(f"--{option} is {value}; expected a number from {least} to 2^32")


def expect_folder(options: Options) -> None:
    """Raises FleetflowError where a run would be replaced, or there is none to resume."""
    checkpoint = options.folder / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        raise FleetflowError(
            f"{options.folder} holds a run already; add --resume to continue it, or choose another --folder"
        )
    if options.resume and not checkpoint.exists() and disk.asked_before(options.folder) is None:
        raise FleetflowError(f"{checkpoint} is not there; nothing to resume")


def known_fields(options: Options, state: Checkpoint | None, like: Path | None) -> dict[str, object]:
    """Returns the fields of `Run` that are decided: by the run that is resumed, or one that this one is to be like."""
    if like:
        return {key: value for key, value in Checkpoint.load(like).run.items() if key != "seed"}
    if state:
        return state.run
    return (disk.asked_before(options.folder) if options.resume else None) or {}


def decided(asked: Run, known: dict[str, Any], folder: Path, world: int) -> Run:
    """Returns what a run goes on with; only its precision may be left open.

    Args:
        asked: what is asked for.
        known: fields that are decided already.
        folder: of the run, for messages.
        world: the number of processes.

    Raises:
        FleetflowError: what is asked for differs from what is decided, or its parts do not divide among processes.
    """
    if asked.recipe == FINETUNE:
        asked = _finetuned(asked, known)
    run = asked.continued(known, folder)
    parts = run.gradient_accumulation or world
    if parts % world:
        hint = (
            f"resume with as many as divide {parts}" if known else f"give --gradient-accumulation {world} or a multiple"
        )
        raise FleetflowError(f"{parts} parts do not divide among {world} processes; {hint}")
    return replace(run, seed=run.seed or 0, gradient_accumulation=parts).with_start()


def _finetuned(asked: Run, known: dict[str, Any]) -> Run:
    """What is asked of a run that fine-tunes, with its network named, and crops that fit the frames."""
    if known:
        name = known["recipe"]
        return replace(asked, recipe=name if name.startswith(f"{FINETUNE}:") else FINETUNE)
    asked = replace(asked, recipe=f"{FINETUNE}:{network_of(asked.start)}")
    if not asked.data or not asked.root:
        raise FleetflowError("fine-tuning needs pairs of your own; give --data folder --root DIR")
    plan = asked.plan()
    ((_, files),) = open_sources(plan.stages[0].sources, Path(asked.root))
    height, width = crop_for(plan.network, files, plan.stages[0].batches[0])
    return replace(asked, settings={"height": str(height), "width": str(width), **asked.settings})


def expect_data(plan: Recipe, root: Path | None, first: int, last: int) -> None:
    """Raises FleetflowError where data is missing that the steps from `first` to before `last` need."""
    begin = 0
    for stage in plan.stages:
        if begin < last and begin + stage.steps > first:
            open_sources(stage.sources, root)
            open_validation(stage, root)
        begin += stage.steps


def initial_model(
    stage: Stage, plan: Recipe, seed: int, *, earlier: nn.Module | None, start: tuple[str, ...], resumed: bool
) -> FlowModel:
    """Returns the network of a stage as its training begins.

    Args:
        stage: of a recipe.
        plan: the recipe.
        seed: of random weights.
        earlier: the network of the stage before.
        start: names of networks whose weights are given for the first stage.
        resumed: a checkpoint will be loaded into it.

    Raises:
        FleetflowError: weights are missing that the stage needs, or are those of another network.
    """
    torch.manual_seed(seed)
    name = stage.network or plan.network
    model = stage.build() if stage.build else models[name]()
    given = [weights.load(one) for one in start] or ([] if earlier is None else [earlier])
    if len(given) == 1 and _shapes(given[0]) == _shapes(model) and not (stage.grow and earlier is not None):
        model.load_state_dict(given[0].state_dict())
    elif given and stage.grow:
        stage.grow(model, *given)
    elif given:
        raise FleetflowError(f"the weights of {' and '.join(start)} are not those of {name}, which this stage trains")
    elif stage.grow:
        raise FleetflowError(f"stage {stage.name} takes up trained networks; give them with --start ({plan.source})")
    elif stage.needs_weights and not resumed:
        raise FleetflowError(f"stage {stage.name} tunes trained weights; give them with --start ({plan.source})")
    elif stage.init:
        stage.init(model)
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def open_validation(stage: Stage, root: Path | None) -> list[tuple[Source, Files]]:
    """Returns the stage's validation pairs, opened before it trains; none where validate_every is 0."""
    try:
        return open_sources(stage.validation, root) if stage.validate_every else []
    except FleetflowError as error:
        raise FleetflowError(f"{error} (for validation; --set validate_every=0 trains without)") from None
