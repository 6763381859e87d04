"""Adapt: a network learns from the frames of a video alone, without truth, and is never given back worse.

One network teaches itself, or two teach each other (MDFlow). The last fifth of the pairs is not learned from: there the
warping error is measured, the best weights are chosen, and a collapse to zero flow is seen.
"""

import copy
import math
import time
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
from fleetflow.inference.device import Precision, autocast, choose_device, choose_dtype
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import reason, write_atomically
from fleetflow.io.images import list_frames, read_image
from fleetflow.io.video import VideoReader
from fleetflow.models import weights
from fleetflow.ops.warp import pixel_grid, warp
from fleetflow.training.loop import BAD_STEPS, expect
from fleetflow.training.optimizers import optimizers
from fleetflow.training.schedules import warm_flat_cool
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


def read_pairs(source: Path) -> Pairs:
    """Returns consecutive frames of a video, or of the pictures of a folder, two by two; a long one evenly thinned.

    Raises FleetflowError for fewer than three frames and for frames of different sizes.
    """
    if source.is_dir():
        paths = list_frames(source)
        total, frames = len(paths), map(read_image, paths)
        bytes_each = read_image(paths[0]).nbytes
    else:
        reader = VideoReader(source)
        total, frames = reader.frames or 0, iter(reader)
        bytes_each = reader.height * reader.width * 3
    most = max(3, MEMORY // (2 * bytes_each))
    every = 1 if total * bytes_each < MEMORY else math.ceil(total / most)
    pairs: Pairs = []
    for k, (image1, image2) in enumerate(pairwise(frames)):
        if image1.shape != image2.shape:
            raise FleetflowError(f"{source}: frame {k + 1} is of another size than the one before; crop or resize it")
        if k % every == 0 and len(pairs) < 2 * most:
            pairs.append((image1, image2))
    if len(pairs) < 2:
        raise FleetflowError(f"{source} has {len(pairs)} pairs of frames; adapting needs three frames at least")
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
    """Fine-tunes a network on pairs without truth; returns its outcome, and that of the other network if there is one.

    pairs: from `read_pairs`. output: the .safetensors file of the best weights; it is there, whole, from the first
    measurement on. Those of `other` lie beside it, as STEM-other.safetensors.
    start, other: as `fleetflow.load` takes them; with `other` each learns what the other is sure of.
    name: of the frames, for the header. size: height and width of the crops, at most that of the frames.
    learning_rate: of Muon (`optimize.optimizers`). order: of the smoothness, 1 or 2. measure_every: steps.
    An interrupted run leaves STEM-unfinished.pt beside the output; the same call goes on from there, exactly.
    Raises FleetflowError where the output is there already, and after too many steps without a finite loss.
    """
    if output.suffix != ".safetensors":
        raise FleetflowError(f"{output} does not end in .safetensors; name the output so")
    expect(
        ("steps", steps, 0), ("batch", batch, 1), ("size", min(size), 1), ("learning-rate", learning_rate, 1e-12),
        ("measure-every", measure_every, 1), ("seed", seed, 0), ("threads", threads, 0),
    )  # fmt: skip
    checkpoint = output.with_name(f"{output.stem}-unfinished.pt")
    places = [output, output.with_name(f"{output.stem}-other.safetensors")][: 2 if other else 1]
    taken = [place for place in places if place.exists()]
    if taken and not checkpoint.exists():
        raise FleetflowError(f"{taken[0]} is there already; choose another output or delete it")
    where = choose_device(device)
    dtype = choose_dtype(precision, where)
    if dtype == torch.float16:
        raise FleetflowError("adapting in fp16 is not possible; use bf16 or fp32")
    if threads:
        torch.set_num_threads(threads)
    learned, held = split(pairs)
    held = held[:: math.ceil(len(held) / MEASURED)]
    names = [start] + ([other] if other else [])
    about = {"recipe": "adapt", "frames": name, "pairs": len(learned), "steps": steps}
    students = [_Student(*both, about, learning_rate, where) for both in zip(names, places, strict=True)]
    request = [names, name, len(pairs), steps, batch, list(size), learning_rate, occlusion, order, seed]
    for student in students:
        student.begin(held)
    first = bad = 0
    if output.exists():
        state = _left(checkpoint, where)
        if state["request"] != request:
            raise FleetflowError(f"{checkpoint} is of a run that was asked for something else; delete it to begin anew")
        first, bad = state["step"], state["bad"]
        for student, saved in zip(students, state["students"], strict=True):
            student.restore(saved)
    else:
        for student in students:
            student.keep(0, student.start)
        _interruptible(checkpoint, request, 0, 0, students)

    began = time.monotonic()
    stopped = None
    for step in range(first, steps):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63)
        frame1, frame2 = (frames.to(where) for frames in _batch(learned, batch, size, students, generator))
        both = torch.cat((frame1, frame2)), torch.cat((frame2, frame1))  # there and back
        with autocast(where, dtype):
            flows = [student.model(*both).flow.float() for student in students]
        for k, student in enumerate(students):
            teacher = flows[k - 1].detach()  # the other network, or itself
            loss = _match(*both, flows[k], occlusion, order)
            trust = confidence(teacher, teacher.roll(batch, 0))
            *view, taught, trust = _another_view(frame1, frame2, teacher[:batch], trust[:batch], generator)
            with autocast(where, dtype):
                again = student.model(*view).flow.float()
            loss = loss + TEACH * distillation(again, taught, trust)
            if not student.learn(loss, warm_flat_cool(step, steps, warmup=10, cooldown=0.5)):
                bad += 1
        if bad >= BAD_STEPS:
            raise FleetflowError(f"{bad} steps had a loss that is not a number; lower the learning rate")
        if (step + 1) % measure_every and step + 1 < steps:
            continue
        left = (time.monotonic() - began) / (step + 1 - first) * (steps - step - 1)
        for student in students:
            error = student.measure(held)
            report(
                f"step {step + 1}/{steps}  {student.network}  held back: census {error.census:.3f} % "
                f"(start {student.start.census:.3f})  L1 {error.l1:.3f} ({student.start.l1:.3f})  "
                f"flow {error.length:.2f} px ({student.start.length:.2f})  {int(left // 60)}:{int(left % 60):02d} left"
            )
            if error.census < student.best.census and error.l1 <= student.start.l1:
                student.keep(step + 1, error)
            stopped = stopped or verdict(student.start, error)
        if stopped:
            report(f"stopped at step {step + 1}: {stopped}")
            break
        _interruptible(checkpoint, request, step + 1, bad, students)
    checkpoint.unlink(missing_ok=True)
    return [Outcome(s.network, s.output, s.start, s.best, s.step, stopped) for s in students]


