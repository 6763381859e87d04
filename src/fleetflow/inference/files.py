"""Predict flow between two pictures, along a folder, or along a video, into files; interrupted runs continue."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from itertools import chain, count, islice, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetflow.inference.ahead import ahead
from fleetflow.inference.color_scale import SCOUTS, scouted, scouts, video_scouts
from fleetflow.inference.pairing import check_sizes, scenes
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.results import (
    FORMATS,
    PICTURES,
    Result,
    asked_of,
    kind_of,
    known_formats,
    picture,
    write,
)
from fleetflow.inference.results import write_result as write_result
from fleetflow.inference.stream import Stream
from fleetflow.io.atomic import lock_folder, remove_leftovers
from fleetflow.io.images import IMAGE_SUFFIXES, list_frames, read_image
from fleetflow.io.note import Note
from fleetflow.io.video import VideoReader, VideoWriter, frame_slice, join_videos
from fleetflow.types import FleetflowError
from fleetflow.visualise import robust_scale

PART_FRAMES = 200  # frames in a part of an unfinished video: what an interrupted run loses at most
PATIENCE = 60.0  # seconds that a single pair waits for its turn to write into a folder


class Progress(NamedTuple):
    """How far a job is: pairs done, pairs in all (None where a video does not say), and of what, if not the job."""

    done: int
    total: int | None
    what: str = ""


class _Clip:
    """Predicts the pairs of a clip in their order, as a stream; warm: each starts where the last one just before ended.

    kinds: formats, which say whether the flow back and what follows from it are needed.
    """

    def __init__(self, predictor: Predictor, warm: bool, kinds: Sequence[str]):
        self.predictor, self.warm = predictor, warm
        self.stream = Stream(predictor, warm_start=warm, **asked_of(kinds))
        self.next: int | None = None  # the pair whose first frame the stream has seen last
        self.known: dict[int, np.ndarray] = {}  # flows of pairs that were looked at before their turn

    def result(self, k: int, image1: np.ndarray, image2: np.ndarray, name: str) -> Result:
        """Returns that of pair k, if its flow is a number everywhere; else raises FleetflowError. name: of image1."""
        if k in self.known and not self.warm and not self.stream.both_ways:
            return Result(image1, self.known.pop(k))
        if self.next != k:
            self.restart()
            self.stream(image1)
        step = self.stream(image2)
        assert step is not None  # the stream has seen `image1`
        if self.warm and step.prediction.state is None and self.predictor.model.iterations is None:
            network = type(self.predictor.model).__name__
            raise FleetflowError(
                f"{network} keeps nothing that the next pair could start from; leave --warm-start out, or take a "
                "network such as raft or deq_flow_b"
            )
        self.next = k + 1
        return Result(image1, _checked(step.flow, name), step.backward, step.occlusion, step.uncertainty)

    def restart(self) -> None:
        """Begins a new scene or part."""
        self.stream.reset()
        self.next = None

    def scout(self, pairs: Iterable, progress: Callable[[Progress], None]) -> float:
        """Returns the color scale for some pairs (index, image1, image2, name of image1), and keeps their flows."""

        def flows() -> Iterator[tuple[int, np.ndarray]]:
            for done, (k, image1, image2, name) in enumerate(pairs, 1):
                yield k, _checked(self.predictor(image1, image2), name)
                progress(Progress(done, SCOUTS, "color scale"))

        scale, self.known = scouted(flows())
        return scale


def _checked(flow: np.ndarray, name: str) -> np.ndarray:
    """The flow [H, W, 2] that follows the picture `name`; raises FleetflowError unless it is a number everywhere."""
    if not np.isfinite(flow).all():
        raise FleetflowError(f"the flow of {name} is not finite everywhere; try --precision fp32 or other weights")
    return flow


def predict_pair(
    predictor: Predictor,
    first: Path,
    second: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Predicts the flow between two pictures and writes it; returns the files written.

    Args:
        predictor: of the flow.
        first: a picture.
        second: a picture of the same size.
        output: a folder, into which each format is written under the name of the first picture; or a file, whose suffix
            is that of the one format (None takes what the suffix says, of a .png a color picture).
        formats: keys of FORMATS; None takes DEFAULT.
        scale: pixels at full color; None chooses one.
        overwrite: in a folder, also replace what is not the result of these two pictures.

    Raises:
        FleetflowError: the pictures cannot be read or have two sizes; or a file of the folder is in the way.
    """
    kinds = known_formats(formats, scale)
    single = bool(output.suffix) and not output.is_dir()
    if single:
        targets = {kind_of(output, formats and kinds): output}
    else:
        targets = {kind: output / FORMATS[kind].format(first.stem) for kind in kinds}
    frames = {os.path.realpath(path) for path in (first, second)}
    for path in targets.values():
        if os.path.realpath(path) in frames:
            raise FleetflowError(f"{path} is one of the pictures and would be overwritten; choose another output")
    check_sizes([(first, second)])
    source = f"{os.path.realpath(first)} and {os.path.realpath(second)}"

    def note() -> Note:
        return Note(output, source, predictor.label(), overwrite=overwrite)

    if not single:
        note().check(targets.values())
    image1, image2 = read_image(first), read_image(second)
    if any(asked_of(kinds).values()):
        found = _Clip(predictor, False, kinds).result(0, image1, image2, first.name)
    else:
        found = Result(image1, _checked(predictor(image1, image2), first.name))
    with nullcontext() if single else lock_folder(output, f"predict {first.name} {second.name}", patience=PATIENCE):
        remove_leftovers(output.parent if single else output)
        if not single:
            note().claim(targets.values())
        for kind, path in targets.items():
            write(path, kind, found, scale or robust_scale(found.flow))
    return list(targets.values())


