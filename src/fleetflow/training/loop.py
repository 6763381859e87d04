"""Train: one loop you can read. A run is a folder with checkpoints, a log of every step and the finished weights.

On several GPUs or machines the same loop runs in every process, started by torchrun:

    torchrun --nproc-per-node 8 -m fleetflow train raft_chairs --root DIR
"""

import copy
import math
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from fleetflow.data.dataset import Files
from fleetflow.data.generate import default_textures
from fleetflow.data.generate.photographs import photographs
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.evaluation.metrics import end_point_error
from fleetflow.evaluation.protocol import fit_for
from fleetflow.inference.device import Precision, autocast, choose_dtype
from fleetflow.inference.memory import keep_freed
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import reason, write_atomically
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.registry import models, unknown
from fleetflow.training import distributed as processes
from fleetflow.training.dataloader import Feed, batches, dataset_of, on_data, open_sources, opened
from fleetflow.training.logging import Log, header
from fleetflow.training.recipe import Recipe, Source, Stage, changed
from fleetflow.training.recipes import recipe
from fleetflow.types import FleetflowError, Sample

BAD_STEPS = 20  # so many steps with a loss that is no number or explodes end the run
EXPLODED = 50.0  # a loss so many times the median of the last 200 is not learned from
PICTURE_EVERY = 1_000
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CHECKPOINT = ("recipe", "seed", "parts", "step", "bad", "model", "average", "scaler", "optimizers")  # always in one


@dataclass(frozen=True)
class Outcome:
    """What a run reached: step (of how many), mean EPE of the last steps in pixels, and the files it wrote."""

    step: int
    steps: int
    epe: float
    weights: Path
    checkpoint: Path


