"""Submissions to the public benchmarks: the official files for their test frames, checked as the servers would, zipped.

Sintel     root/test/clean/SEQUENCE/frame_0001.png  ->  clean/SEQUENCE/frame0001.flo, and the same for final
           (names: readme of Sintel's program `bundler`, which makes the file that is uploaded)
KITTI 2012 root/testing/colored_0/000000_10.png     ->  000000_10.png, 16 bits, not in a folder (readme of its kit)
KITTI 2015 root/testing/image_2/000000_10.png       ->  flow/000000_10.png, 16 bits (its upload page)
Spring     root/test/0003/frame_left/frame_left_0001.png  ->  0003/flow_FW_left/flow_FW_left_0001.flo5, forward and
           backward, left and right (its program `flow_subsampling` makes the file that is uploaded)
"""

import json
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fleetflow.evaluation.baselines import Method
from fleetflow.evaluation.warm_start import Warm
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import (
    LEFTOVER,
    LOCK,
    existing,
    lock_folder,
    reading,
    remove_leftovers,
    write_atomically,
)
from fleetflow.io.flow import read_flow, write_flow
from fleetflow.io.images import read_image
from fleetflow.types import FleetflowError, Prediction

NOTE = ".request.json"  # in the folder of the files: what they were predicted with
PACKED = (".png", ".flo5")  # compressed already
BYTES_PER_VECTOR = 16  # a vector in double precision
EXTRA_BYTES = 2**20  # for what a file holds beside its vectors
REPORTED = 3  # problems named in a message; the others are counted


class Task(NamedTuple):
    """One flow of a submission."""

    frame1: Path
    frame2: Path
    name: str  # its place in the submission, with slashes


class Benchmark(NamedTuple):
    """What a benchmark wants."""

    tasks: Callable[[Path], list[Task]]  # folder of the data set -> flows in official order
    flows: int  # in a whole submission
    size: tuple[int, int] | None  # height and width of every frame; None where they differ
    byte_limit: int | None  # of all files unpacked
    next_step: str  # what is done with the files


def _sintel(root: Path) -> list[Task]:
    tasks = []
    for folder in sorted(root.glob("test/clean/*/")) + sorted(root.glob("test/final/*/")):
        for frame1, frame2 in pairwise(sorted(folder.glob("frame_*.png"))):
            name = f"frame{frame1.stem.removeprefix('frame_')}.flo"
            tasks.append(Task(frame1, frame2, f"{folder.parent.name}/{folder.name}/{name}"))
    return tasks


def _kitti2012(root: Path) -> list[Task]:
    colored = root / "testing" / "colored_0"
    return _kitti(colored if colored.is_dir() else root / "testing" / "image_0", "")


def _kitti2015(root: Path) -> list[Task]:
    return _kitti(root / "testing" / "image_2", "flow/")


def _kitti(folder: Path, place: str) -> list[Task]:
    frames = sorted(folder.glob("*_10.png"))
    return [Task(frame, folder / frame.name.replace("_10.png", "_11.png"), place + frame.name) for frame in frames]


def _spring(root: Path) -> list[Task]:
    tasks = []
    for folder in sorted(root.glob("test/*/frame_*/")):
        side = folder.name.removeprefix("frame_")
        frames = sorted(folder.glob(f"frame_{side}_*.png"))
        ways = (("FW", list(pairwise(frames))), ("BW", [(second, first) for first, second in pairwise(frames)]))
        for way, pairs in ways:
            place = f"flow_{way}_{side}"
            for frame1, frame2 in pairs:
                number = frame1.stem.rpartition("_")[2]
                tasks.append(Task(frame1, frame2, f"{folder.parent.name}/{place}/{place}_{number}.flo5"))
    return tasks


KITTI_BYTES = 500 * 10**6  # its server: "too large (>500 MB)"
BENCHMARKS = {
    "sintel": Benchmark(
        _sintel, 2 * 552, (436, 1024), None,
        "upload what Sintel's bundler makes of it: bundler {0}/clean {0}/final {0}.lzma",
    ),
    "kitti2012": Benchmark(_kitti2012, 195, None, KITTI_BYTES, "upload the zip at cvlibs.net, Flow 2012"),
    "kitti2015": Benchmark(_kitti2015, 200, None, KITTI_BYTES, "upload the zip at cvlibs.net, Flow 2015"),
    "spring": Benchmark(
        _spring, 3960, (1080, 1920), None,
        "upload flow_submission.hdf5, which Spring's program makes of it: flow_subsampling {0}",
    ),
}  # fmt: skip