def predict_folder(
    predictor: Predictor,
    folder: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    warm_start: bool = False,
    overwrite: bool = False,
    one_scene: bool = False,
    frames: str | None = None,
    every: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Path]:
    """Predicts the flow from each picture of a folder to the next of its scene; returns the files there now.

    Files of a former run are kept if they are still as it left them and it was the same request for the same frames
    (it says so in a hidden note in `output`).

    Args:
        predictor: of the flow.
        folder: of pictures; `pairing.scenes` says which belong together.
        output: a folder that no other run is using.
        formats: keys of FORMATS; None takes DEFAULT.
        scale: pixels at full color; None chooses one for the whole folder from a few of its pairs, once.
        warm_start: each pair starts from where the one before it ended, but the first of each scene and the first
            behind files that were kept.
        overwrite: compute anew what was finished, and replace what is in the way.
        one_scene: take the pictures for one scene, whatever they are called.
        frames: "A:B", from picture A (0 is the first) up to B, which is left out. None: all.
        every: 2 takes every second picture of those, and so on.
        progress: called after each pair.

    Raises:
        FleetflowError: before anything is computed, for pictures of different sizes within a scene, and for files in
            the output that are not ours or belong to another source.
    """
    clips, formats = clips_of(folder, one_scene, frames, every), known_formats(formats, scale)
    _check_folder(output)
    pictures = list(chain.from_iterable(clips))
    _check_names(folder, pictures, output, formats)
    check_sizes(clips)
    pairs = [pair for clip in clips for pair in pairwise(clip)]
    starts = {clip[0] for clip in clips}
    place = os.path.realpath(folder)
    origin = [place, _stamp(pictures[0])]  # with a new first frame it is another clip, with another scale
    request = {**predictor.label(), "warm": warm_start, "folder": origin, "scale": scale}
    with lock_folder(output, f"predict {folder}"):
        remove_leftovers(output)
        note = Note(output, place, request, overwrite=overwrite)
        note.check(output / FORMATS[kind].format(first.stem) for first, _ in pairs for kind in formats)
        progress(Progress(0, len(pairs)))  # what is seen until the first pair is done
        clip = _Clip(predictor, warm_start, formats)
        scale = scale or _noted_scale(note)
        if scale is None and set(formats) & set(PICTURES):
            found = ((k, *map(read_image, pairs[k]), pairs[k][0].name) for k in scouts(len(pairs)))
            scale = clip.scout(found, progress)
        written: list[Path] = []
        for k, (first, second) in enumerate(pairs):
            paths = {kind: output / FORMATS[kind].format(first.stem) for kind in formats}
            origin = [_stamp(first), second.name, _stamp(second)]
            missing = [kind for kind, path in paths.items() if note.facts.get(path.name) != [_stamp(path), *origin]]
            if first in starts:
                clip.restart()
            if missing:
                found = clip.result(k, read_image(first), read_image(second), first.name)
                note.claim(paths.values())
                for kind in missing:
                    write(paths[kind], kind, found, scale)
                note.add({"scale": scale, **{paths[kind].name: [_stamp(paths[kind]), *origin] for kind in missing}})
            written += paths.values()
            progress(Progress(k + 1, len(pairs)))
    return written


