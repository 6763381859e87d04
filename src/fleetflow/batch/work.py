"""What one item of a batch does: predict, motion, track or evaluate, from the fetched input to the committed result."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from errno import EDQUOT, ENOSPC, EROFS
from itertools import chain
from pathlib import Path

import torch

from fleetflow.batch.manifest import Item, place
from fleetflow.batch.plan import plan
from fleetflow.batch.records import RECORD, Record, Store, Superseded, sha256
from fleetflow.batch.task import MOTION, Job, Ready, Report, Settings, Task
from fleetflow.data.dataset import datasets, open_files
from fleetflow.evaluation import records as tables
from fleetflow.evaluation.evaluate import measure
from fleetflow.evaluation.protocol import open_model
from fleetflow.inference import files as job
from fleetflow.inference.ahead import ahead
from fleetflow.inference.color_scale import scouted, video_scouts
from fleetflow.inference.device import use_threads
from fleetflow.inference.memory import parse_bytes
from fleetflow.inference.predictor import Predictor
from fleetflow.io import note
from fleetflow.io.atomic import reason
from fleetflow.io.images import list_frames, read_image
from fleetflow.io.tracks import write_tracks
from fleetflow.io.video import VideoReader, join_videos
from fleetflow.motion.scores import score
from fleetflow.motion.tracks import grid, track
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError
from fleetflow.visualise import checked_scale

FULL = (ENOSPC, EDQUOT, EROFS)  # errors of the place of the results, not of an item


class Worker:
    """A network that is loaded once, and does one task after the other."""

    def __init__(self, job: Job, index: int = 0):
        """Loads the network. index: of this worker among those of its machine; chooses the GPU."""
        self.job, self.settings, self.store = job, job.settings, job.store
        use_threads(job.threads)
        if self.settings.do not in WORKS:
            raise unknown("kind of work", self.settings.do, sorted(WORKS))
        if self.settings.scale is not None:
            checked_scale(self.settings.scale)
        if self.settings.do == "evaluate" and self.settings.dataset not in datasets:
            raise unknown("data set", self.settings.dataset, datasets.names())
        self.predictor = _predictor(self.settings, own_device(self.settings.device, index))
        self.label = self.predictor.label()
        wanted = job.label or self.label
        other = [name for name in wanted if wanted[name] != self.label.get(name)]
        if other:
            own, wanted = (" ".join(f"{name}={each.get(name)}" for name in other) for each in (self.label, wanted))
            raise FleetflowError(
                f"{socket.gethostname()} has {own}, the run {wanted}; say which with --device and --precision, and give "
                "all machines the same weights"
            )
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def ready(self) -> Ready:
        """Returns what its results depend on, and how many workers this machine has a GPU for."""
        gpus = torch.cuda.device_count() if self.predictor.device.type == "cuda" else 0
        return Ready(self.label, gpus)

    def __call__(self, task: Task | Item) -> Report:
        """Does a task, or an item that is short, and says what came of it; a long item comes back as tasks."""
        began = time.perf_counter()
        item = task if isinstance(task, Item) else task.item
        try:
            if isinstance(task, Item):
                tasks = plan(self.job, item)
                if len(tasks) > 1:
                    return Report(item.id, "split", worker=self.name, tasks=tuple(tasks))
                task = tasks[0]
            found = self._do(task, began)
        except Superseded:
            found = Report(item.id, "stop", f"another run writes into {self.store.url}; this one ends")
        except Exception as error:
            found = self._failed(task, error, began)
        return found._replace(worker=self.name, input=item.input, seconds=time.perf_counter() - began)

    def _do(self, task: Task, began: float) -> Report:
        item, part = task.item, task.part
        if (known := self.store.record(item.id)) is not None:
            _check_same(known, item, self.store)
            return Report(item.id, "part" if part else "skipped")  # an item counts once
        if (failure := self.store.failure(item.id)) is not None:
            return Report(item.id, "part" if part else "failed", failure.reason)
        if part is None or self._range(task) is None:
            tries = self.store.begin(self.job.run, item.id, part)
            if tries > self.job.tries:
                raise FleetflowError(f"its worker died {self.job.tries} times; it may need more memory than there is")
            with self._scratch() as folder, fetched(item.input) as path:
                stamp, digest = _stamp(item.input), input_sha256(path)
                pairs = _pairs(task, self.settings.split)
                frames = WORKS[self.settings.do](self, path, folder, slice(*pairs) if pairs else None)
                if _stamp(item.input) not in ("", stamp):
                    raise FleetflowError(
                        f"{item.input} has changed while it was read; try it again when it is complete"
                    )
                record = self._record(item, began, "done", tries=tries, frames=frames)
                record = replace(record, input_sha256=digest, input_stamp=stamp, pairs=pairs)
                fresh = self.store.commit(folder, record, part)
        if part is None:
            return Report(item.id, "done" if fresh else "skipped", frames=frames)
        return self._join(task, began)

    def _range(self, task: Task) -> Record | None:
        """The record of a range that is there; what a former run made of another input, or of other pairs, is removed."""
        item, part = task.item, task.part
        known, stamp = self.store.record(item.id, part), _stamp(item.input)
        if known is None or (known.input == item.input and stamp in ("", known.input_stamp)):
            if known is None or known.pairs == _pairs(task, self.settings.split):
                return known
        self.store.remove(self.store.target(item.id, part))
        return None

    def _join(self, task: Task, began: float) -> Report:
        """Joins the ranges of a clip if none is missing: whichever worker ends the last one does it."""
        item = task.item
        found = [self._range(task._replace(part=part)) for part in range(task.parts)]
        records = [record for record in found if record is not None]
        if len(records) < task.parts:  # of ranges that are not done, or that another worker has joined by now
            return Report(item.id, "part")
        frames = sum(max(record.frames - 1, 0) for record in records) + 1  # two ranges share one
        seconds = sum(record.seconds for record in records) + time.perf_counter() - began
        whole = replace(self._record(item, began, "done", frames=frames), seconds=round(seconds, 3))
        whole = replace(whole, input_sha256=records[0].input_sha256, input_stamp=records[0].input_stamp)
        try:
            with self._scratch() as folder, fetched(item.input) as source, tempfile.TemporaryDirectory() as local:
                parts = [self._part(item.id, k, Path(local)) for k in range(task.parts)]
                join(parts, folder, source)
                fresh = self.store.commit(folder, whole)
        except (FleetflowError, OSError):
            if self.store.record(item.id) is None:
                raise
            fresh = False  # another worker has joined them, and removed the ranges meanwhile
        self.store.remove(self.store.control("parts", item.id))
        return Report(item.id, "done", frames=frames) if fresh else Report(item.id, "part")

    def _part(self, id: str, part: int, folder: Path) -> Path:
        """A local folder with the results of a range."""
        target = self.store.target(id, part)
        if self.store.local:
            return Path(target)
        self.store.files.get(target, str(folder / f"{part:04d}"), recursive=True)
        return folder / f"{part:04d}"

    def _failed(self, task: Task | Item, error: Exception, began: float) -> Report:
        """Keeps why an item failed; an error of the place of the results ends the run."""
        item = task if isinstance(task, Item) else task.item
        why = reason(error) if isinstance(error, FleetflowError) else f"{type(error).__name__}: {reason(error)}"
        if _is_full(error):
            return Report(item.id, "stop", why)
        if not isinstance(error, FleetflowError | OSError | MemoryError):
            why += f" (at {_where(error)})"
        try:
            self.store.fail(self._record(item, began, "failed", reason=why))
        except Superseded:
            return Report(item.id, "stop", f"another run writes into {self.store.url}; this one ends")
        except (FleetflowError, OSError) as second:
            return Report(item.id, "stop", reason(second))
        return Report(item.id, "failed", why)

    def _record(
        self, item: Item, began: float, outcome: str, *, reason: str | None = None, tries: int = 1, frames: int = 0
    ) -> Record:
        return Record(
            id=item.id,
            input=item.input,
            outcome=outcome,
            reason=reason,
            label=self.label,
            settings=asdict(self.settings),
            frames=frames,
            seconds=round(time.perf_counter() - began, 3),
            time=_now(),
            worker=self.name,
            run=self.job.run,
            tries=tries,
        )

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for unfinished results: where a rename makes them results, or on this machine."""
        above = None
        if self.store.local:
            above = self.store.control("work", self.job.run)
            os.makedirs(above, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=above, prefix="fleetflow-"))
        with suppress(OSError):
            folder.chmod(0o777 & ~_umask())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _predictor(settings: Settings, device: str) -> Predictor:
    ways = {"device": device, "precision": settings.precision, "iterations": settings.iterations}
    if settings.do != "evaluate":
        memory = parse_bytes(settings.memory) if settings.memory else None
        return Predictor(settings.model, **ways, size=settings.size, memory=memory)
    found = open_model(settings.model, settings.dataset, **ways)
    if not isinstance(found, Predictor):
        raise FleetflowError(f"{settings.model} has no weights that a record could name; give a network")
    return found


