"""Jobs of the desk: frames in, results in a folder out; and the queue that runs one job at a time, fairly."""

import json
import shlex
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from fleetflow.inference.memory import in_words
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.stream import Stream
from fleetflow.io.atomic import reason
from fleetflow.io.images import read_image
from fleetflow.io.video import VideoReader
from fleetflow.types import FleetflowError
from fleetflow.visualise import clip_scale, robust_scale

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)

# Python 3.11 raises a SystemError, seldom, where two threads parse an expression at once, as the header of an .npy is one
# (python/cpython issue 106905).
_one_header = threading.Lock()


@dataclass(frozen=True)
class Request:
    """What a job is to compute: two pictures or one clip, and how."""

    sources: tuple[Path, ...]
    names: tuple[str, ...]  # as the user knows the files
    network: str
    iterations: int | None = None
    size: tuple[int, int] | None = None  # height, width
    occlusion: bool = True  # and the flow back, and uncertainty
    memory: int | None = None  # bytes that the process may take

    def command(self, frames: int | None = None, scale: float | None = None) -> str:
        """Returns the command line that writes what the desk's downloads hold.

        Args:
            frames: of the clip, where it was cut.
            scale: pixels at full color; None leaves it to the command, which looks at a few pairs of a clip only.
        """
        names = list(self.names)
        if len(set(names)) < len(names):  # from two folders, which the browser does not tell: not one file twice
            names = [f"FOLDER{k}/{name}" for k, name in enumerate(names, 1)]
        names = [f"./{name}" if name.startswith("-") else name for name in names]
        words = ["fleetflow", "predict", *names, "-m", self.network, "-o", f"flow_{self.network}"]
        words += ["--frames", f":{frames}"] if frames else []
        words += ["--iterations", str(self.iterations)] if self.iterations else []
        words += ["--size", *map(str, self.size)] if self.size else []
        words += ["--memory", in_words(self.memory)] if self.memory else []
        words += ["--scale", f"{scale:g}"] if scale else []
        return shlex.join([*words, "--format", "flo", "color"])


@dataclass
class Job:
    """A request on its way; `state` is one of WAITING, RUNNING, DONE, FAILED, CANCELLED.

    In `folder` lie, for each frame k, frame_k.npy (uint8 [H, W, 3]) and, for each pair, flow_k.npy (float32 [H, W, 2]
    pixels), backward_k.npy (likewise), uncertainty_k.npy (float32 [H, W] pixels) and occlusion_k.npy (uint8 [H, W],
    255 is hidden).
    """

    request: Request
    folder: Path
    owner: str  # the session
    state: str = WAITING
    problem: str | None = None
    done: int = 0  # pairs
    total: int | None = None  # pairs
    started: float = 0.0
    seconds: float = 0.0  # of computing, all pairs together
    size: tuple[int, int] = (0, 0)  # height, width
    times: list[float] = field(default_factory=list)  # seconds of the frames
    motion: list[float] = field(default_factory=list)  # mean length of the flow of each pair, in pixels
    scales: list[float] = field(default_factory=list)  # pixels
    planes: tuple[str, ...] = ()  # which of backward, uncertainty and occlusion there are
    is_cut: bool = False  # the clip has more frames than were looked at
    rate: Fraction = Fraction(25)  # frames a second
    time_base: Fraction | None = None  # seconds

    def end(self, state: str, problem: str | None = None) -> None:
        """Ends the job, unless it has ended already."""
        if self.state not in ENDED:
            self.state, self.problem = state, problem

    def progress(self, ahead: int) -> dict:
        """Returns what the browser is told while it waits."""
        passed = time.monotonic() - self.started
        left = passed / self.done * (self.total - self.done) if self.done and self.total else None
        facts = {"state": self.state, "done": self.done, "total": self.total, "left": left}
        return {**facts, "problem": self.problem, "ahead": ahead}

    def result(self) -> dict:
        """Returns what the browser needs to show a finished job."""
        return {
            "height": self.size[0],
            "width": self.size[1],
            "pairs": self.done,
            "times": self.times,
            "motion": self.motion,
            "scale": self.scale,
            "seconds": self.seconds / max(self.done, 1),
            "uncertainty": "uncertainty" in self.planes,
            "occlusion": "occlusion" in self.planes,
            "command": self.request.command(
                self.done + 1 if self.is_cut else None, self.scale if self.is_clip else None
            ),
            "problem": self.problem,
        }

    @property
    def is_clip(self) -> bool:
        """Whether the source is one clip."""
        return len(self.request.sources) == 1

    @property
    def scale(self) -> float:
        """Pixels of motion at full color, one for all pairs."""
        return clip_scale(self.scales)

    def array(self, kind: str, k: int, *, mapped: bool = False) -> np.ndarray:
        """Returns a stored array of the kinds that the class names; mapped: left on the disk."""
        with _one_header:
            return np.load(self.folder / f"{kind}_{k}.npy", mmap_mode="r" if mapped else None, allow_pickle=False)


