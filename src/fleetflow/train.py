"""Train: one loop you can read. A run is a folder with checkpoints, a log of every step and the finished weights."""

import json
import math
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fleetflow.data.generate import default_textures, generate
from fleetflow.data.generate.textures import Textures, photographs
from fleetflow.io import write_atomically
from fleetflow.losses import multi_scale
from fleetflow.metrics import end_point_error
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet, start_as_matcher
from fleetflow.optimise import optimisers
from fleetflow.predict import Precision, autocast, choose_device, choose_dtype
from fleetflow.recipes import Recipe, recipe
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Sample

BAD_STEPS = 20  # so many steps with a loss that is not a number end the run


@dataclass(frozen=True)
class Outcome:
    """What a run reached: step (of how many), mean EPE of the last steps in pixels, and the files it wrote."""

    step: int
    steps: int
    epe: float
    weights: Path
    checkpoint: Path


class _Generated(Dataset):
    """Batch number `step` of a recipe, made from the seed alone: the same whenever and wherever it is asked for."""

    def __init__(self, plan: Recipe, seed: int, textures: Textures):
        self.plan, self.seed, self.textures = plan, seed, textures

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> tuple:
        stage = self.plan.stage(step)
        sample = generate(stage.batch, stage.height, stage.width, seed=self.seed, index=step, textures=self.textures)
        return tuple(sample[:4])


def learning_rate(plan: Recipe, step: int) -> float:
    """Returns the factor on the learning rate: a linear warm-up, 1, then a straight line to 0 over the cool-down."""
    warm = (step + 1) / plan.warmup if plan.warmup else 1.0
    left = (plan.steps - step) / (plan.cooldown * plan.steps) if plan.cooldown else 1.0
    return max(0.0, min(1.0, warm, left))


def train(
    name: str,
    *,
    folder: Path | None = None,
    resume: bool = False,
    start: str | None = None,
    textures: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    workers: int = 1,
    checkpoint_every: int = 250,
    report=print,
) -> Outcome:
    """Trains a recipe and returns what it reached; the averaged weights lie in FOLDER/weights.safetensors.

    name: a recipe, such as "fastflownet_synthetic".
    folder: where the run lives; default runs/NAME. A run that is there is only continued, with `resume`.
    resume: continue exactly where the last checkpoint left off.
    start: a network or NETWORK:CHECKPOINT, as `fleetflow.load` takes it, whose weights the run starts from.
    textures: a folder of photographs to texture the generated pairs with; default: procedural textures.
    minutes, steps: stop after so long, or at that step; the run can be resumed.
    threads: threads of the training process (0: as many as torch takes); workers: processes that make pairs.
    checkpoint_every: steps between checkpoints; a killed run loses at most so many.
    """
    plan = recipe(name)
    folder = Path(folder or Path("runs") / name)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise FleetflowError(f"{folder} holds a run already; add --resume to continue it, or choose another --folder")
    if resume and not checkpoint.exists():
        raise FleetflowError(f"{checkpoint} is not there; nothing to resume")
    where = choose_device(device)
    dtype = choose_dtype(precision, where)
    if threads:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    model = models[plan.network]()
    if isinstance(model, FastFlowNet):
        start_as_matcher(model)
    if start:
        model.load_state_dict(weights.load(start).state_dict())
    model = model.to(where, memory_format=torch.channels_last).train()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_ema(plan.ema))
    updates = optimisers(model, plan.learning_rate, plan.weight_decay)
    rates = [[group["lr"] for group in update.param_groups] for update in updates]
    scaler = torch.amp.GradScaler(where.type, enabled=dtype == torch.float16)
    first, bad = 0, 0
    if resume:
        state = torch.load(checkpoint, map_location=where, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        scaler.load_state_dict(state["scaler"])
        for update, saved in zip(updates, state["optimisers"], strict=True):
            update.load_state_dict(saved)
        first, bad, seed = state["step"], state["bad"], state["seed"]

    last = min(plan.steps, steps or plan.steps)
    surfaces = photographs(textures) if textures else default_textures()
    if where.type != "cpu":  # a GPU makes the pairs itself, faster than processes could send them
        surfaces, workers = surfaces.to(where), 0
    data = _Generated(plan, seed, surfaces)
    queue = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
    batches = iter(DataLoader(data, batch_size=None, sampler=range(first, last), **queue))
    log = _Log(folder, first, last, report)
    began = time.monotonic()
    step, recent = first, []
    for step in range(first, last):
        sample = Sample(*(tensor.to(where) for tensor in next(batches)))
        factor = learning_rate(plan, step)
        for update, bases in zip(updates, rates, strict=True):
            for group, base in zip(update.param_groups, bases, strict=True):
                group["lr"] = base * factor
        with autocast(where, dtype):
            prediction = model(sample.frame1, sample.frame2)
        loss = multi_scale(prediction, sample)
        scaler.scale(loss).backward()
        for update in updates:
            scaler.unscale_(update)
        length = nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        if math.isfinite(length + loss.item()):
            for update in updates:
                scaler.step(update)
            average.update_parameters(model)
        else:
            bad += 1
            _keep_bad(folder, sample, bad, step)
        scaler.update()
        for update in updates:
            update.zero_grad(set_to_none=True)

        epe = end_point_error(prediction.flow.detach(), sample.flow)[sample.valid].mean().item()
        recent = [*recent[-199:], epe]
        log.step(step, len(sample.flow), {"loss": loss.item(), "epe": epe, "gradient": length.item(), "rate": factor})
        stop = minutes is not None and time.monotonic() - began > 60 * minutes
        if (step + 1) % checkpoint_every == 0 or step + 1 == last or stop:
            state = {
                "step": step + 1,
                "bad": bad,
                "seed": seed,
                "recipe": name,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "scaler": scaler.state_dict(),
                "optimisers": [update.state_dict() for update in updates],
            }
            write_atomically(checkpoint, partial(torch.save, state))
            weights.save(average.module, folder / "weights.safetensors", _header(name, plan, step + 1, textures))
        if stop:
            break
    log.close()
    return Outcome(
        step + 1, plan.steps, float(np.mean(recent or [math.nan])), folder / "weights.safetensors", checkpoint
    )


def _ema(decay: float):
    """The exponential average, with a shorter memory while the run is young."""

    @torch.no_grad()
    def update(averages, current, count):
        rate = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, current, 1 - rate)

    return update