def _pairs(task: Task, split: int) -> list[int | None] | None:
    """The first pair of a range, and the one before which it ends: of the last range the clip's end, wherever that is."""
    if task.part is None:
        return None
    return [task.part * split, None if task.part + 1 == task.parts else (task.part + 1) * split]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _predict(worker: Worker, path: Path, folder: Path, pairs: slice | None) -> int:
    """Flow fields and pictures, as `fleetflow predict` writes them; returns the number of frames."""
    settings, counted = worker.settings, [0]
    ways = {"scale": settings.scale, "warm_start": settings.warm_start}

    def progress(state: job.Progress) -> None:
        if not state.what:
            counted[0] = state.done

    if path.is_dir():
        job.predict_folder(worker.predictor, path, folder, settings.format, **ways, progress=progress)
    else:
        if pairs is not None:
            if sum(1 for _ in VideoReader(path, start=pairs.start, stop=pairs.start + 2)) < 2:
                return 0  # the header has promised more
            ways["frames"] = f"{pairs.start}:{'' if pairs.stop is None else pairs.stop + 1}"
            if ways["scale"] is None and set(settings.format) & set(job.PICTURES):
                ways["scale"] = _whole_scale(worker.predictor, path)
        _, problem = job.predict_video(worker.predictor, path, folder, settings.format, **ways, progress=progress)
        if problem:
            raise FleetflowError(problem)
    with suppress(FileNotFoundError):
        (folder / note.NAME).unlink()  # the record says it
    return counted[0] + 1