def submit(
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    benchmark: str,
    root: Path,
    output: Path,
    label: dict[str, str],
    *,
    warm_start: bool = False,
    progress=lambda done, total: None,
) -> Path:
    """Returns the zip, or the folder, with a whole and checked submission.

    Args:
        predict: a function of two uint8 [H, W, 3] RGB images that returns the flow, float32 [H, W, 2] pixels.
        output: NAME.zip, whose files lie in the folder NAME and stay there, or the folder only. Files of an interrupted
            run are kept if they were made with the same `label` (all that the flows depend on: weights, precision,
            iterations) and root.
        warm_start: `predict`, a Predictor then, begins each pair where the one before it in its scene ended (`Warm`).

    Raises:
        FleetflowError: Where test frames are missing, the folder holds other flows, or a server would refuse it.
    """
    tasks = _tasks(benchmark, root)
    output = Path(output)
    folder = output.with_suffix("") if output.suffix == ".zip" else output
    warm = Warm(predict, tasks) if warm_start else None
    start = {"start": "warm"} if warm_start else {}
    request = {"benchmark": benchmark, "root": os.path.realpath(root), **start, **label}
    with lock_folder(folder, f"submit {benchmark}"):
        _begin(folder, output, request, tasks)
        files = _Place(folder)
        for k, task in enumerate(tasks):
            if not (folder / task.name).is_file() or _flow_problems(files, task):
                flow = as_array(warm.pair(k)) if warm else _predicted(predict, task)
                if not np.isfinite(flow).all():
                    raise FleetflowError(f"the flow of {task.frame1} is not finite everywhere; try --precision fp32")
                write_flow(folder / task.name, flow)
            progress(k + 1, len(tasks))
        found = problems(folder, benchmark, root)
        if found:
            raise FleetflowError(f"{benchmark} would refuse {folder}: {summary(found)}")
        if output.suffix == ".zip":
            write_atomically(output, lambda temporary: _zip(temporary, folder, tasks))
    return output


def _begin(folder: Path, output: Path, request: dict, tasks: list[Task]) -> None:
    """Cleans up behind a killed run, and writes the note that says what the files in `folder` are made with.

    Raises:
        FleetflowError: Where the folder or the zip is not of an earlier run of the same request.
    """
    for place in sorted({folder, output.parent, *((folder / task.name).parent for task in tasks)}):
        remove_leftovers(place)
    note, before = folder / NOTE, None
    if note.is_file():
        before = _noted(note)
        _same_request(folder, before["request"], request)
    elif any(not _is_ours(path) for path in folder.iterdir()):
        raise FleetflowError(f"{folder} is not empty and not of an earlier run; choose another output")
    zips = before["zips"] if before else []
    if output.suffix == ".zip" and output.name not in zips:
        if os.path.lexists(output):
            raise FleetflowError(f"{output} exists and is not of an earlier run; choose another output or delete it")
        zips = [*zips, output.name]
    content = json.dumps({"request": request, "zips": zips})
    write_atomically(note, lambda temporary: temporary.write_text(content + "\n"))


def _noted(note: Path) -> dict:
    """Returns what the note beside the flows of an earlier run says; raises FleetflowError where it is damaged."""
    with reading(note, "the note of an earlier run"):
        noted = json.loads(note.read_text())
        return {"request": dict(noted["request"]), "zips": [str(name) for name in noted["zips"]]}


def _is_ours(path: Path) -> bool:
    """Whether a file in the folder of a submission is no part of it, but of the run: its note, its lock, a leftover."""
    return path.name in (NOTE, LOCK) or bool(LEFTOVER.fullmatch(path.name))


def _predicted(predict: Callable[[np.ndarray, np.ndarray], np.ndarray], task: Task) -> np.ndarray:
    images = read_image(task.frame1), read_image(task.frame2)
    return predict(*images, task.name.rpartition(".")[0]) if isinstance(predict, Method) else predict(*images)


def _same_request(folder: Path, before: dict, now: dict) -> None:
    """Raises FleetflowError, with the first difference, unless the flows in a folder were made as they would be now."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            difference = f"{key} {before.get(key)}, not {now.get(key)}"
            raise FleetflowError(f"{folder} holds flows made with {difference}; choose another output or delete it")


def predict_flow(
    predictor: Predictor, image1: np.ndarray, image2: np.ndarray, *, iterations: int | None = None
) -> np.ndarray:
    """Returns the flow float32 [H, W, 2] pixels with so many refinement iterations; None takes the network's own."""
    return as_array(predictor.predict(image1, image2, iterations=iterations))


def as_array(prediction: Prediction) -> np.ndarray:
    """Returns the flow of a prediction for one pair, float32 [H, W, 2] pixels."""
    return prediction.flow[0].permute(1, 2, 0).float().cpu().numpy()


def is_finished(model: str, methods: Collection[str]) -> bool:
    """Returns True for the path of finished files instead of the name of a network, or of one of `methods`.

    Raises:
        FleetflowError: For what can only be a path, and does not exist.
    """
    if model in methods:
        return False
    path = Path(os.path.expanduser(model))
    if ":" not in model and path.name != model and not path.exists():
        raise FleetflowError(f"{model} does not exist; give a network, or a folder or .zip of finished files")
    return path.is_dir() or path.suffix == ".zip"