def train(
    name: str,
    *,
    folder: Path | None = None,
    resume: bool = False,
    like: Path | None = None,
    start: tuple[str, ...] = (),
    stage: str | None = None,
    settings: dict[str, str] | None = None,
    root: Path | None = None,
    data: str | None = None,
    textures: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    workers: int | None = None,
    parts: int | None = None,
    compile: bool = False,
    save_memory: bool = False,
    checkpoint_every: int = 250,
    report=print,
) -> Outcome:
    """Trains a recipe and returns what it reached; the weights lie in FOLDER/weights.safetensors.

    name: a recipe, such as "fastflownet_synthetic". stage: only this stage of it.
    folder: where the run lives; default runs/NAME. A run that is there is only continued, with `resume`.
    resume: continue exactly where the last checkpoint left off. What decides the numbers (stage, settings, start, root,
        data, textures, precision, seed, parts) need not be given again, and may not differ but for `settings["steps"]`.
    like: the checkpoint of another run, from which a new one takes the same things, but not the seed.
    start: a network or NETWORK:CHECKPOINT, as `fleetflow.load` takes it, whose weights the run starts from; several
        for a network that is put together of others (FlowNet2).
    settings: values that replace those of the recipe, such as {"batch": "4"} (`plan.changed`).
    root: the folder that holds the data sets. textures: a folder of photographs for generated pairs.
    data: a data set instead of those of the recipe, in the folder `root` (`feed.on_data`).
    minutes, steps: stop after so long, or at that step; the run can be resumed. seed: of weights and data (0).
    threads: threads of the training process (0: as many as torch takes). workers: processes that make or read pairs;
        None takes one, and for data sets as many as there are cores for each process, up to 8.
    parts: parts of a batch, over which gradients are accumulated; a multiple of the number of processes (default).
    compile: use torch.compile. save_memory: compute the activations of blocks again instead of keeping them; not those
        of blocks with training batch statistics or normalized weights.
    checkpoint_every: steps between checkpoints; a killed run loses at most so many.
    """
    expect(
        ("minutes", minutes, 0), ("steps", steps, 1), ("seed", seed, 0), ("threads", threads, 0),
        ("workers", workers, 0), ("parts", parts, 1), ("checkpoint-every", checkpoint_every, 1),
    )  # fmt: skip
    asked = {
        "recipe": name,
        "stage": stage,
        "settings": settings or {},
        "start": list(start),
        "root": str(Path(root).resolve()) if root else None,
        "data": data,
        "textures": str(Path(textures).resolve()) if textures else None,
        "precision": None if precision == "auto" else precision,
        "seed": seed,
        "parts": parts,
    }
    recipe(name)  # an unknown name is said before all else
    folder = Path(folder or Path("runs") / name)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise FleetflowError(f"{folder} holds a run already; add --resume to continue it, or choose another --folder")
    if resume and not checkpoint.exists():
        raise FleetflowError(f"{checkpoint} is not there; nothing to resume")
    rank, world, where = processes.join(device)
    state = _load(checkpoint) if resume else {}
    known = {key: value for key, value in _load(like).items() if key != "seed"} if like else state
    run = _continued(known, asked, folder)
    plan = _plan(run)
    if state and state["step"] > plan.steps:
        raise FleetflowError(f"the run in {folder} is at step {state['step']} of {plan.steps}; give --set steps=MORE")
    dtype = choose_dtype(run["precision"] or "auto", where)
    run["precision"] = PRECISIONS[dtype]
    run["seed"] = seed = run["seed"] or 0
    run["parts"] = parts = run["parts"] or world
    said = [_said(one) for one in run["start"]]  # kept in the checkpoint: a resumed run needs its start no more
    seen = [one.get("samples", "") for one in said]
    run["start_samples"] = state.get("start_samples", sum(int(count) for count in seen if count.isdecimal()))
    run["start_licenses"] = state.get("start_licenses", sorted({one.get("license", "unknown") for one in said}))
    root, textures = (Path(run[key]) if run[key] else None for key in ("root", "textures"))
    if parts % world:
        hint = f"resume with as many as divide {parts}" if state else f"give --parts {world} or a multiple"
        raise FleetflowError(f"{parts} parts do not divide among {world} processes; {hint}")
    if threads:
        torch.set_num_threads(threads)
    total, begin = min(plan.steps, steps or plan.steps), 0
    for part in plan.stages:  # data that a later stage lacks is said now
        if begin < total and begin + part.steps > state.get("step", 0):
            open_sources(part.sources, root)
            _judges(part, root)
        begin += part.steps
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetflowError(f"{folder} cannot be a folder ({reason(error)}); choose another --folder") from None
    surfaces = photographs(textures) if textures else default_textures()
    if where.type == "cpu":
        keep_freed()
    else:  # a GPU makes the pairs itself, faster than processes could send them
        surfaces = surfaces.to(where)

    log, at = None, state.get("step", 0)
    began = time.monotonic()
    done, bad, spell, blank, recent, model, stop = 0, 0, 0, 0, deque(state.get("recent", ()), maxlen=200), None, False
    for number, part in enumerate(plan.stages):
        given = run["start"] if number == 0 and (part.grow or not state) else ()
        model = _fresh(part, plan, seed, earlier=model, start=given, resumed=bool(state)).to(where)
        if state and state["step"] > done + part.steps:  # finished in a former session
            done += part.steps
            continue
        if state and weights.differences(model, state["model"]):
            raise FleetflowError(f"{checkpoint} is not of stage {part.name}; give the --stage and --set of its run")
        if state and state["step"] == done + part.steps:  # the next stage begins from what this one left
            model.load_state_dict(_averaged(state["average"]))
            done, bad, state = done + part.steps, state["bad"], {}
            continue
        trained, average, updates, scaler = _begin(part, model, where, dtype, world, compile, save_memory)
        rates = [[group["lr"] for group in update.param_groups] for update in updates]
        first = 0
        if state:
            model.load_state_dict(state["model"])
            average.load_state_dict(state["average"])
            scaler.load_state_dict(state["scaler"])
            for update, saved in zip(updates, state["optimizers"], strict=True):
                update.load_state_dict(saved)
            torch.set_rng_state(state.get("random", torch.get_rng_state()))
            first, bad, state = state["step"] - done, state["bad"], {}

        if rank == 0 and not log:
            log = Log(folder, at, total, report)
        last = min(part.steps, total - done)
        feed = Feed(part, 1_009 * seed + number, parts, surfaces, root)
        judges = _judges(part, root)
        own = range(rank, parts, world)
        few = min(8, (os.cpu_count() or 1) // world) if feed.sources else 1
        here = (few if workers is None else workers) if feed.sources or where.type == "cpu" else 0
        stream = batches(feed, first, last, own, workers=here)
        opening = weights.load(part.opening).to(where) if part.opening else None
        step = first - 1
        for step in range(first, last):
            factor = part.schedule(step, part.steps)
            for update, bases in zip(updates, rates, strict=True):
                for group, base in zip(update.param_groups, bases, strict=True):
                    group["lr"] = base * factor
            numbers, tried = torch.zeros(3, device=where), []  # loss, sum of errors, parts that have known pixels
            for k in range(len(own)):
                _, _, tensors = next(stream)
                sample = Sample(*(tensor.to(where, non_blocking=True) for tensor in tensors))
                trained.require_backward_grad_sync = k + 1 == len(own)  # processes meet at the last part
                with autocast(where, dtype):
                    prediction = trained(*sample[:2], opened(opening, sample, step), iterations=part.iterations)
                loss = part.loss(prediction, sample)
                scaler.scale(loss / len(own)).backward()
                error = end_point_error(prediction.flow.detach().float(), sample.flow)[sample.valid]
                tried.append((loss.detach(), sample))
                known = error.new_tensor(error.numel() > 0)
                numbers += torch.stack((loss.detach() / parts, error.sum() / max(error.numel(), 1), known))
            if world > 1:
                dist.all_reduce(numbers)
            for update in updates:
                scaler.unscale_(update)
            length = nn.utils.clip_grad_norm_(model.parameters(), part.clip).item()
            value, epe, known = numbers.tolist()
            epe = epe / known if known else math.nan
            blank = 0 if known else blank + 1
            if blank == BAD_STEPS:
                raise FleetflowError(f"{blank} batches in a row have no known flow; look at `fleetflow doctor dataset`")
            exploded = len(recent) >= 100 and value > EXPLODED * median(row[0] for row in recent)
            overflowed = scaler.is_enabled() and math.isfinite(value)  # float16 does so to find its scale
            learned = math.isfinite(length + value) and not exploded and known > 0
            if learned:
                with autocast(where, dtype):  # the products of Muon, too
                    for update in updates:
                        scaler.step(update)
                average.update_parameters(model)
                recent.append((value, epe))
                spell = 0
            elif known and (exploded or not overflowed):
                bad, spell = bad + 1, spell + 1
                _keep_bad(folder, tried, bad, done + step, rank)
            scaler.update()
            for update in updates:
                update.zero_grad(set_to_none=True)

            late = minutes is not None and time.monotonic() - began > 60 * minutes
            stop = processes.agreed(late, where, world) if minutes is not None else False
            if log:
                size = part.at(step)
                row = {"loss": value, "epe": epe, "gradient": length, "rate": factor}
                log.step(done + step, size.batch, row, learned=learned, skipped=bad)
                if step % PICTURE_EVERY == 0:
                    log.picture(done + step, sample, prediction.flow)
                if judges and ((step + 1) % part.validate_every == 0 or step + 1 == part.steps):
                    log.validation(done + step, _validate(average.module, judges, where))
                ends = step + 1 == last or stop
                if spell < 2 if ends else (step + 1) % checkpoint_every == 0 and not spell:  # the last good one stays
                    state_now = {
                        **run,
                        "step": done + step + 1,
                        "bad": bad,
                        "recent": list(recent),
                        "random": torch.get_rng_state(),
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "scaler": scaler.state_dict(),
                        "optimizers": [update.state_dict() for update in updates],
                    }
                    write_atomically(checkpoint, partial(torch.save, state_now))
                    about = header(run, plan, part, done + step + 1, step + 1)
                    weights.save(average.module, folder / "weights.safetensors", about)
                    if step + 1 == part.steps and len(plan.stages) > 1:
                        weights.save(average.module, folder / f"{part.name}.safetensors", about)
            if stop:
                break
        done += step + 1
        model = average.module
        if stop or done >= total:
            break
    if log:
        log.close()
    if world > 1:
        dist.barrier()
    epe = fmean(row[1] for row in recent) if recent else math.nan
    return Outcome(done, plan.steps, epe, folder / "weights.safetensors", checkpoint)


def expect(*numbers: tuple[str, float | None, float]) -> None:
    """Returns if all numbers (option, value, least) that are given are in range; raises FleetflowError otherwise."""
    for option, value, least in numbers:
        if value is not None and not least <= value < 2**32:
            raise FleetflowError(f"--{option} is {value}; expected a number from {least} to 2^32")


def _plan(run: dict) -> Recipe:
    """The recipe of a run, or the one stage of it that is trained, with the run's settings."""
    plan = recipe(run["recipe"])
    plan = changed(_only(plan, run["stage"]) if run["stage"] else plan, run["settings"])
    return on_data(plan, run["data"]) if run["data"] else plan


def _load(checkpoint: Path) -> dict:
    """What a checkpoint of a run holds; raises FleetflowError where it is damaged or something else."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        lacks = [f"it has no {key}" for key in CHECKPOINT if key not in state]
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, OSError, ...
        lacks = [reason(error)[:80]]
    if lacks:
        raise FleetflowError(
            f"{checkpoint} is no whole checkpoint of a run ({lacks[0]}); put a copy there, or begin another --folder "
            f"with --start NETWORK:{checkpoint.with_name('weights.safetensors')}"
        )
    return state


def _continued(state: dict, asked: dict, folder: Path) -> dict:
    """What a run goes on with: what its checkpoint says, and what is asked for where that says nothing.

    A data folder may be named anew where the old one is gone, and a single stage may be given another length; raises
    FleetflowError where anything else that is asked for differs.
    """
    run = asked | {key: state[key] for key in asked if key in state}
    plan, kept = _plan(run), run["settings"]
    run["settings"] = kept | asked["settings"]
    for key in ("root", "textures"):
        if asked[key] and run[key] and not Path(run[key]).exists():
            run[key] = asked[key]
    free = ("steps", "validate_every") if len(plan.stages) == 1 else ("validate_every",)
    differences = [
        (key, run[key], new) for key, new in asked.items() if key != "settings" and new not in (None, [], run[key])
    ] + [
        (name, kept.get(name, "as in the recipe"), value)
        for name, value in asked["settings"].items()
        if name not in free and _plan({**run, "settings": {**kept, name: value}}) != plan
    ]
    if differences:
        what, before, new = differences[0]
        raise FleetflowError(
            f"the run in {folder} has {what} {'none' if before in (None, []) else before}, not {new}; resume it as it "
            "is, or begin another --folder (--start takes its weights)"
        )
    return run


def _only(plan: Recipe, name: str) -> Recipe:
    """The recipe with the stage called `name` alone, as a stage that follows another starts: from given weights."""
    names = [stage.name for stage in plan.stages]
    if name not in names:
        raise unknown("stage of this recipe", name, names)
    stage = plan.stages[names.index(name)]
    return replace(plan, stages=(replace(stage, tunes=stage.tunes or stage is not plan.stages[0]),))


def _fresh(
    stage: Stage, plan: Recipe, seed: int, *, earlier: nn.Module | None, start: tuple[str, ...], resumed: bool
) -> FlowModel:
    """The network of a stage as its training begins."""
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
    elif stage.tunes and not resumed:
        raise FleetflowError(f"stage {stage.name} tunes trained weights; give them with --start ({plan.source})")
    elif stage.begin:
        stage.begin(model)
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _begin(
    stage: Stage,
    model: FlowModel,
    where: torch.device,
    dtype: torch.dtype,
    world: int,
    compile: bool,
    save_memory: bool,
):
    """Makes what a stage needs besides the network: the module that is called, the average, optimizers, scaler."""
    model = model.to(memory_format=torch.channels_last).train()
    if stage.freeze_norm:
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_ema(stage.ema))
    updates = stage.optimizer(model, stage.learning_rate, stage.weight_decay)
    scaler = torch.amp.GradScaler(where.type, enabled=dtype == torch.float16)
    if save_memory:
        blocks = {block for block in model.children() if len(list(block.children())) and _repeatable(block)}
        if not blocks:
            raise FleetflowError("no block of this network can be computed again; train it without --save-memory")
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda layer: layer in blocks
        )
    trained: nn.Module = model
    if world > 1:
        trained = DistributedDataParallel(model, device_ids=[where] if where.type == "cuda" else None)
    if compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=where))
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = str(error).strip().splitlines()[0][:200]
            raise FleetflowError(
                f"--compile does not work here ({reason}); install a C++ compiler or leave it out"
            ) from None
        trained = torch.compile(trained, dynamic=False)  # the sizes of a stage are few
    return trained, average, updates, scaler


def _repeatable(block: nn.Module) -> bool:
    """Whether computing a block again gives the same: no statistics to count twice, no weights made once a step."""
    return not any(
        is_parametrized(layer) or (isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training)
        for layer in block.modules()
    )


def _averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in the state of an AveragedModel."""
    return {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}


def _ema(decay: float):
    """The exponential average, with a shorter memory while the run is young; a decay of 0 gives the weights."""

    @torch.no_grad()
    def update(averages, current, count):
        rate = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - rate)

    return update