def _whole_scale(predictor: Predictor, path: Path) -> float:
    """The color scale of a whole clip, for each of its ranges."""
    looks = ((k, predictor(image1, image2)) for k, image1, image2 in video_scouts(VideoReader(path)))
    return scouted(looks)[0]


def _evaluate(worker: Worker, path: Path, folder: Path, _) -> int:
    """scores.json and pairs.csv of a folder of pairs with truth, as `fleetflow evaluate` writes them."""
    settings = worker.settings
    result = measure(
        worker.predictor, open_files(settings.dataset, path), model=settings.model, dataset=settings.dataset
    )
    tables.as_json(result, folder / "scores.json")
    tables.as_csv(result, folder / "pairs.csv")
    return 2 * len(result.pairs)


def _track(worker: Worker, path: Path, folder: Path, _) -> int:
    """tracks.npz of points on a grid in the first frame, as `fleetflow track` writes it."""
    reader = None if path.is_dir() else VideoReader(path)
    frames = map(read_image, list_frames(path)) if reader is None else ahead(reader)
    first = next(frames, None)
    if first is None:
        raise FleetflowError(f"{path} holds no picture; a track needs two or more")
    points = grid(first.shape[:2], worker.settings.grid)
    found = track(chain((first,), frames), points, worker.predictor)
    write_tracks(folder / "tracks.npz", *found)
    if reader is not None and reader.problem:
        raise FleetflowError(reader.problem)
    return found.points.shape[1]