def compute(job: Job, frame_limit: int, byte_limit: int) -> None:
    """Computes all pairs of a job and stores them in its folder.

    Args:
        job: whose state becomes DONE or FAILED; one that is cancelled meanwhile stops behind its pair.
        frame_limit: frames of a clip that are looked at.
        byte_limit: what its results may take on the disk, and half of what is free there; a longer clip ends there,
            and `problem` says so.
    """
    job.started = time.monotonic()
    try:
        byte_limit = min(byte_limit, shutil.disk_usage(job.folder).free // 2)
        _compute(job, frame_limit, byte_limit)
        job.end(DONE, job.problem)
    except FleetflowError as error:
        job.end(FAILED, _named(str(error), job.request))
    except MemoryError:
        job.end(FAILED, "out of memory; take a smaller size")
    except OSError as error:  # also of a session that has ended meanwhile, whose folder is gone
        job.end(FAILED, f"results cannot be stored ({reason(error)}); free some space for temporary files")
    except Exception as error:
        job.end(FAILED, f"our fault: {type(error).__name__}: {error}")
        raise


def _compute(job: Job, frame_limit: int, byte_limit: int) -> None:
    request = job.request
    frames, job.total = _frames(job, frame_limit)
    both = request.occlusion
    stream = Stream(_predictor(request), backward=both, occlusion=both, uncertainty=both, warm_start=False)
    for k, frame in enumerate(frames):
        if job.state == CANCELLED:
            return
        size = (k + 1) * (
            frame.nbytes + 21 * frame.shape[0] * frame.shape[1]
        )  # with flow, flow back, uncertainty, occlusion
        if k == frame_limit or size > byte_limit:
            why = "" if k == frame_limit else f": more would take over {byte_limit >> 20} MB of temporary files"
            job.is_cut, job.problem = True, f"only the first {k} frames{why}"
            break
        _take(job, stream, k, np.asarray(frame), getattr(frame, "time", None) or float(k))
    if not job.done:
        raise FleetflowError(job.problem or f"{request.names[0]} has one frame only; a flow needs two")
    job.total = job.done
    if isinstance(frames, VideoReader) and frames.problem:
        job.problem = _named(frames.problem, request)


def _named(text: str, request: Request) -> str:
    """The text with the user's names of files in place of ours."""
    for path, name in zip(request.sources, request.names):
        text = text.replace(str(path), name)
    return text


def _frames(job: Job, limit: int) -> tuple[Iterable[np.ndarray], int | None]:
    """The frames of a job, and the number of its pairs if that is known."""
    names, sources = job.request.names, job.request.sources
    if len(sources) == 2:
        images = [read_image(path) for path in sources]
        if images[0].shape != images[1].shape:
            sizes = " and ".join(f"{name} is {image.shape[1]}x{image.shape[0]}" for name, image in zip(names, images))
            raise FleetflowError(f"{sizes}; both must have the same size: crop or resize one")
        return images, 1
    reader = VideoReader(sources[0])
    job.rate, job.time_base = reader.fps, reader.time_base
    return reader, None if reader.frames is None else max(min(reader.frames, limit) - 1, 1)


def _take(job: Job, stream: Stream, k: int, frame: np.ndarray, seconds: float) -> None:
    """Stores frame k and, from the second frame on, the pair that it ends."""
    if not job.times:
        job.size = frame.shape[:2]
    np.save(job.folder / f"frame_{k}.npy", frame)
    job.times.append(seconds)
    begun = time.perf_counter()
    step = stream(frame)
    if step is None:
        return
    job.seconds += time.perf_counter() - begun
    flow = np.ascontiguousarray(step.flow, dtype=np.float32)
    if not np.isfinite(flow).all():
        raise FleetflowError(f"the flow of pair {k - 1} is not finite everywhere; take another network")
    np.save(job.folder / f"flow_{k - 1}.npy", flow)
    planes = {"backward": step.backward, "uncertainty": step.uncertainty, "occlusion": step.occlusion}
    planes = {name: plane for name, plane in planes.items() if plane is not None}
    job.planes = tuple(planes)
    for name, plane in planes.items():
        stored = np.round(255 * plane).astype(np.uint8) if name == "occlusion" else plane.astype(np.float32)
        np.save(job.folder / f"{name}_{k - 1}.npy", stored)
    job.motion.append(float(np.linalg.norm(flow, axis=-1).mean()))
    job.scales.append(robust_scale(flow))
    job.done += 1


def _predictor(request: Request) -> Predictor:
    return _cached_predictor(request.network, request.iterations, request.size, request.memory)


@lru_cache(maxsize=3)
def _cached_predictor(
    network: str, iterations: int | None, size: tuple[int, int] | None, memory: int | None
) -> Predictor:
    return Predictor(network, iterations=iterations, size=size, memory=memory)


class Queue:
    """Runs jobs one after another in a thread of its own; sessions take turns, so that none holds up the others."""

    def __init__(self, run: Callable[[Job], None]):
        self._run, self._changed, self._closed = run, threading.Condition(), False
        self._waiting: dict[str, deque[Job]] = {}  # by session, the next session first
        self._running: Job | None = None
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Puts a job behind those of its session."""
        with self._changed:
            self._waiting.setdefault(job.owner, deque()).append(job)
            self._changed.notify()

    def waiting(self, owner: str | None = None) -> int:
        """Returns how many jobs wait, in all or of one session."""
        with self._changed:
            return sum(len(jobs) for key, jobs in self._waiting.items() if owner in (None, key))

    def ahead(self, job: Job) -> int:
        """Returns how many jobs will run before this one, at most."""
        with self._changed:
            own = self._waiting.get(job.owner, ())
            if job not in own:
                return 0
            turn = own.index(job)
            others = sum(min(len(jobs), turn + 1) for key, jobs in self._waiting.items() if key != job.owner)
            return turn + others + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once if it waits, behind its pair if it runs."""
        with self._changed:
            job.end(CANCELLED)
            if job in self._waiting.get(job.owner, ()):
                self._remove(job)

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self._changed:
            for jobs in self._waiting.values():
                for job in jobs:
                    job.end(CANCELLED)
            self._waiting.clear()
            if self._running:
                self._running.end(CANCELLED)
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _remove(self, job: Job) -> None:
        self._waiting[job.owner].remove(job)
        if not self._waiting[job.owner]:
            del self._waiting[job.owner]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                owner = next(iter(self._waiting))
                job = self._running = self._waiting[owner][0]
                self._remove(job)
                job.state = RUNNING
                if owner in self._waiting:  # behind the others
                    self._waiting[owner] = self._waiting.pop(owner)
            try:
                self._run(job)
            except Exception:  # our own bug; the next job may do
                traceback.print_exc()
            finally:
                self._running = None


def event(facts: dict) -> bytes:
    """Returns facts as one server-sent event."""
    return f"data: {json.dumps(facts)}\n\n".encode()