def _judges(stage: Stage, root: Path | None) -> list[tuple[Source, Files]]:
    """The stage's validation pairs, opened before it trains; none where validate_every is 0."""
    try:
        return open_sources(stage.validation, root) if stage.validate_every else []
    except FleetflowError as error:
        raise FleetflowError(f"{error} (for validation; --set validate_every=0 trains without)") from None


def _validate(model: FlowModel, judges: list[tuple[Source, Files]], where: torch.device) -> dict[str, float]:
    """The errors of the averaged weights on validation pairs, means by set, then of the sets."""
    tables = []
    for source, files in judges:
        predictor = Predictor(fit_for(copy.deepcopy(model), dataset_of(source)), device=str(where))
        tables.append(evaluate(predictor, files)["mean of sets"])
    return {key: fmean(table[key] for table in tables) for key in ("epe", "out3", "fl")}


def _keep_bad(folder: Path, tried: list[tuple[torch.Tensor, Sample]], bad: int, step: int, rank: int) -> None:
    """Stores the worst part of a batch whose loss was no number or exploded; ends the run at the limit."""
    path, saved = folder / f"bad_batch-{rank}.pt", folder / "weights.safetensors"
    loss, sample = max(tried, key=lambda part: part[0].nan_to_num(math.inf, math.inf).item())
    tensors = {name: tensor for name, tensor in sample._asdict().items() if tensor is not None}
    torch.save({"step": step, "loss": loss.item(), **tensors}, path)
    if bad >= BAD_STEPS:
        start = f" with --start NETWORK:{saved}" if saved.exists() else ""
        raise FleetflowError(
            f"{bad} steps had a loss that is not a number or exploded, the last at step {step} (its batch is in "
            f"{path}); begin another --folder{start} and a lower learning rate"
        )


def _said(start: str) -> dict[str, str]:
    """What weights given as a start say of themselves; nothing where they are no file of ours."""
    network, _, path = start.partition(":")
    try:
        return weights.header(Path(path) if path else weights.shipped(network))
    except FleetflowError:
        return {}