def _motion(worker: Worker, path: Path, folder: Path, _) -> int:
    """motion.json: how the clip moves, the columns of `fleetflow motion`; returns the number of pairs looked at."""
    source = [read_image(frame) for frame in list_frames(path)] if path.is_dir() else path
    found = score(source, worker.predictor)
    (folder / MOTION).write_text(json.dumps(tables.plain(asdict(found)), indent=1, allow_nan=False) + "\n")
    return found.pairs


WORKS: dict[str, Callable[[Worker, Path, Path, slice | None], int]] = {
    "predict": _predict,
    "motion": _motion,
    "track": _track,
    "evaluate": _evaluate,
}


def join(parts: list[Path], folder: Path, source: Path) -> None:
    """Makes the results of one clip of those of its ranges: films become one, with the sound of the source.

    Args:
        parts: folders, in their order.
        folder: of the results.
        source: the clip.
    """
    films = sorted(path.name for path in parts[0].glob("*.mp4"))
    for name in films:  # behind the end of a clip that is shorter than it says there is none
        join_videos([part / name for part in parts if (part / name).exists()], folder / name, audio=source)
    for part in parts:
        for path in part.iterdir():
            if path.name not in films and path.name != RECORD:
                shutil.copyfile(path, folder / path.name)


def own_device(device: str, index: int) -> str:
    """Returns the device of the worker with this index on its machine: with several GPUs each in turn."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{index % count}" if count > 1 else device


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """Gives the local path of an input; what lies elsewhere is copied here, and removed at the end."""
    if "://" not in url:
        if not os.path.exists(url):
            raise FleetflowError(f"{url} does not exist; expected a video or a folder of pictures")
        if not (os.path.isfile(url) or os.path.isdir(url)):  # a device may never end
            raise FleetflowError(f"{url} is neither a file nor a folder; expected a video or a folder of pictures")
        yield Path(url)
        return
    files, path = place(url)
    with tempfile.TemporaryDirectory(prefix="fleetflow-") as folder:
        local = Path(folder) / (path.rstrip("/").rpartition("/")[2] or "clip")
        try:
            files.get(path, str(local), recursive=files.isdir(path))
        except Exception as error:  # each driver has errors of its own
            raise FleetflowError(f"{url} cannot be fetched ({reason(error)}); check that it is there") from error
        yield local


def input_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file; of a folder that of the names and contents of its files."""
    if not path.is_dir():
        return sha256(path)
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        digest.update(f"{name}\0{sha256(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files below a folder, in the order of their names; hidden ones left out."""
    return sorted(path for path in folder.rglob("[!.]*") if path.is_file())


def _stamp(url: str) -> str:
    """What tells cheaply whether an input is still the same; empty where nothing does."""
    files, path = place(url)
    with suppress(Exception):  # a store that has no such thing
        if "://" in url:
            return str(files.ukey(path))
        states = [os.stat(file) for file in _files(Path(path))] if os.path.isdir(path) else [os.stat(path)]
        text = " ".join(f"{state.st_size}.{state.st_mtime_ns}" for state in states)
        return text if len(states) == 1 else hashlib.sha256(text.encode()).hexdigest()
    return ""


def _check_same(known: Record, item: Item, store: Store) -> None:
    """Raises FleetflowError where results are there for another input, or for one that has changed since."""
    stamp = _stamp(item.input)
    if known.input == item.input and stamp in ("", known.input_stamp):  # "": it may be gone by now
        return
    if stamp:
        with fetched(item.input) as path:
            if input_sha256(path) == known.input_sha256:
                return
    what = "has changed" if known.input == item.input else f"is not {known.input}, whose results are there"
    raise FleetflowError(f"{item.input} {what}; remove {store.target(item.id)} to make them anew")


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
