"""The log of a training run: a line on the terminal with speed and time left, a JSON line per step, TensorBoard.

And what its weights say of themselves.
"""

import json
import math
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from fleetflow.io.atomic import reason, write_atomically, writing
from fleetflow.io.names import check_utf8
from fleetflow.training.checkpoint import Run
from fleetflow.training.recipe import Recipe, Stage
from fleetflow.training.step import StepResult
from fleetflow.types import Sample
from fleetflow.visualise import error_map, flow_to_color, robust_scale, side_by_side


class Log:
    """Writes FOLDER/log.jsonl, and TensorBoard events where it is installed; speaks every ten seconds."""

    def __init__(self, folder: Path, first: int, last: int, report):
        """Steps from `first` on are to be written, to before `last`; later lines of an interrupted run are dropped."""
        self.path = folder / "log.jsonl"
        kept = []
        if first and self.path.exists():
            kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step(line) < first]
        write_atomically(self.path, lambda part: part.write_text("".join(line + "\n" for line in kept)))
        self.file = self.path.open("a", buffering=1)
        self.first, self.last, self.report = first, last, report
        self.rows: list[dict[str, float]] = []
        self.samples, self.shown = 0, time.monotonic()
        self.began = self.shown
        self.silent: set[str] = set()  # weights with a gradient of zero that were spoken of
        self.board = _board(folder, first)
        if self.board is None:
            report('pictures and curves need TensorBoard: pip install "fleetflow[train]"; log.jsonl has the numbers')

    def step(self, step: int, samples: int, result: StepResult, skipped: int) -> None:
        """Writes the numbers of a step; those of one that was not learned from have no part in the means.

        Args:
            step: of the run, from 0.
            samples: pairs in the batch.
            result: of the step.
            skipped: steps of the run that were not learned from.
        """
        numbers = {key: getattr(result, key) for key in ("loss", "epe", "grad_norm", "learning_rate")}
        self._write({"step": step, **_plain({key: float(f"{value:.6g}") for key, value in numbers.items()})})
        if result.learned:
            self.rows.append(numbers)
        if new := [name for name in result.silent if name not in self.silent]:
            self.silent.update(new)
            rest = f" and {len(new) - 1} more weights" if len(new) > 1 else ""
            self.report(
                f"step {step + 1}  the gradient of {new[0]}{rest} is zero: that part of the network does not learn"
            )
        self.samples += samples
        now = time.monotonic()
        if now - self.shown < 10 and step + 1 < self.last:
            return
        finite = {key: [row[key] for row in self.rows if math.isfinite(row[key])] for key in numbers}
        mean = {key: fmean(values or [math.nan]) for key, values in finite.items()}
        for key, value in mean.items():
            self._plot(f"train/{key}", value, step)
        left = (now - self.began) / (step + 1 - self.first) * (self.last - step - 1)
        self.report(
            f"step {step + 1}/{self.last}  loss {mean['loss']:.3f}  EPE {mean['epe']:.2f} px  "
            f"{self.samples / (now - self.shown):.1f} samples/s  {int(left // 60)}:{int(left % 60):02d} left"
            + (f"  {skipped} steps skipped" if skipped else "")
        )
        self.rows, self.samples, self.shown = [], 0, now

    def validation(self, step: int, score: dict[str, float]) -> None:
        """Writes the errors of a validation, which follow the line of their step."""
        self._write({"step": step, "validation": _plain(score)})
        for key, value in score.items():
            self._plot(f"validation/{key}", value, step)
        self.report(f"step {step + 1}  validation EPE {score['epe']:.3f} px, over 3 px {score['out3']:.2f} %")

    def _write(self, row: dict[str, object]) -> None:
        with writing(self.path):
            self.file.write(json.dumps(row, allow_nan=False) + "\n")

    def _plot(self, name: str, value: float, step: int) -> None:
        with self._drawing():
            if self.board:
                self.board.add_scalar(name, value, step)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Where TensorBoard cannot write, the run goes on without it."""
        try:
            yield
        except OSError as error:
            self.board = None
            self.report(f"TensorBoard events cannot be written ({reason(error)}); log.jsonl has the numbers")

    def picture(self, step: int, sample: Sample, flow: Tensor) -> None:
        """Shows the first pair of a batch: frame1, true flow, predicted flow [N, 2, H, W], error."""
        if not self.board:
            return
        shown = (sample.frame1, sample.flow, flow)
        frame, truth, found = (t[0].detach().float().cpu().permute(1, 2, 0).numpy() for t in shown)
        valid = sample.valid[0].cpu().numpy()
        scale = robust_scale(truth)
        picture = side_by_side(
            (frame * 255).clip(0, 255).astype(np.uint8),
            flow_to_color(truth, scale),
            flow_to_color(found, scale),
            error_map(found, truth, valid=valid),
            titles=("frame 1", "true flow", "predicted flow", "error"),
        )
        with self._drawing():
            self.board.add_image("train/pair", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        with self._drawing():
            if self.board:
                self.board.close()
        with writing(self.path):
            self.file.close()


def _board(folder: Path, first: int):
    """What writes TensorBoard events, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    check_utf8(folder, "TensorBoard")
    threading.excepthook = _silent_writer
    with writing(folder):
        return SummaryWriter(str(folder), purge_step=first)


def _silent_writer(happened, hook=threading.excepthook) -> None:
    """Leaves out the traceback of TensorBoard's thread at a full disk: `Log` meets the same error, and says it."""
    if type(happened.thread).__name__ != "_AsyncWriterThread" or not isinstance(happened.exc_value, OSError):
        hook(happened)


def header(run: Run, plan: Recipe, stage: Stage, step: int, own: int) -> dict[str, Any]:
    """Returns what weights say of themselves, after `step` steps of the run, `own` of them in this stage."""
    before = plan.stages[: plan.stages.index(stage)]
    seen = sum(other.samples(other.steps) for other in before) + stage.samples(own)
    about = {
        "network": stage.network or plan.network,
        "arguments": {},
        "recipe": run.recipe,
        "stage": stage.name,
        "step": step,
        "samples": seen + (run.start_samples or 0),
        "commit": _commit(),
    }
    if run.start:
        about["start"] = ", ".join(one.partition(":")[0] for one in run.start)
    if stage.sources:
        data = run.data or ", ".join(source.folder for source in stage.sources)
        return {**about, "data": data, "license": "that of the data"}
    about["textures"] = "photographs" if run.textures else "procedural"
    others = [license for license in run.start_licenses or () if license != "Apache-2.0"]
    return {**about, "license": f"that of the start: {', '.join(others)}" if others else "Apache-2.0"}


def _commit() -> str:
    """The last commit of this package's own files, "unknown" where they are in no repository or git is not installed.

    A package that is installed inside a repository of others is no part of it.
    """
    here = Path(__file__).parents[1]
    try:
        git = subprocess.run(["git", "-C", here, "log", "-1", "--format=%h", "--", "."], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _plain(numbers: dict[str, float]) -> dict[str, float | None]:
    """The numbers as JSON can hold them: null for what is none."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def _step(line: str) -> float:
    """The step that a line of the log is of; infinite for half a line, with which a killed run may end."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
