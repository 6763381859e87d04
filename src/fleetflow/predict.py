"""Predict: from pictures, folders and videos to flow."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from itertools import chain, count, islice, pairwise, takewhile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from fleetflow.graphs import Graphed
from fleetflow.io import (
    IMAGE_SUFFIXES,
    list_frames,
    read_image,
    write_atomically,
    write_flow,
    write_image,
    writing,
)
from fleetflow.layers.fused import available, fuse
from fleetflow.memory import keep_freed
from fleetflow.models.base import FlowModel
from fleetflow.ops.kernels import is_reference
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Prediction
from fleetflow.video import VideoReader, VideoWriter, join_videos
from fleetflow.visualise import checked_scale, flow_to_color, robust_scale, side_by_side, with_legend

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; "auto" takes a GPU where there is one. Raises FleetflowError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
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
    """A network ready to predict on numpy pictures: device, precision and memory layout chosen once.

    steps: refinement steps, for networks that refine; None takes the network's own.
    On the CPU the process keeps up to 1 GiB of freed memory from then on (`fleetflow.memory`).
    """

    def __init__(
        self, model: FlowModel, *, device: str = "auto", precision: Precision = "auto", steps: int | None = None
    ):
        self.steps = model.steps_of(steps)
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        if self.device.type == "cpu":
            keep_freed()
        model = model.eval().to(self.device, memory_format=torch.channels_last)
        self._sha256 = _hash(model)  # before its convolutions are fused, after which it has no state
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
        """Returns all the network has to say about the pair, as tensors of a batch of one on the device.

        previous: what it said about the last pair of a video, for networks that can start from there; or, without a
            memory, what another network said about this pair.
        """
        frame1, frame2 = self._frame(image1, "image1"), self._frame(image2, "image2")
        if frame1.shape != frame2.shape:
            sizes = " and ".join(f"{frame.shape[2]}x{frame.shape[3]}" for frame in (frame1, frame2))
            raise FleetflowError(f"the images are {sizes}; both must have the same size: crop or resize one")
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return self._run(frame1, frame2, previous, self.steps if steps is None else steps)

    def label(self) -> dict[str, str]:
        """Returns what its results depend on, for a note beside them: the network, its weights, device and precision.

        The weights are those it had when the Predictor was made.
        """
        return {
            "network": "+".join(type(part).__name__ for part in getattr(self.model, "members", (self.model,))),
            "sha256": self._sha256,
            "fit": self.model.fit,
            "steps": str(self.steps),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def _frame(self, image: np.ndarray, name: str) -> torch.Tensor:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        frame = torch.from_numpy(np.ascontiguousarray(image[..., :3])).to(self.device)[None]
        return frame.permute(0, 3, 1, 2).float().div_(255)  # channels-last in memory, as the picture was


def _hash(model: nn.Module) -> str:
    """The SHA-256 of the names and values of the model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _ready(model: FlowModel, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The model, or a copy whose convolutions hold their weights in `dtype` (and on the CPU packed and fused)."""
    fused = device.type == "cpu" and available() and not is_reference()
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
DEFAULT = ("flo", "color")
PICTURES = ("color", "side")  # of a video these become one mp4 each
PART_FRAMES = 200  # frames in a part of an unfinished video: what an interrupted run loses at most
SCOUTS = 12  # pairs of a video or folder that are looked at first, to choose its colour scale


class Progress(NamedTuple):
    """How far a job is: pairs done, pairs in all (None where a video does not say)."""

    done: int
    total: int | None


class _Clip:
    """Predicts the pairs of a clip in their order; warm: each from where the last one ended, if it was just before."""

    def __init__(self, predictor: Predictor, warm: bool):
        self.predictor, self.warm = predictor, warm
        self.last: tuple[int, Prediction] | None = None

    def flow(self, k: int, image1: np.ndarray, image2: np.ndarray, name: str) -> np.ndarray:
        """Returns the flow of pair k, if it is a number everywhere; else raises FleetflowError. name: of image1."""
        previous = self.last[1] if self.last and self.last[0] == k - 1 else None
        found = self.predictor.predict(image1, image2, previous)
        flow = found.flow[0].permute(1, 2, 0).float().cpu().numpy()
        if not np.isfinite(flow).all():
            raise FleetflowError(f"the flow of {name} is not finite everywhere; try --precision fp32 or other weights")
        if self.warm:
            if found.memory is None:
                network = type(self.predictor.model).__name__
                raise FleetflowError(
                    f"{network} keeps nothing that the next pair could start from; leave --warm-start out, or take a "
                    "network such as raft or deq_flow_b"
                )
            self.last = k, found
        return flow


class Note:
    """What a job was asked for and what it has done so far: a hidden file beside its results, a line for each addition.

    facts: all of that; only the request where there is no note yet, it is damaged, or tells of another request.
    """

    def __init__(self, path: Path, request: dict, *, again: bool):
        self.path, self.facts = path, {}
        lines = path.read_text(errors="replace").splitlines() if path.is_file() and not again else []
        for line in lines:
            with suppress(ValueError, TypeError):  # the last line of a killed run may be cut off
                self.facts.update(json.loads(line))
        self.begun = self.facts.get("request") == request
        if not self.begun:
            self.facts = {"request": request}

    def add(self, facts: dict) -> None:
        """Adds the facts, which JSON must be able to hold, to the file; the first ones replace another request."""
        self.facts.update(facts)
        if not self.begun:
            write_atomically(self.path, lambda path: path.write_text(json.dumps(self.facts) + "\n"))
            self.begun = True
            return
        with writing(self.path), self.path.open("a") as file:
            file.write("\n" + json.dumps(facts))  # the new line first: what stands there may be cut off


def predict_pair(
    predictor: Predictor,
    first: Path,
    second: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
) -> list[Path]:
    """Predicts the flow between two pictures and writes it; returns the files written.

    output: a folder, into which each format is written under the name of the first picture; or a file, whose suffix
    is that of the one format (None takes what the suffix says, of a .png a colour picture).
    formats: None takes DEFAULT. scale: pixels at full colour; None chooses one.
    """
    kinds = _known(formats, scale)
    if output.suffix and not output.is_dir():
        targets = {_kind(output, formats and kinds): output}
    else:
        targets = {kind: output / FORMATS[kind].format(first.stem) for kind in kinds}
    frames = {path.resolve() for path in (first, second)}
    for path in targets.values():
        if path.resolve() in frames:
            raise FleetflowError(f"{path} is one of the pictures and would be overwritten; choose another output")
    image1, image2 = read_image(first), read_image(second)
    flow = _Clip(predictor, False).flow(0, image1, image2, first.name)
    for kind, path in targets.items():
        _write(path, kind, image1, flow, scale or robust_scale(flow))
    return list(targets.values())


def predict_folder(
    predictor: Predictor,
    folder: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    warm_start: bool = False,
    again: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Path]:
    """Predicts the flow from each picture of a folder to the next; returns the files there now.

    Files of a former run are kept if they are still as it left them and it was the same request for the same frames
    (it says so in a hidden note in `output`), unless `again`.
    formats: None takes DEFAULT. scale: pixels at full colour; None chooses one for the whole folder from a few of its
    pairs, once. warm_start: each pair starts from where the one before it ended, but the first and the first behind
    files that were kept.
    """
    frames, formats = list_frames(folder), _known(formats, scale)
    _check_folder(output)
    if len(frames) < 2:
        raise FleetflowError(f"{folder} holds {len(frames)} picture; a flow needs two: add frames")
    stems: dict[str, Path] = {}
    for frame in frames:
        if stems.setdefault(frame.stem, frame) is not frame:
            names = f"{stems[frame.stem].name} and {frame.name}"
            raise FleetflowError(f"{folder} holds {names}, whose results would have one name; rename one of them")
    if output.resolve() == folder.resolve() and any(FORMATS[kind].endswith(IMAGE_SUFFIXES) for kind in formats):
        raise FleetflowError(f"pictures written into {folder} would be taken for its frames; choose another output")
    pairs = list(pairwise(frames))
    origin = [str(folder.resolve()), _stamp(frames[0])]  # with a new first frame it is another clip, with another scale
    request = {**predictor.label(), "warm": warm_start, "folder": origin, "scale": scale}
    note = Note(output / f".{folder.resolve().name}.jsonl", request, again=again)
    scale = scale or note.facts.get("scale")
    if scale is None and set(formats) & set(PICTURES):
        scouts = [map(read_image, pair) for pair in pairs[:: max(1, len(pairs) // SCOUTS)]]
        scale = max(robust_scale(predictor(*images)) for images in scouts)
    written: list[Path] = []
    clip = _Clip(predictor, warm_start)
    for k, (first, second) in enumerate(pairs):
        paths = {kind: output / FORMATS[kind].format(first.stem) for kind in formats}
        origin = [_stamp(first), second.name, _stamp(second)]
        missing = [kind for kind, path in paths.items() if note.facts.get(path.name) != [_stamp(path), *origin]]
        if missing:
            image = read_image(first)
            flow = clip.flow(k, image, read_image(second), first.name)
            for kind in missing:
                _write(paths[kind], kind, image, flow, scale)
            note.add({"scale": scale, **{paths[kind].name: [_stamp(paths[kind]), *origin] for kind in missing}})
        written += paths.values()
        progress(Progress(k + 1, len(pairs)))
    return written


def predict_video(
    predictor: Predictor,
    video: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    warm_start: bool = False,
    again: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[list[Path], str | None]:
    """Predicts the flow between consecutive frames of a video; memory does not grow with its length.

    Pictures become one mp4 for each kind, OUTPUT/NAME_color.mp4, with one colour scale for the whole clip; other
    formats one numbered file a pair. The work is done in parts of 200 pairs, kept in OUTPUT/NAME.parts until the end:
    an interrupted run continues behind the last whole part, and a finished one is kept, unless `again`, it was another
    request (a hidden note in `output` says which), or its files have changed.
    warm_start: each pair starts from where the one before it ended, but the first of each part.
    Returns the files, and what is wrong with the video if it ends too early.
    """
    formats = _known(formats, scale)
    _check_folder(output)
    try:
        with VideoReader(video):  # raises before anything is written
            pass
    except FleetflowError:
        if video.suffix.lower() in IMAGE_SUFFIXES:
            raise FleetflowError(f"{video} is one picture; a flow needs two: give the second one, too") from None
        raise
    origin = [str(video.resolve()), _stamp(video)]
    request = {**predictor.label(), "warm": warm_start, "video": origin, "scale": scale, "formats": sorted(formats)}
    note = Note(output / f".{video.name}.jsonl", request, again=again)
    done = note.facts.get("files", {})
    if done and _unchanged(output, done):
        return [output / name for name in done], note.facts["problem"]
    films = [kind for kind in formats if kind in PICTURES]
    others = [kind for kind in formats if kind not in PICTURES]
    scale = scale or note.facts.get("scale")
    if films and scale is None:
        scale = _clip_scale(predictor, video)

    parts = output / f"{video.stem}.parts"
    whole = len(list(takewhile(lambda part: _unchanged(output, note.facts.get(f"part {part}")), count())))
    last = whole
    with VideoReader(video, start=whole * PART_FRAMES) as reader:
        total = reader.frames and max(reader.frames - 1, 1)
        pairs = enumerate(pairwise(reader), whole * PART_FRAMES)
        for part in count(whole):
            batch = islice(pairs, PART_FRAMES)
            first = next(batch, None)
            if first is None:
                break
            clip, paths = _Clip(predictor, warm_start), [parts / f"{part:05d}_{kind}.mp4" for kind in films]
            with ExitStack() as stack:
                writers = [stack.enter_context(VideoWriter(path, reader.fps)) for path in paths]
                for k, (image1, image2) in chain((first,), batch):
                    flow = clip.flow(k, image1, image2, f"frame {k} of {video.name}")
                    for kind, writer in zip(films, writers):
                        writer.write(_picture(kind, image1, flow, scale))
                    for kind in others:
                        paths.append(output / FORMATS[kind].format(f"{video.stem}_{k:06d}"))
                        _write(paths[-1], kind, image1, flow, scale)
                    progress(Progress(k + 1, total))
            note.add({"scale": scale, f"part {part}": _stamps(output, paths)})
            last = part + 1
        problem = reader.problem
    if not last:
        raise FleetflowError(f"{video} has one frame only; a flow needs two: give a longer video")
    written = [output / f"{video.stem}_{kind}.mp4" for kind in films]
    for kind, film in zip(films, written):
        join_videos([parts / f"{part:05d}_{kind}.mp4" for part in range(last)], film)
    names = [name for part in range(last) for name in note.facts[f"part {part}"]]
    for kind in others:
        written += [output / name for name in names if name.endswith(FORMATS[kind].format(""))]
    note.add({"files": _stamps(output, written), "problem": problem})
    shutil.rmtree(parts, ignore_errors=True)
    return written, problem


def _clip_scale(predictor: Predictor, video: Path) -> float:
    """The colour scale for a whole clip, from a few pairs spread over it."""
    with VideoReader(video) as reader:
        every = max(1, (reader.frames or 25 * SCOUTS) // SCOUTS)
        return max(
            (robust_scale(predictor(*pair)) for k, pair in enumerate(pairwise(reader)) if k % every == 0), default=1.0
        )


def _known(formats: Sequence[str] | None, scale: float | None) -> list[str]:
    """The formats, each once; raises FleetflowError for an unknown one, none at all, or an impossible scale."""
    if scale is not None:
        checked_scale(scale)
    for kind in formats or ():
        if kind not in FORMATS:
            raise unknown("format", kind, sorted(FORMATS))
    if formats is not None and not formats:
        raise FleetflowError(f"no format was asked for; give one or more of {', '.join(FORMATS)}")
    return list(dict.fromkeys(formats or DEFAULT))


def _kind(path: Path, formats: Sequence[str] | None) -> str:
    """The one format in which this file is written; raises FleetflowError unless formats and suffix agree."""
    fitting = [kind for kind, name in FORMATS.items() if name.endswith(path.suffix.lower())]
    if not fitting:
        suffixes = ", ".join(dict.fromkeys(Path(name).suffix for name in FORMATS.values()))
        raise FleetflowError(f'{path} has the suffix "{path.suffix}"; expected {suffixes}, or a folder that exists')
    asked = formats or ["color" if "color" in fitting else fitting[0]]
    if len(asked) > 1 or asked[0] not in fitting:
        raise FleetflowError(
            f"{path} is one {path.suffix} file, but {' and '.join(asked)} was asked for; give a folder as output"
        )
    return asked[0]


def _check_folder(output: Path) -> None:
    """Raises FleetflowError for the name of a file."""
    suffixes = (".mp4", *IMAGE_SUFFIXES, *(Path(name).suffix for name in FORMATS.values()))
    if output.suffix.lower() in suffixes and not output.is_dir():
        raise FleetflowError(f"{output} is the name of a file; a folder or a video has many results: give a folder")


def _write(path: Path, kind: str, image: np.ndarray, flow: np.ndarray, scale: float | None) -> None:
    if kind in PICTURES:
        write_image(path, _picture(kind, image, flow, scale))
    else:
        write_flow(path, flow)


def _picture(kind: str, image: np.ndarray, flow: np.ndarray, scale: float) -> np.ndarray:
    picture = with_legend(flow_to_color(flow, scale), scale)
    return side_by_side(image, picture) if kind == "side" else picture


def _stamp(path: Path) -> list[int] | None:
    """Length and time of the last change of a file, which tell whether it is still the same; None if it is gone."""
    with suppress(OSError):
        state = path.stat()
        return [state.st_size, state.st_mtime_ns]
    return None


def _stamps(folder: Path, paths: Sequence[Path]) -> dict[str, list[int] | None]:
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in paths}


def _unchanged(folder: Path, stamps: dict[str, list[int]] | None) -> bool:
    return stamps is not None and all(_stamp(folder / name) == stamp for name, stamp in stamps.items())