def _keep_bad(folder: Path, sample: Sample, bad: int, step: int) -> None:
    """Stores the batch whose loss was no number; ends the run at the limit."""
    torch.save(
        {name: tensor for name, tensor in sample._asdict().items() if tensor is not None}, folder / "bad_batch.pt"
    )
    if bad >= BAD_STEPS:
        raise FleetflowError(
            f"{bad} steps had a loss that is not a number, the last at step {step}; "
            f"the batch is in {folder / 'bad_batch.pt'}: lower the learning rate or resume from an earlier checkpoint"
        )


def _header(name: str, plan: Recipe, step: int, textures: Path | None) -> dict[str, object]:
    """What shipped weights say of themselves; the commit is that of the working directory, where there is one."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "network": plan.network,
        "arguments": {},
        "recipe": name,
        "step": step,
        "samples": plan.samples(step),
        "textures": "photographs" if textures else "procedural",
        "commit": git.stdout.strip() or "unknown",
        "licence": "Apache-2.0",
    }


class _Log:
    """Terminal line with speed and time left, a JSON line per step, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, first: int, last: int, report):
        path = folder / "log.jsonl"
        kept = []
        if first and path.exists():  # steps after the checkpoint will be done again
            kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] < first]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.first, self.last, self.report = first, last, report
        self.rows: list[dict] = []
        self.samples, self.shown = 0, time.monotonic()
        self.began = self.shown
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=first)
        except ImportError:
            self.board = None

    def step(self, step: int, samples: int, numbers: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **{key: round(value, 5) for key, value in numbers.items()}}) + "\n")
        self.rows.append(numbers)
        self.samples += samples
        now = time.monotonic()
        if now - self.shown < 10 and step + 1 < self.last:
            return
        mean = {key: float(np.mean([row[key] for row in self.rows])) for key in numbers}
        if self.board:
            for key, value in mean.items():
                self.board.add_scalar(f"train/{key}", value, step)
        left = (now - self.began) / (step + 1 - self.first) * (self.last - step - 1)
        self.report(
            f"step {step + 1}/{self.last}  loss {mean['loss']:.3f}  EPE {mean['epe']:.2f} px  "
            f"{self.samples / (now - self.shown):.1f} samples/s  {int(left // 60)}:{int(left % 60):02d} left"
        )
        self.rows, self.samples, self.shown = [], 0, now

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
