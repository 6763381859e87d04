"""Train: a run goes through the stages of a recipe. A run is a folder with checkpoints, a log of every step and weights.

On several GPUs or machines the same loop runs in every process, started by torchrun:

    torchrun --nproc-per-node 8 -m fleetflow train raft_chairs --root DIR
"""

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from fleetflow.data.dataset import Files
from fleetflow.data.generate import default_textures
from fleetflow.data.generate.photographs import photographs
from fleetflow.data.workers import Ahead
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.evaluation.protocol import fit_for
from fleetflow.inference.device import Precision, choose_dtype, use_threads
from fleetflow.inference.memory import keep_freed
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import reason, write_atomically
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.training import checkpoint as disk
from fleetflow.training import distributed
from fleetflow.training import start as begin_from
from fleetflow.training.checkpoint import Best, Checkpoint, Run
from fleetflow.training.dataloader import Feed, batches, dataset_of
from fleetflow.training.distributed import Signals, Team
from fleetflow.training.logging import Log, header
from fleetflow.training.recipe import Source, Stage
from fleetflow.training.recipes import recipe
from fleetflow.training.recipes.finetune import FINETUNE
from fleetflow.training.start import Options, expect, expect_folder, initial_model, open_validation
from fleetflow.training.step import BAD_STEPS, History, StepResult, Training, train_step
from fleetflow.types import FleetflowError, Sample

PICTURE_EVERY = 1_000
PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Outcome:
    """What a run reached: step (of how many), mean EPE of the last steps in pixels, and the files it wrote."""

    step: int
    steps: int
    epe: float
    weights: Path
    checkpoint: Path
    best: Best | None = None  # where the recipe keeps the best weights


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
    gradient_accumulation: int | None = None,
    compile: bool = False,
    save_memory: bool = False,
    checkpoint_every: int = 250,
    report=print,
) -> Outcome:
    """Trains a recipe; the weights lie in FOLDER/weights.safetensors.

    SIGINT, SIGTERM and SIGHUP end a run after the step in progress, with a checkpoint.

    Args:
        name: a recipe, such as "fastflownet_synthetic"; "finetune" takes the network from `start`.
        folder: where the run lives; default runs/NAME. A run that is there is only continued, with `resume`.
        resume: continue exactly where the last checkpoint left off. What decides the numbers (stage, settings, start,
            root, data, textures, precision, seed, gradient_accumulation) need not be given again, and may not differ
            but for `settings["steps"]`.
        like: the checkpoint of another run, from which a new one takes the same things, but not the seed.
        start: networks or NETWORK:CHECKPOINT, as `fleetflow.load` takes them, whose weights the run starts from;
            several for a network that is put together of others (FlowNet2).
        stage: train only this stage of the recipe.
        settings: values that replace those of the recipe, such as {"batch": "4"} (`recipe.changed`).
        root: the folder that holds the data sets.
        data: a data set instead of those of the recipe, in the folder `root` (`dataloader.on_data`).
        textures: a folder of photographs for generated pairs.
        minutes: stop after so long; the run can be resumed.
        steps: stop at this step; the run can be resumed. Of "finetune" the whole length, to which its schedule fits.
        seed: of weights and data; None takes 0.
        device: "auto", "cpu", "cuda", ...
        precision: of the convolutions.
        threads: of the training process; 0 takes as many as torch does.
        workers: processes that make or read pairs; None takes one, and for data sets as many as there are cores for
            each process, up to 8.
        gradient_accumulation: parts of a batch over which gradients are accumulated; a multiple of the number of
            processes, which is the default.
        compile: use torch.compile.
        save_memory: compute the activations of blocks again instead of keeping them; not those of blocks with training
            batch statistics or normalized weights.
        checkpoint_every: steps between checkpoints; a killed run loses at most so many.
        report: is given each line on how the run goes.

    Returns:
        What the run reached.

    Raises:
        FleetflowError: something is missing, differs from the run that is resumed, or cannot be written; or the
            training diverges.
    """
    expect(
        ("minutes", minutes, 0), ("steps", steps, 1), ("seed", seed, 0),
        ("workers", workers, 0), ("gradient-accumulation", gradient_accumulation, 1),
        ("checkpoint-every", checkpoint_every, 1),
    )  # fmt: skip
    if name != FINETUNE:
        recipe(name)  # an unknown name is said before all else
    places = [os.path.realpath(place) if place else None for place in (root, textures)]
    settings = dict(settings or {})
    if name == FINETUNE and steps:  # the schedule fits the steps that are asked for
        settings, steps = {"steps": str(steps), **settings}, None
    asked = Run(
        name, stage, settings, tuple(start), places[0], data, places[1],
        None if precision == "auto" else precision, seed, gradient_accumulation,
    )  # fmt: skip
    options = Options(
        Path(folder or Path("runs") / name), report, resume, minutes, steps, workers, compile, save_memory,
        checkpoint_every,
    )  # fmt: skip
    expect_folder(options)
    team = distributed.join(device)
    use_threads(threads)
    own = disk.own_folder(options.folder, f"train {name}") if team.rank == 0 else nullcontext()
    with own, Signals() as signals, closing(_Session(asked, like, options, team, signals)) as session:
        return session.run_stages()


