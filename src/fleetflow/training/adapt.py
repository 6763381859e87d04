"""Adapt: a network learns from the frames of a video alone, without truth, and is never given back worse.

One network teaches itself, or two teach each other (MDFlow). The last fifth of the pairs is not learned from: there the
warping error is measured, the best weights are chosen, and a collapse to zero flow is seen.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fleetflow.data.dataset import to_frame
from fleetflow.data.generate.camera import draw_camera, film
from fleetflow.inference.device import Precision, autocast, choose_device, choose_dtype, use_threads
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import lock_folder, reason, remove_leftovers, write_atomically
from fleetflow.io.images import list_frames, read_image
from fleetflow.io.video import VideoReader
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.models.spec import ModelSpec
from fleetflow.ops.warp import pixel_grid, warp
from fleetflow.training.checkpoint import read_archive, save_archive
from fleetflow.training.optimizers import optimizers
from fleetflow.training.schedules import warm_flat_cool
from fleetflow.training.start import expect
from fleetflow.training.step import BAD_STEPS, check_sizes
from fleetflow.training.unsupervised import (
    Occlusion,
    census_distance,
    confidence,
    distillation,
    photometric,
    smoothness,
    visible,
)
from fleetflow.types import FleetflowError

Pairs = list[tuple[np.ndarray, np.ndarray]]  # uint8 [H, W, 3] RGB, all of one size

HELD_BACK = 0.2  # share of the pairs, the last ones
MEASURED = 12  # held-back pairs that are measured, at most
MEMORY = 2**30  # bytes of frames kept; of longer clips pairs are taken evenly
SMOOTH, TEACH = 0.5, 0.1  # weights of smoothness and distillation beside the census loss
SHRUNK = 0.5  # a flow that has less than this share of its length at the start, and matches no better, collapsed
LOST = 1.5  # a warping error so many times that of the start ends the run
EMA = 0.97


class WarpingError(NamedTuple):
    """How well frame2, brought back by the flow, agrees with frame1: means over pixels, then over pairs."""

    census: float  # percentage of neighbors in another order (`unsupervised.census_distance`)
    l1: float  # mean difference in gray levels of 255
    length: float  # mean length of the flow in pixels, over all pixels


class Outcome(NamedTuple):
    """What became of one network: the errors of its start and of the weights written, on the same pixels."""

    network: str
    weights: Path
    start: WarpingError
    best: WarpingError
    step: int  # of the weights written; 0: nothing was better than the start
    stopped: str | None  # why the run ended early


def read_pairs(source: Path, report: Callable[[str], object] = print) -> Pairs:
    """Returns consecutive frames of a video, or of the pictures of a folder, two by two; a long one evenly thinned.

    Args:
        source: the video or folder.
        report: is given a line on what is wrong with a video that is damaged; what could be read is returned.

    Raises:
        FleetflowError: For fewer than three frames and for frames of different sizes.
    """
    reader = None if source.is_dir() else VideoReader(source)
    if reader is None:
        paths = list_frames(source)
        total, frames = len(paths), map(read_image, paths)
        bytes_each = read_image(paths[0]).nbytes
    else:
        total, frames = reader.counted() or 0, iter(reader)
        bytes_each = reader.height * reader.width * 3
    most = max(3, MEMORY // (2 * bytes_each))
    every = 1 if total * bytes_each < MEMORY else math.ceil(total / most)
    pairs: Pairs = []
    for k, (image1, image2) in enumerate(pairwise(frames)):
        if image1.shape != image2.shape:
            raise FleetflowError(f"{source}: frame {k + 1} is of another size than the one before; crop or resize it")
        if k % every == 0 and len(pairs) < 2 * most:
            pairs.append((image1, image2))
    problem = None if reader is None else reader.problem
    if len(pairs) < 2:
        few = f"{source} has {len(pairs)} pairs of frames; adapting needs three frames at least"
        raise FleetflowError(problem or few)
    if problem:
        report(problem)
    return pairs


def split(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Returns the pairs to learn from and the held-back ones: the last fifth, at least one."""
    held = max(1, round(HELD_BACK * len(pairs)))
    return pairs[:-held], pairs[-held:]


def visible_pixels(predictor: Predictor, pairs: Pairs) -> list[Tensor]:
    """Returns for each pair bool [1, H, W]: where flow there and flow back agree, for `warping_error`."""
    return [visible(predictor.predict(a, b).flow.float(), predictor.predict(b, a).flow.float()) for a, b in pairs]


