"""Predict: from pictures, folders and videos to flow."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from fleetflow.graphs import Graphed
from fleetflow.io import list_frames, read_image, write_atomically, write_flow, write_image
from fleetflow.layers.fused import available, fuse
from fleetflow.models.base import FlowModel
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Prediction
from fleetflow.video import VideoReader, VideoWriter, join_videos
from fleetflow.visualise import flow_to_color, robust_scale, side_by_side, with_legend

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; "auto" takes a GPU where there is one. Raises FleetflowError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise FleetflowError(f'device "{name}" cannot be used ({reason}); use "auto" or "cpu"') from None
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the convolutions; "auto" takes bfloat16 where the processor or GPU has units for it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device.type == "cpu" and (
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
        precision = "bf16" if fast else "fp32"
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in known:
        raise FleetflowError(f'precision is "{precision}"; expected auto, fp32, bf16 or fp16')
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise FleetflowError("this processor has no float16 convolutions; use --precision auto, bf16 or fp32")
    return known[precision]


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which convolutions run in `dtype`; for float32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Predictor:
    """A network ready to predict on numpy pictures: device, precision and memory layout chosen once."""

    def __init__(self, model: FlowModel, *, device: str = "auto", precision: Precision = "auto"):
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        model = model.eval().to(self.device, memory_format=torch.channels_last)
        self.model = _ready(model, self.device, self.dtype)
        self._run = Graphed(self.model) if self.device.type == "cuda" else self.model

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Returns the flow from image1 to image2, float32 [H, W, 2] pixels.

        image1, image2: uint8 [H, W, 3] RGB (gray [H, W] and RGBA work too) of one size, from 1x1 up.
        """
        return self.predict(image1, image2).flow[0].permute(1, 2, 0).float().cpu().numpy()

    def predict(
        self, image1: np.ndarray, image2: np.ndarray, previous: Prediction | None = None, steps: int | None = None
    ) -> Prediction:
        """Returns all the network has to say about the pair, as tensors of a batch of one on the device."""
        frame1, frame2 = self._frame(image1, "image1"), self._frame(image2, "image2")
        if frame1.shape != frame2.shape:
            sizes = " and ".join(f"{frame.shape[2]}x{frame.shape[3]}" for frame in (frame1, frame2))
            raise FleetflowError(f"the images are {sizes}; both must have the same size: crop or resize one")
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return self._run(frame1, frame2, previous, steps)

    def _frame(self, image: np.ndarray, name: str) -> torch.Tensor:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        frame = torch.from_numpy(np.ascontiguousarray(image[..., :3])).to(self.device)[None]
        return frame.permute(0, 3, 1, 2).float().div_(255)  # channels-last in memory, as the picture was