def clips_of(folder: Path, one_scene: bool = False, frames: str | None = None, every: int = 1) -> list[list[Path]]:
    """Returns the pictures that `predict_folder` takes from a folder, by scenes. Arguments as there.

    Raises:
        FleetflowError: for fewer than two.
    """
    pictures = list_frames(folder)
    wanted = pictures[frame_slice(frames, every)]
    if len(wanted) < 2:
        part = "" if len(wanted) == len(pictures) else f", of which --frames and --every leave {len(wanted)}"
        plural = "" if len(pictures) == 1 else "s"
        raise FleetflowError(f"{folder} holds {len(pictures)} picture{plural}{part}; a flow needs two: add frames")
    return [wanted] if one_scene else scenes(wanted)


def predict_video(
    predictor: Predictor,
    video: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    *,
    scale: float | None = None,
    warm_start: bool = False,
    overwrite: bool = False,
    frames: str | None = None,
    every: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[list[Path], str | None]:
    """Predicts the flow between consecutive frames of a video; memory does not grow with its length.

    Pictures become one mp4 for each kind, OUTPUT/NAME_color.mp4, with one color scale for the whole clip; other
    formats one file a pair with the number of its first frame in the video. The work is done in parts of 200 pairs,
    kept in a hidden folder in `output` until the end: an interrupted run continues behind the last whole part, and a
    finished one is kept, unless it was another request (a hidden note in `output` says which), or its files have
    changed.

    Args:
        predictor: of the flow.
        video: the file.
        output: a folder that no other run is using.
        formats: keys of FORMATS; None takes DEFAULT.
        scale: pixels at full color; None chooses one for the whole clip from a few of its pairs, once.
        warm_start: each pair starts from where the one before it ended, but the first of each part.
        overwrite: compute anew what was finished, and replace what is in the way.
        frames: "A:B", from frame A (0 is the first) up to B, which is left out; a film of them begins with frame A,
            its times from there on, and its sound, are those of the video. None: all.
        every: 2 takes every second frame of those, and so on.
        progress: called after each pair.

    Returns:
        The files, and what is wrong with the video if it ends too early.

    Raises:
        FleetflowError: for a file that is no video or has one frame, and for files in the output that are not ours or
            belong to another source.
    """
    formats, wanted = known_formats(formats, scale), frame_slice(frames, every)
    _check_folder(output)
    try:  # raises before anything is written
        reader = VideoReader(video, start=wanted.start, stop=wanted.stop, every=wanted.step)
    except FleetflowError:
        if video.suffix.lower() in IMAGE_SUFFIXES:
            raise FleetflowError(f"{video} is one picture; a flow needs two: give the second one, too") from None
        raise
    place = os.path.realpath(video)
    origin = [place, _stamp(video)]
    request = {**predictor.label(), "warm": warm_start, "video": origin, "scale": scale, "formats": sorted(formats)}
    if wanted != slice(0, None, 1):
        request["frames"] = [wanted.start, wanted.stop, wanted.step]
    with lock_folder(output, f"predict {video}"):
        remove_leftovers(output)
        note = Note(output, place, request, overwrite=overwrite)
        film = _Film(predictor, reader, output, formats, note)
        if not (done := note.facts.get("files")) or not _unchanged(output, done):
            film.predict(scale, warm_start, progress)
            done = film.join()
        note.remove_folder(film.parts)
        return [output / name for name in done], note.facts.get("problem")


class _Film:
    """The results of one video, in parts until it is whole."""

    def __init__(self, predictor: Predictor, reader: VideoReader, output: Path, formats: list[str], note: Note):
        self.predictor, self.reader, self.output, self.note = predictor, reader, output, note
        self.formats = formats
        self.films = [kind for kind in formats if kind in PICTURES]
        self.others = [kind for kind in formats if kind not in PICTURES]
        self.stem = reader.path.stem
        self.begin = note.facts.get("begin")  # the time of the first frame, if it is not that of the video
        self.targets = {kind: output / f"{self.stem}_{kind}.mp4" for kind in self.films}
        key = hashlib.sha256(note.source.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.parts = output / f".{self.stem[:40]}-{key}.parts"  # a name that is never too long for a folder

    def predict(self, scale: float | None, warm_start: bool, progress: Callable[[Progress], None]) -> None:
        """Predicts the parts that are not there yet."""
        if self.parts.is_symlink():
            raise FleetflowError(f"{self.parts} is a link; unfinished results go there: remove it")
        note = self.note
        whole = len(list(takewhile(lambda part: _unchanged(self.output, note.facts.get(f"part {part}")), count())))
        if not whole:
            note.remove_folder(self.parts)  # those of another request
        note.check([*self.targets.values(), *self._paths(whole, whole * PART_FRAMES)])
        progress(Progress(whole * PART_FRAMES, self._total()))
        clip = _Clip(self.predictor, warm_start, self.formats)
        scale = scale or _noted_scale(note)
        if self.films and scale is None:
            found = ((k, *images, self._name(k)) for k, *images in video_scouts(self.reader))
            scale = clip.scout(found, progress)
        reader = self.reader.among(whole * PART_FRAMES)
        pairs = enumerate(pairwise(ahead(reader)), whole * PART_FRAMES)
        for part in count(whole):
            batch = islice(pairs, PART_FRAMES)
            first = next(batch, None)
            if first is None:
                break
            clip.restart()
            paths = self._part(part, chain((first,), batch), clip, scale, progress)
            note.add({"scale": scale, "begin": self.begin, f"part {part}": _stamps(self.output, paths)})
        if "part 0" not in note.facts:
            part = f" of frames {reader.start}:{reader.stop or ''}" if reader.start or reader.stop else ""
            part += f", taking one of {reader.every}" if reader.every > 1 else ""
            raise FleetflowError(f"{reader.path} has fewer than two frames{part}; a flow needs two: take more")
        note.add({"problem": reader.problem})

    def _total(self) -> int | None:
        return self.reader.wanted and max(self.reader.wanted - 1, 1)

    def _part(self, part: int, pairs: Iterable, clip: "_Clip", scale: float | None, progress: Callable) -> list[Path]:
        """Writes what belongs to the pairs of one part; returns the files."""
        total = self._total()
        paths = [self.parts / f"{part:05d}_{kind}.mp4" for kind in self.films]
        with ExitStack() as stack:
            films = [VideoWriter(path, self.reader.fps, time_base=self.reader.time_base) for path in paths]
            writers = [stack.enter_context(film) for film in films]
            for k, (image1, image2) in pairs:
                found = clip.result(k, image1, image2, self._name(k))
                if self.begin is None:
                    self.begin = image1.time if self.reader.start else 0.0
                self.note.claim(self._paths(part, k))
                for kind, writer in zip(self.films, writers):
                    time = image1.time - self.begin
                    writer.write(picture(kind, found, scale), time, image2.time - image1.time)
                for kind, path in zip(self.others, self._numbered(k)):
                    paths.append(path)
                    write(path, kind, found, scale)
                progress(Progress(k + 1, total))
        return paths

    def join(self) -> dict[str, list[int] | None]:
        """Makes whole films of the parts; returns the names of all results, and how they were left."""
        parts = list(takewhile(lambda part: f"part {part}" in self.note.facts, count()))
        self.note.claim(self.targets.values())
        for kind, film in self.targets.items():
            films = [self.parts / f"{part:05d}_{kind}.mp4" for part in parts]
            join_videos(films, film, audio=self.reader.path, audio_start=self.note.facts["begin"])
        names = [name for part in parts for name in self.note.facts[f"part {part}"]]
        written = list(self.targets.values())
        for kind in self.others:
            written += [self.output / name for name in names if name.endswith(FORMATS[kind].format(""))]
        self.note.add({"files": _stamps(self.output, written)})
        return self.note.facts["files"]

    def _paths(self, part: int, k: int) -> list[Path]:
        """The files that pair k is written into: the films of a part, and its own."""
        return [*(self.parts / f"{part:05d}_{kind}.mp4" for kind in self.films), *self._numbered(k)]

    def _numbered(self, k: int) -> list[Path]:
        return [self.output / FORMATS[kind].format(f"{self.stem}_{self._number(k):06d}") for kind in self.others]

    def _number(self, k: int) -> int:
        """The number of the first frame of pair k in the video."""
        return self.reader.start + k * self.reader.every

    def _name(self, k: int) -> str:
        return f"frame {self._number(k)} of {self.reader.path.name}"


def _noted_scale(note: Note) -> float | None:
    scale = note.facts.get("scale")
    return scale if isinstance(scale, float | int) and scale > 0 else None


def _check_names(folder: Path, frames: Sequence[Path], output: Path, formats: Sequence[str]) -> None:
    """Raises FleetflowError where results would have one name, or be taken for frames by the next run."""
    sources: dict[str, Path] = {}
    for frame in frames:
        for name in [FORMATS[kind].format(frame.stem) for kind in formats]:  # the flow back of a is a_backward.flo
            if sources.setdefault(name, frame) is not frame:
                names = f"{sources[name].name} and {frame.name}"
                raise FleetflowError(f"{folder} holds {names}, whose results would have one name; rename one of them")
    if os.path.realpath(output) == os.path.realpath(folder) and any(
        FORMATS[kind].endswith(IMAGE_SUFFIXES) for kind in formats
    ):
        raise FleetflowError(f"pictures written into {folder} would be taken for its frames; choose another output")


def _check_folder(output: Path) -> None:
    """Raises FleetflowError for the name of a file."""
    suffixes = (".mp4", *IMAGE_SUFFIXES, *(Path(name).suffix for name in FORMATS.values()))
    if output.suffix.lower() in suffixes and not output.is_dir():
        raise FleetflowError(f"{output} is the name of a file; a folder or a video has many results: give a folder")


def _stamp(path: Path) -> list[int] | None:
    """Length and time of the last change of a file, which tell whether it is still the same; None if it is gone."""
    with suppress(OSError):
        state = path.stat()
        return [state.st_size, state.st_mtime_ns]
    return None


def _stamps(folder: Path, paths: Sequence[Path]) -> dict[str, list[int] | None]:
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in paths}


def _unchanged(folder: Path, stamps: dict[str, list[int]] | None) -> bool:
    return isinstance(stamps, dict) and all(_stamp(folder / name) == stamp for name, stamp in stamps.items())