def warping_error(predictor: Predictor, pairs: Pairs, masks: list[Tensor]) -> WarpingError:
    """Returns the warping error over the pixels of the masks, which must be the same for networks to be compared."""
    rows = []
    for (image1, image2), mask in zip(pairs, masks, strict=True):
        flow = predictor.predict(image1, image2).flow.float()
        frame1, frame2 = (to_frame(image)[None].to(flow.device) for image in (image1, image2))
        back = warp(frame2, flow)
        both = torch.stack((100 * census_distance(frame1, back), 255 * (frame1 - back).abs().mean(1)))
        seen = mask.sum().clamp(min=1)
        rows.append(((both * mask).sum((1, 2, 3)) / seen).tolist() + [flow.square().sum(1).sqrt().mean().item()])
    return WarpingError(*(sum(column) / len(rows) for column in zip(*rows)))


@dataclass(frozen=True)
class Request:
    """What is asked of a run and decides its numbers; an interrupted run may not differ from it."""

    networks: tuple[str, ...]
    frames: str
    pairs: int
    steps: int
    batch: int
    size: tuple[int, int]
    learning_rate: float
    occlusion: Occlusion
    order: int
    seed: int


def adapt(
    pairs: Pairs,
    output: Path,
    *,
    start: str = "fastflownet",
    other: str | None = None,
    name: str = "frames",
    steps: int = 300,
    batch: int = 2,
    size: tuple[int, int] = (256, 448),
    learning_rate: float = 0.002,
    occlusion: Occlusion = "consistency",
    order: int = 1,
    measure_every: int = 25,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    report=print,
) -> list[Outcome]:
    """Fine-tunes a network on pairs without truth.

    An interrupted run leaves STEM-unfinished.pt beside the output; the same call goes on from there, exactly.

    Args:
        pairs: from `read_pairs`.
        output: the .safetensors file of the best weights; it is there, whole, from the first measurement on. Those of
            `other` lie beside it, as STEM-other.safetensors.
        start: the network, as `fleetflow.load` takes it.
        other: a second network; each learns what the other is sure of.
        name: of the frames, for the header.
        steps: of training.
        batch: pairs in a step.
        size: height and width of the crops, at most that of the frames.
        learning_rate: of Muon (`optimizers.optimizers`).
        occlusion: how hidden pixels are found (`unsupervised.visible`).
        order: of the smoothness, 1 or 2.
        measure_every: steps.
        seed: of crops and views.
        device: "auto", "cpu", "cuda", ...
        precision: of the convolutions in training; all measuring is in float32.
        threads: 0 takes as many as torch does.
        report: is given each line on how the run goes.

    Returns:
        The outcome of the network, and that of the other one if there is one.

    Raises:
        FleetflowError: the output is there already, or too many steps had no finite loss.
    """
    if output.suffix != ".safetensors":
        raise FleetflowError(f"{output} does not end in .safetensors; name the output so")
    expect(
        ("steps", steps, 0), ("batch", batch, 1), ("size", min(size), 1), ("learning-rate", learning_rate, 1e-12),
        ("measure-every", measure_every, 1), ("seed", seed, 0),
    )  # fmt: skip
    use_threads(threads)
    networks = (start, other) if other else (start,)
    request = Request(
        networks, name, len(pairs), steps, batch, (size[0], size[1]), learning_rate, occlusion, order, seed
    )
    with lock_folder(output.parent, f"adapt {name}"):
        remove_leftovers(output.parent)
        run = _Adaptation(request, pairs, output, choose_device(device), precision)
        return run.finish(measure_every, report)