def next_step(benchmark: str, written: Path) -> str:
    """Returns what to do with what `submit` has written."""
    return BENCHMARKS[benchmark].next_step.format(written.with_suffix("") if written.suffix == ".zip" else written)


def problems(place: Path, benchmark: str, root: Path, *, progress=lambda done, total: None) -> list[str]:
    """Returns what a server would refuse in a folder or zip, one phrase each; nothing where it is whole and sound.

    Looked at are names, numbers, the size of each flow, its encoding (16 bits for KITTI), vectors that are unknown or
    not finite, and the size of all files. root: the folder of the data set, whose frames give names and sizes.
    """
    tasks, wanted = _tasks(benchmark, root), BENCHMARKS[benchmark]
    found = []
    with _Place(place) as files:
        names = {task.name for task in tasks}
        found += [f"{name} is in it twice" for name in files.repeated]
        found += [f"{name} is missing" for name in sorted(names - files.sizes.keys())]
        found += [f"{name} does not belong there" for name in sorted(files.sizes.keys() - names)]
        total = sum(files.sizes.values())
        if wanted.byte_limit and total > wanted.byte_limit:
            found.append(f"the files have {total / 1e6:.0f} MB; {wanted.byte_limit / 1e6:.0f} MB are allowed")
        for k, task in enumerate(tasks):
            if task.name in files.sizes:
                found += _flow_problems(files, task)
            progress(k + 1, len(tasks))
    return found


def summary(found: list[str]) -> str:
    """Returns the first problems in one line, and how many more there are."""
    more = f"; and {len(found) - REPORTED} more" if len(found) > REPORTED else ""
    return "; ".join(found[:REPORTED]) + more


def _flow_problems(files: "_Place", task: Task) -> list[str]:
    size = _size(task.frame1)
    try:
        flow, valid = files.read(task.name, BYTES_PER_VECTOR * size[0] * size[1] + EXTRA_BYTES)
    except FleetflowError as error:
        return [str(error)]
    if flow.shape[:2] != size:
        return [f"{task.name} is {flow.shape[0]}x{flow.shape[1]}, its frame {size[0]}x{size[1]}"]
    if not valid.all():
        return [f"{task.name} holds {(~valid).sum()} vectors that are unknown or not finite"]
    return []


def _tasks(benchmark: str, root: Path) -> list[Task]:
    """The flows of a whole submission; raises FleetflowError unless all test frames are there, in their own size."""
    wanted = BENCHMARKS[benchmark]
    tasks = wanted.tasks(Path(root))
    if len(tasks) != wanted.flows:
        raise FleetflowError(
            f"{root} holds the test frames of {len(tasks)} flows; {benchmark} has {wanted.flows}: "
            "give the folder of the complete data set"
        )
    for task in tasks:
        existing(task.frame2)
        if wanted.size and _size(task.frame1) != wanted.size:
            height, width = wanted.size
            raise FleetflowError(f"{task.frame1} is not {height}x{width}, as {benchmark} is; use the original frames")
    return tasks


def _size(picture: Path) -> tuple[int, int]:
    with reading(picture, "a picture"), Image.open(picture) as image:  # reads the header only
        return image.height, image.width


class _Place:
    """The files of a folder or of a zip, by name: sizes in bytes, `read`, and what a zip holds several times."""

    def __init__(self, place: Path):
        self.place, self.archive, self.repeated = place, None, []
        if place.is_dir():
            files = [path for path in place.rglob("*") if path.is_file() and not _is_ours(path)]
            self.sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
            return
        with reading(existing(place), "a zip"):
            self.archive = zipfile.ZipFile(place)
        members = [member for member in self.archive.infolist() if not member.is_dir()]
        self.sizes = {member.filename: member.file_size for member in members}
        counts = Counter(member.filename for member in members)
        self.repeated = [name for name, count in counts.items() if count > 1]

    def read(self, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns flow and valid of a member, as `io.read_flow` does; raises FleetflowError over `most` bytes."""
        if self.archive is None:
            path = self.place / name
            _check_bytes(name, path.stat().st_size if path.is_file() else 0, most)
            return read_flow(path)
        _check_bytes(name, self.sizes[name], most)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"it{Path(name).suffix}"
            with reading(Path(name), "a member of a zip"), self.archive.open(name) as member:
                content = member.read(most + 1)  # its directory may lie about its size
            _check_bytes(name, len(content), most)
            copy.write_bytes(content)
            try:
                return read_flow(copy)
            except FleetflowError as error:
                raise FleetflowError(f"{name}: {str(error).replace(str(copy), 'it')}") from None

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *_) -> None:
        if self.archive is not None:
            self.archive.close()


def _check_bytes(name: str, count: int, most: int) -> None:
    if count > most:
        raise FleetflowError(f"{name} has {count / 1e6:.0f} MB; a flow of its frames has {most / 1e6:.0f} MB at most")


def _zip(path: Path, folder: Path, tasks: list[Task]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for task in tasks:
            packed = task.name.endswith(PACKED)
            method = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            archive.write(folder / task.name, task.name, method)