class _Session:
    """A run from its start, or its last checkpoint, to its end or the next interruption."""

    def __init__(self, asked: Run, like: Path | None, options: Options, team: Team, signals: Signals):
        """Reads what there is of the run, and looks whether all that it needs is there."""
        self.options, self.team, self.signals = options, team, signals
        self.checkpoint = options.folder / "checkpoint.pt"
        self.state = Checkpoint.load(self.checkpoint) if options.resume and self.checkpoint.exists() else None
        run = begin_from.decided(asked, begin_from.known_fields(options, self.state, like), options.folder, team.world)
        self.dtype = choose_dtype(run.precision or "auto", team.device)
        self.run = replace(run, precision=PRECISIONS[self.dtype])
        self.seed, self.parts = run.seed or 0, run.gradient_accumulation or team.world
        self.plan = self.run.plan()
        self.total = min(self.plan.steps, options.steps or self.plan.steps)
        self.root = Path(self.run.root) if self.run.root else None
        if self.position > self.plan.steps:
            raise FleetflowError(
                f"the run in {options.folder} is at step {self.position} of {self.plan.steps}; give --set steps=MORE"
            )
        begin_from.expect_data(self.plan, self.root, self.position, self.total)
        self.textures = photographs(Path(self.run.textures)) if self.run.textures else default_textures()
        if team.device.type == "cpu":
            keep_freed()
        self.history = History(skipped=self.state.skipped if self.state else 0)
        self.history.recent.extend((loss, epe) for loss, epe in (self.state.recent if self.state else ()))
        self.best = Best(**self.state.best) if self.state and self.state.best else None
        self.log: Log | None = None
        self.claimed = False
        self.began = time.monotonic()

    @property
    def position(self) -> int:
        """The step at which this session begins."""
        return self.state.step if self.state else 0

    def _claim_folder(self) -> None:
        """Says which files of the folder are the run's; raises FleetflowError where one of them is somebody else's."""
        if self.team.rank == 0 and not self.claimed:
            begun = self.state is not None
            disk.claim(self.options.folder, self.run, self.plan, self.team.world, begun=begun)
            self.claimed = True

    def run_stages(self) -> Outcome:
        """Trains the stages that are left; returns what was reached."""
        step, model = 0, None
        for number, stage in enumerate(self.plan.stages):
            begin, end = step, step + stage.steps
            model = self._initial_model(number, stage, earlier=model)
            if self.position < end:
                step, model = self._train_stage(number, stage, begin, model)
            else:  # it was finished in an earlier session
                step = end
                if self.state and self.position == end:
                    self._claim_folder()
                    self._restore(partial(model.load_state_dict, self.state.averaged))
                    self._write_weights(model, stage, begin, end, only_missing=True)
            if step < end or step >= self.total:
                break
        return self._end(step)

    def _train_stage(self, number: int, stage: Stage, begin: int, model: FlowModel) -> tuple[int, FlowModel]:
        """Trains a stage from its start, or from where the checkpoint stands; returns the step and averaged network."""
        options = self.options
        training = Training(
            stage, model, self.team, self.dtype, compile=options.compile, save_memory=options.save_memory
        )
        first, last = max(self.position - begin, 0), min(stage.steps, self.total - begin)
        self._claim_folder()
        if first and self.state:
            self._restore(partial(training.restore, self.state))
            self._write_weights(training.averaged, stage, begin, self.position, only_missing=True)
        if self.team.rank == 0 and not self.log:
            self.log = Log(options.folder, self.position, self.total, options.report)
        validation_sets = open_validation(stage, self.root)
        if stage.keep_best and self.best is None and self.log:
            epe = self._errors(training, validation_sets)["epe"]
            self.best = Best(epe, epe, begin, copy.deepcopy(model.state_dict()))
            options.report(f"before training  validation EPE {epe:.3f} px")
        step = begin + first
        with self._batches(number, stage, first, last) as stream:
            for own in range(first, last):
                stop = self._step(training, stream, validation_sets, begin, own, last)
                step = begin + own + 1
                if stop:
                    break
        return step, training.averaged

    def _step(self, training: Training, stream: Ahead, validation_sets: list, begin: int, own: int, last: int) -> bool:
        """One step of a stage and what follows it: log, validation, checkpoint. Returns whether the run stops here."""
        stage, step = training.stage, begin + own
        with self.signals.held():
            result = train_step(training, self._batch(stream), self.parts, own, self.history)
            self._keep_bad(result, step)
            if self.log:
                self.log.step(step, stage.at(own).batch, result, self.history.skipped)
                if own % PICTURE_EVERY == 0:
                    self.log.picture(step, *result.shown)
        if self.log and validation_sets and ((own + 1) % stage.validate_every == 0 or own + 1 == stage.steps):
            self._validate(training, validation_sets, step, self.log)
        with self.signals.held():
            late = self.options.minutes is not None and time.monotonic() - self.began > 60 * self.options.minutes
            stop = self.team.any(late or self.signals.caught is not None)
            skipped = self.history.skipped_in_a_row  # the last good checkpoint stays
            ends = stop or own + 1 == last
            due = skipped < 2 if ends else (own + 1) % self.options.checkpoint_every == 0 and not skipped
            if self.log and due:
                self._save(training, begin, own + 1)
        return stop

    def _batches(self, number: int, stage: Stage, first: int, last: int) -> Ahead:
        """The parts of the stage's batches that are this process's."""
        rank, world, device = self.team.rank, self.team.world, self.team.device
        textures = self.textures
        if not stage.sources and device.type != "cpu":  # a GPU makes the pairs itself, faster than processes could
            textures = textures.to(device)
        feed = Feed(stage, 1_009 * self.seed + number, self.parts, textures, self.root)
        few = min(8, (os.cpu_count() or 1) // world) if feed.sources else 1
        workers = few if self.options.workers is None else self.options.workers
        if not feed.sources and device.type != "cpu":
            workers = 0
        return batches(feed, first, last, range(rank, self.parts, world), workers=workers)

    def _batch(self, stream: Ahead) -> Iterator[Sample]:
        """The next batch, part by part, on the device."""
        for _ in range(self.team.rank, self.parts, self.team.world):
            yield Sample(*(tensor.to(self.team.device, non_blocking=True) for tensor in next(stream)))

    def _errors(self, training: Training, validation_sets: list[tuple[Source, Files]]) -> dict[str, float]:
        """The errors of the averaged weights on validation pairs, means by set, then of the sets."""
        tables = []
        for source, files in validation_sets:
            model = fit_for(copy.deepcopy(training.averaged), dataset_of(source))
            tables.append(evaluate(Predictor(model, device=str(self.team.device)), files)["mean of sets"])
        return {key: fmean(table[key] for table in tables) for key in ("epe", "out3", "fl")}

    def _validate(self, training: Training, validation_sets: list[tuple[Source, Files]], step: int, log: Log) -> None:
        score = self._errors(training, validation_sets)
        log.validation(step, score)
        if self.best and score["epe"] < self.best.epe:
            state = copy.deepcopy(training.averaged.state_dict())
            self.best = Best(self.best.start, score["epe"], step + 1, state)

    def _save(self, training: Training, begin: int, own: int) -> None:
        """Writes the checkpoint, then the weights: what is missing of these is written when the run is resumed."""
        Checkpoint(
            run=vars(self.run),
            step=begin + own,
            skipped=self.history.skipped,
            recent=[list(row) for row in self.history.recent],
            random=torch.get_rng_state(),
            model=training.model.state_dict(),
            average=training.average.state_dict(),
            scaler=training.scaler.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in training.optimizers],
            best=vars(self.best) if self.best else None,
        ).save(self.checkpoint)
        self._write_weights(training.averaged, training.stage, begin, begin + own)

    def _write_weights(
        self, model: nn.Module, stage: Stage, begin: int, step: int, *, only_missing: bool = False
    ) -> None:
        """Writes the weights of a step, under the name of the stage, too, where this is its last one."""
        if self.team.rank:
            return
        about = header(self.run, self.plan, stage, step, step - begin)
        if self.best:
            model = copy.deepcopy(model)
            self._restore(partial(model.load_state_dict, self.best.weights))
            about = {**about, "step": self.best.step, "validation_epe": self.best.epe, "start_epe": self.best.start}
        names = ["weights"]
        names += [stage.name] if step == begin + stage.steps and len(self.plan.stages) > 1 else []
        for name in names:
            path = self.options.folder / f"{name}.safetensors"
            if not (only_missing and disk.is_written(path, about["step"])):
                weights.save(model, path, about)

    def _keep_bad(self, result: StepResult, step: int) -> None:
        """Stores the worst part of a batch whose loss was no number or exploded; ends the run at the limit."""
        if not result.bad:
            return
        folder = self.options.folder
        path, saved = folder / f"bad_batch-{self.team.rank}.pt", folder / "weights.safetensors"
        loss, sample = result.worst
        tensors = {name: tensor for name, tensor in sample._asdict().items() if tensor is not None}
        write_atomically(path, partial(disk.save_archive, {"step": step, "loss": loss, **tensors}))
        if self.history.skipped >= BAD_STEPS:
            start = f" with --start NETWORK:{saved}" if saved.exists() else ""
            raise FleetflowError(
                f"{self.history.skipped} steps had a loss that is not a number or exploded, the last at step {step} "
                f"(its batch is in {path}); begin another --folder{start} and a lower learning rate"
            )

    def _restore(self, restore) -> None:
        """Calls a function that takes over a part of the checkpoint; raises FleetflowError where it does not fit."""
        try:
            restore()
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise disk.damaged(self.checkpoint, reason(error)[:80]) from None

    def _initial_model(self, number: int, stage: Stage, *, earlier: nn.Module | None) -> FlowModel:
        """The network of a stage as its training begins; raises FleetflowError where the checkpoint is of another."""
        given = self.run.start if number == 0 and (stage.grow or not self.state) else ()
        resumed = self.state is not None
        model = initial_model(stage, self.plan, self.seed, earlier=earlier, start=given, resumed=resumed)
        begin = sum(other.steps for other in self.plan.stages[:number])
        reached = self.state and begin < self.state.step <= begin + stage.steps
        if self.state and reached and weights.differences(model, self.state.model):
            raise FleetflowError(
                f"{self.checkpoint} is not of stage {stage.name}; give the --stage and --set of its run"
            )
        return model.to(self.team.device)

    def _end(self, step: int) -> Outcome:
        """Closes the log, waits for the other processes, and says what was reached."""
        self.close()
        self.team.wait()
        if self.signals.caught is not None:
            self.signals.end(self.signals.caught)
        recent = self.history.recent
        epe = fmean(row[1] for row in recent) if recent else math.nan
        folder = self.options.folder
        return Outcome(step, self.plan.steps, epe, folder / "weights.safetensors", self.checkpoint, self.best)

    def close(self) -> None:
        """Closes the log."""
        if self.log:
            self.log.close()
            self.log = None