class _Adaptation:
    """A run: the networks that learn, the pairs they learn from, and the pairs on which they are measured."""

    def __init__(self, request: Request, pairs: Pairs, output: Path, device: torch.device, precision: Precision):
        self.request, self.device = request, device
        self.dtype = choose_dtype(precision, device)
        if self.dtype == torch.float16:
            raise FleetflowError("adapting in fp16 is not possible; use bf16 or fp32")
        self.checkpoint = output.with_name(f"{output.stem}-unfinished.pt")
        places = [output, output.with_name(f"{output.stem}-other.safetensors")][: len(request.networks)]
        begun = self.checkpoint.exists()
        for place in places:
            if place.exists() and not (begun and _is_adapted(place)):
                raise FleetflowError(f"{place} is there already; choose another output or delete it")
        self.learned, held = split(pairs)
        self.held = held[:: math.ceil(len(held) / MEASURED)]
        about = {"recipe": "adapt", "frames": request.frames, "pairs": len(self.learned), "steps": request.steps}
        both = zip(request.networks, places, strict=True)
        self.students = [_Student(name, place, about, request.learning_rate, device) for name, place in both]
        for student in self.students:
            student.begin(self.held)
        self.step = self.bad = 0
        if begun:
            self._restore()
        else:
            for student in self.students:
                student.step, student.best = 0, student.start
            self._save()  # first: it says that the files are ours
        for student in self.students:
            if not student.output.exists():
                student.keep(student.step, student.best)

    def finish(self, measure_every: int, report) -> list[Outcome]:
        """Trains to the last step, or until a network gets worse; returns what became of each network."""
        steps, began, first, stopped = self.request.steps, time.monotonic(), self.step, None
        while self.step < steps and not stopped:
            self._train_step()
            if self.step % measure_every and self.step < steps:
                continue
            left = (time.monotonic() - began) / (self.step - first) * (steps - self.step)
            stopped = self._measure(report, left)
            if stopped:
                report(f"stopped at step {self.step}: {stopped}")
            else:
                self._save()
        self.checkpoint.unlink(missing_ok=True)
        return [Outcome(s.network, s.output, s.start, s.best, s.step, stopped) for s in self.students]

    def _train_step(self) -> None:
        """One batch for each network: match the frames, smoothly, and agree with the teacher on another view."""
        request, step, device = self.request, self.step, self.device
        seed = (request.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        generator = torch.Generator().manual_seed(seed)
        frames = _batch(self.learned, request.batch, request.size, self.students, generator)
        frame1, frame2 = (each.to(device) for each in frames)
        both = torch.cat((frame1, frame2)), torch.cat((frame2, frame1))  # there and back
        with autocast(device, self.dtype):
            flows = [student.model(*both).flow.float() for student in self.students]
        for k, student in enumerate(self.students):
            teacher = flows[k - 1].detach()  # the other network, or itself
            loss = _match(*both, flows[k], request.occlusion, request.order)
            trust = confidence(teacher, teacher.roll(request.batch, 0))
            here = teacher[: request.batch], trust[: request.batch]
            *view, taught, trust = _another_view(frame1, frame2, *here, generator)
            with autocast(device, self.dtype):
                second = student.model(*view).flow.float()
            loss = loss + TEACH * distillation(second, taught, trust)
            if not student.learn(loss, warm_flat_cool(step, request.steps, warmup=10, cooldown=0.5)):
                self.bad += 1
        if self.bad >= BAD_STEPS:
            raise FleetflowError(f"{self.bad} steps had a loss that is not a number; lower the learning rate")
        self.step += 1

    def _measure(self, report, left: float) -> str | None:
        """Measures the networks on the held-back pairs and keeps what is better; returns why the run must end, if so."""
        stopped = None
        for student in self.students:
            error = student.measure(self.held)
            report(
                f"step {self.step}/{self.request.steps}  {student.network}  held back: census {error.census:.3f} % "
                f"(start {student.start.census:.3f})  L1 {error.l1:.3f} ({student.start.l1:.3f})  "
                f"flow {error.length:.2f} px ({student.start.length:.2f})  {int(left // 60)}:{int(left % 60):02d} left"
            )
            if error.census < student.best.census and error.l1 <= student.start.l1:
                student.keep(self.step, error)
            stopped = stopped or verdict(student.start, error)
        return stopped

    def _save(self) -> None:
        """Writes all that the run needs to go on."""
        students = [student.state() for student in self.students]
        state = {"request": vars(self.request), "step": self.step, "bad": self.bad, "students": students}
        write_atomically(self.checkpoint, partial(save_archive, state))

    def _restore(self) -> None:
        """Takes over what an interrupted run left; raises FleetflowError where it is damaged or of another request."""
        try:
            state = read_archive(self.checkpoint)
            same, self.step, self.bad = state["request"] == vars(self.request), int(state["step"]), int(state["bad"])
            if same:
                for student, saved in zip(self.students, state["students"], strict=True):
                    student.restore(saved)
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ...
            raise FleetflowError(
                f"{self.checkpoint} is damaged ({reason(error)[:80]}); delete it and the output to begin anew"
            ) from None
        if not same:
            raise FleetflowError(
                f"{self.checkpoint} is of a run that was asked for something else; delete it to begin anew"
            )


def _is_adapted(path: Path) -> bool:
    """Whether a file is what a run of ours wrote."""
    with suppress(FleetflowError):
        return weights.header(path).get("recipe") == "adapt"
    return False


def verdict(start: WarpingError, now: WarpingError) -> str | None:
    """Returns why a run must end, or None: its flow collapsed to zero, or its warping error went far up."""
    if now.length < SHRUNK * start.length and now.census >= start.census:
        return f"the flow collapsed towards zero, from {start.length:.2f} to {now.length:.2f} px"
    if not now.census <= LOST * start.census:
        return f"the held-back census error went from {start.census:.3f} to {now.census:.3f} %"
    return None


class _Student:
    """A network that is adapted: its weights, their average (measured and saved), optimizers, and the best so far."""

    def __init__(self, name: str, output: Path, about: dict[str, object], learning_rate: float, device: torch.device):
        self.output, self.device = output, device
        # Always in evaluation mode, so that normalization keeps its statistics.
        model = weights.load(name)
        self.model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
        self.optimizers = optimizers(self.model, learning_rate, 0.0)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        spec = ModelSpec.parse(name)
        file = spec.path or weights.shipped(spec.network)
        origin = weights.header(file) if weights.is_safetensors(file) else {}
        self.network = origin.get("network", spec.network)
        license = f"{origin.get('license', 'unknown')}; adapted to {about['frames']}, whose own terms may bind"
        self.about = {"network": self.network, "arguments": {}, **about, "from": name, "license": license}

    def begin(self, held: Pairs) -> None:
        """Measures the start; its visible pixels are those that all later weights are measured on."""
        self.masks = visible_pixels(self._predictor(), held)
        self.start = self.measure(held)

    def _predictor(self) -> Predictor:
        """The averaged weights as they are saved, in half precision, ready to predict in float32."""
        model = copy.deepcopy(self.average.module).half().float()
        assert isinstance(model, FlowModel)  # a copy of `self.model`
        return Predictor(model, device=str(self.device), precision="fp32")

    def measure(self, held: Pairs) -> WarpingError:
        return warping_error(self._predictor(), held, self.masks)

    def keep(self, step: int, error: WarpingError) -> None:
        """Writes the averaged weights, the best so far."""
        self.step, self.best = step, error
        scores = {"step": step, "held_back_start": self.start._asdict(), "held_back": error._asdict()}
        weights.save(self.average.module, self.output, {**self.about, **scores})

    def learn(self, loss: Tensor, factor: float) -> bool:
        """One step down the loss; returns False, and does nothing, where the loss or its gradient is no number."""
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 20.0)
        good = math.isfinite(grad_norm.item() + loss.item())
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            if good:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if good:
            self.average.update_parameters(self.model)
        return good

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "best": list(self.best),
        }

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            check_sizes(optimizer, state)
            optimizer.load_state_dict(state)
        self.step, self.best = int(saved["step"]), WarpingError(*map(float, saved["best"]))