def _ready(model: FlowModel, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The model, or a copy whose convolutions hold their weights in `dtype` (and on the CPU packed and fused)."""
    fused = device.type == "cpu" and available()
    if not fused and dtype == torch.float32:
        return model
    model = copy.deepcopy(model)
    if fused:
        fuse(model, dtype)
    for layer in model.modules():
        if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
            layer.to(dtype)
    return model


# ---- jobs: pairs, folders, videos ----

# How each format of --format is named; {} is the name of the first frame without its suffix.
FORMATS = {
    "flo": "{}.flo",
    "kitti": "{}_kitti.png",
    "npy": "{}.npy",
    "npz": "{}.npz",
    "pfm": "{}.pfm",
    "flo5": "{}.flo5",
    "color": "{}_color.png",
    "side": "{}_side.png",
}
PICTURES = ("color", "side")  # of a video these become one mp4 each
PART_FRAMES = 200  # frames in a part of an unfinished video: what an interrupted run loses at most
SCOUTS = 12  # pairs of a video or folder that are looked at first, to choose its colour scale


class Progress(NamedTuple):
    """How far a job is: pairs done, pairs in all (None where a video does not say)."""

    done: int
    total: int | None


def predict_pair(predictor: Predictor, first: Path, second: Path, output: Path, formats: Sequence[str]) -> list[Path]:
    """Predicts the flow between two pictures and writes it; returns the files written.

    output: a file, whose suffix is then one of `io.read_flow`'s or .png for a colour picture (and `formats` is not
    used); or a folder, into which each format is written under the name of the first picture.
    """
    image1, image2 = read_image(first), read_image(second)
    name, formats = first.stem, _known(formats)
    if output.suffix and not output.is_dir():
        flow = predictor(image1, image2)
        if output.suffix == ".png":
            write_image(output, _picture("color", image1, flow, robust_scale(flow)))
        else:
            write_flow(output, flow)
        return [output]
    flow = predictor(image1, image2)
    return _write(output, name, image1, flow, formats, robust_scale(flow))


def predict_folder(
    predictor: Predictor,
    folder: Path,
    output: Path,
    formats: Sequence[str],
    *,
    scale: float | None = None,
    again: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Path]:
    """Predicts the flow from each picture of a folder to the next; returns the files there now.

    Files that a former run has written are kept and not computed again, unless `again`.
    scale: pixels at full colour; None chooses one for the whole folder from a few of its pairs.
    """
    frames, formats = list_frames(folder), _known(formats)
    if len(frames) < 2:
        raise FleetflowError(f"{folder} holds {len(frames)} picture; a flow needs two: add frames")
    pairs = list(zip(frames, frames[1:]))
    written: list[Path] = []
    if scale is None and set(formats) & set(PICTURES):
        chosen = pairs[:: max(1, len(pairs) // SCOUTS)]
        scale = max(robust_scale(predictor(read_image(first), read_image(second))) for first, second in chosen)
    for k, (first, second) in enumerate(pairs):
        missing = [kind for kind in formats if again or not (output / FORMATS[kind].format(first.stem)).exists()]
        if missing:
            image = read_image(first)
            _write(output, first.stem, image, predictor(image, read_image(second)), missing, scale or 1.0)
        written += [output / FORMATS[kind].format(first.stem) for kind in formats]
        progress(Progress(k + 1, len(pairs)))
    return written


def predict_video(
    predictor: Predictor,
    video: Path,
    output: Path,
    formats: Sequence[str],
    *,
    scale: float | None = None,
    again: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[list[Path], str | None]:
    """Predicts the flow between consecutive frames of a video; memory does not grow with its length.

    Pictures become one mp4 for each kind, OUTPUT/NAME_color.mp4, with one colour scale for the whole clip; other
    formats one numbered file a pair. The work is done in parts of 200 pairs, kept in OUTPUT/NAME.parts until the end:
    an interrupted run continues behind the last whole part, unless `again` or it was asked for something else.
    Returns the files, and what is wrong with the video if it ends too early.
    """
    with VideoReader(video):  # raises before anything is written
        pass
    formats = _known(formats)
    films = [kind for kind in formats if kind in PICTURES]
    parts = output / f"{video.stem}.parts"
    request = {"formats": list(formats), "scale": scale, "bytes": video.stat().st_size}
    note = parts / "request.json"
    if again or (parts.exists() and (not note.exists() or json.loads(note.read_text())["request"] != request)):
        shutil.rmtree(parts, ignore_errors=True)
    if note.exists():
        scale = json.loads(note.read_text())["scale"]
    else:
        if scale is None:
            scale = _clip_scale(predictor, video) if films else 1.0
        text = json.dumps({"request": request, "scale": scale})
        write_atomically(note, lambda path: path.write_text(text))

    whole = len(list(parts.glob("*.done")))
    written: list[Path] = []
    with VideoReader(video, start=whole * PART_FRAMES) as reader:
        total = reader.frames and max(reader.frames - 1, 1)
        pairs = enumerate(pairwise(reader), whole * PART_FRAMES)
        for part in count(whole):
            batch = islice(pairs, PART_FRAMES)
            first = next(batch, None)
            if first is None:
                break
            with ExitStack() as stack:
                writers = {
                    kind: stack.enter_context(VideoWriter(parts / f"{part:05d}_{kind}.mp4", reader.fps))
                    for kind in films
                }
                for k, (image1, image2) in chain((first,), batch):
                    flow = predictor(image1, image2)
                    for kind, writer in writers.items():
                        writer.write(_picture(kind, image1, flow, scale))
                    others = [kind for kind in formats if kind not in PICTURES]
                    _write(output, f"{video.stem}_{k:06d}", image1, flow, others, scale)
                    progress(Progress(k + 1, total))
            write_atomically(parts / f"{part:05d}.done", lambda path: path.write_text(""))
        problem = reader.problem
    if not list(parts.glob("*.done")):
        shutil.rmtree(parts)
        raise FleetflowError(f"{video} has one frame only; a flow needs two: give a longer video")
    for kind in films:
        film = output / f"{video.stem}_{kind}.mp4"
        join_videos(sorted(parts.glob(f"*_{kind}.mp4")), film)
        written.append(film)
    for kind in formats:
        if kind not in PICTURES:
            written += sorted(output.glob(FORMATS[kind].format(f"{video.stem}_[0-9][0-9][0-9][0-9][0-9][0-9]")))
    shutil.rmtree(parts)
    return written, problem


def _clip_scale(predictor: Predictor, video: Path) -> float:
    """The colour scale for a whole clip, from a few pairs spread over it."""
    with VideoReader(video) as reader:
        every = max(1, (reader.frames or 25 * SCOUTS) // SCOUTS)
        return max(
            (robust_scale(predictor(*pair)) for k, pair in enumerate(pairwise(reader)) if k % every == 0), default=1.0
        )


def _known(formats: Sequence[str]) -> Sequence[str]:
    """The formats, each once; raises FleetflowError for an unknown one."""
    for kind in formats:
        if kind not in FORMATS:
            raise unknown("format", kind, sorted(FORMATS))
    return list(dict.fromkeys(formats))


def _write(
    folder: Path, name: str, image: np.ndarray, flow: np.ndarray, formats: Sequence[str], scale: float
) -> list[Path]:
    """Writes one flow in each format; returns the files."""
    written = []
    for kind in formats:
        path = folder / FORMATS[kind].format(name)
        if kind in PICTURES:
            write_image(path, _picture(kind, image, flow, scale))
        else:
            write_flow(path, flow)
        written.append(path)
    return written


def _picture(kind: str, image: np.ndarray, flow: np.ndarray, scale: float) -> np.ndarray:
    picture = with_legend(flow_to_color(flow, scale), scale)
    return side_by_side(image, picture) if kind == "side" else picture