def verdict(start: WarpingError, now: WarpingError) -> str | None:
    """Returns why a run must end, or None: its flow collapsed to zero, or its warping error went far up."""
    if now.length < SHRUNK * start.length and now.census >= start.census:
        return f"the flow collapsed towards zero, from {start.length:.2f} to {now.length:.2f} px"
    if not now.census <= LOST * start.census:
        return f"the held-back census error went from {start.census:.3f} to {now.census:.3f} %"
    return None


class _Student:
    """A network that is adapted: its weights, their average (measured and saved), optimizers, and the best so far."""

    def __init__(self, name: str, output: Path, about: dict[str, object], learning_rate: float, where: torch.device):
        self.output, self.where = output, where
        # Always in evaluation mode, so that normalization keeps its statistics.
        self.model = weights.load(name).to(where, memory_format=torch.channels_last)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
        self.updates = optimizers(self.model, learning_rate, 0.0)
        self.rates = [[group["lr"] for group in update.param_groups] for update in self.updates]
        variant, _, path = name.partition(":")
        file = Path(variant if variant.endswith(".safetensors") else path or weights.shipped(variant))
        origin = weights.header(file) if file.suffix == ".safetensors" else {}
        self.network = origin.get("network", variant)
        license = f"{origin.get('license', 'unknown')}; adapted to {about['frames']}, whose own terms may bind"
        self.about = {"network": self.network, "arguments": {}, **about, "from": name, "license": license}

    def begin(self, held: Pairs) -> None:
        """Measures the start; its visible pixels are those that all later weights are measured on."""
        self.masks = visible_pixels(self._predictor(), held)
        self.start = self.measure(held)

    def _predictor(self) -> Predictor:
        """The averaged weights as they are saved, in half precision, ready to predict in float32."""
        model = copy.deepcopy(self.average.module).half().float()
        return Predictor(model, device=str(self.where), precision="fp32")

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
        length = nn.utils.clip_grad_norm_(self.model.parameters(), 20.0)
        good = math.isfinite(length.item() + loss.item())
        for update, bases in zip(self.updates, self.rates, strict=True):
            for group, base in zip(update.param_groups, bases, strict=True):
                group["lr"] = base * factor
            if good:
                update.step()
            update.zero_grad(set_to_none=True)
        if good:
            self.average.update_parameters(self.model)
        return good

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [update.state_dict() for update in self.updates],
            "step": self.step,
            "best": list(self.best),
        }

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for update, state in zip(self.updates, saved["optimizers"], strict=True):
            update.load_state_dict(state)
        self.step, self.best = saved["step"], WarpingError(*saved["best"])


def _interruptible(checkpoint: Path, request: list, step: int, bad: int, students: list[_Student]) -> None:
    state = {"request": request, "step": step, "bad": bad, "students": [student.state() for student in students]}
    write_atomically(checkpoint, partial(torch.save, state))


def _left(checkpoint: Path, where: torch.device) -> dict:
    """What an interrupted run left; raises FleetflowError where it is damaged or something else."""
    try:
        state = torch.load(checkpoint, map_location=where, weights_only=True)
        lacks = [f"it has no {key}" for key in ("request", "step", "bad", "students") if key not in state]
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, OSError, ...
        lacks = [reason(error)[:80]]
    if lacks:
        raise FleetflowError(f"{checkpoint} is damaged ({lacks[0]}); delete it and the output to begin anew")
    return state


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
