"""Predict flow between two pictures, along a folder, or along a video, into files; interrupted runs continue."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, count, islice, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import write_atomically, writing
from fleetflow.io.flow import write_flow
from fleetflow.io.images import IMAGE_SUFFIXES, list_frames, read_image, write_image
from fleetflow.io.video import VideoReader, VideoWriter, join_videos
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Prediction
from fleetflow.visualise import checked_scale, clip_scale, flow_to_color, robust_scale, side_by_side, with_legend

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
SCOUTS = 12  # pairs of a video or folder that are looked at first, to choose its color scale


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
            if found.state is None:
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
    is that of the one format (None takes what the suffix says, of a .png a color picture).
    formats: None takes DEFAULT. scale: pixels at full color; None chooses one.
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
    formats: None takes DEFAULT. scale: pixels at full color; None chooses one for the whole folder from a few of its
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
        scale = clip_scale([robust_scale(predictor(*images)) for images in scouts])
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

    Pictures become one mp4 for each kind, OUTPUT/NAME_color.mp4, with one color scale for the whole clip; other
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
                clock = {"time_base": reader.time_base}
                writers = [stack.enter_context(VideoWriter(path, reader.fps, **clock)) for path in paths]
                for k, (image1, image2) in chain((first,), batch):
                    flow = clip.flow(k, image1, image2, f"frame {k} of {video.name}")
                    for kind, writer in zip(films, writers):
                        writer.write(_picture(kind, image1, flow, scale), image1.time, image2.time - image1.time)
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
    """The color scale for a whole clip, from a few pairs spread over it."""
    with VideoReader(video) as reader:
        every = max(1, (reader.frames or 25 * SCOUTS) // SCOUTS)
        scales = [robust_scale(predictor(*pair)) for k, pair in enumerate(pairwise(reader)) if k % every == 0]
        return clip_scale(scales or [1.0])


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