def _batch(pairs: Pairs, count: int, size: tuple[int, int], students: list[_Student], generator: torch.Generator):
    """Both frames [count, 3, h, w] of random crops, half of them mirrored; h and w fit the networks where they can."""
    stride = math.lcm(*(student.model.stride for student in students))
    full = pairs[0][0].shape[:2]
    height, width = (min(want, have) // stride * stride or have for want, have in zip(size, full))
    rows = []
    for _ in range(count):
        k = int(torch.randint(len(pairs), (), generator=generator))
        top = int(torch.randint(full[0] - height + 1, (), generator=generator))
        left = int(torch.randint(full[1] - width + 1, (), generator=generator))
        frames = [to_frame(image[top : top + height, left : left + width]) for image in pairs[k]]
        mirrored = torch.rand((), generator=generator) < 0.5
        rows.append([frame.flip(-1) if mirrored else frame for frame in frames])
    return [torch.stack(frames) for frames in zip(*rows)]


def _match(frame1: Tensor, frame2: Tensor, flow: Tensor, occlusion: Occlusion, order: int) -> Tensor:
    """The loss of flows there (first half of the batch) and back (second half) without a teacher."""
    still = flow.detach()
    seen = visible(still, still.roll(len(flow) // 2, 0), occlusion)
    return photometric(frame1, frame2, flow, seen) + SMOOTH * smoothness(flow, frame1, order)


@torch.no_grad()
def _another_view(
    frame1: Tensor, frame2: Tensor, flow: Tensor, trust: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs enlarged, turned and moved, seen by another camera, with the flow and the trust that belong to them.

    The cut hides where border pixels go, and the camera makes matching harder: the teacher saw it better.
    """
    count, _, height, width = frame1.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    zoom, angle = uniform(1.0, 1.4), uniform(-0.15, 0.15)
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    matrix = torch.stack((cosine, -sine, sine, cosine), -1).view(count, 2, 2).to(flow)
    spare = (1 - 1 / zoom) / 2
    shift = torch.stack((uniform(-1, 1) * spare * width, uniform(-1, 1) * spare * height), -1).to(flow)
    center = flow.new_tensor(((width - 1) / 2, (height - 1) / 2))[:, None, None]
    grid = pixel_grid(height, width, flow)
    place = torch.einsum("nij,jhw->nihw", matrix, grid - center) + center + shift[:, :, None, None]
    move = place - grid
    flow = torch.einsum("nij,njhw->nihw", torch.linalg.inv(matrix), warp(flow, move))
    camera = draw_camera(len(frame1), 2, generator)
    view1, view2 = film([warp(frame1, move), warp(frame2, move)], camera, generator)
    return view1, view2, flow, warp(trust[:, None], move)[:, 0]
