"""Jobs of the desk: frames in, results in a folder out; and the queue that runs one job at a time, fairly."""

import json
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from fleetflow.inference.files import FORMATS, PICTURES
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.stream import Stream
from fleetflow.io.images import read_image
from fleetflow.io.video import read_video
from fleetflow.types import FleetflowError
from fleetflow.visualise import clip_scale, robust_scale

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class Request:
    """What a job is to compute: two pictures or one clip, and how."""

    sources: tuple[Path, ...]
    names: tuple[str, ...]  # as the user knows the files
    network: str
    iterations: int | None = None
    size: tuple[int, int] | None = None  # height, width
    occlusion: bool = True  # and uncertainty

    def command(self) -> str:
        """Returns the command line that computes the same flow."""
        words = ["fleetflow", "predict", *self.names, "-m", self.network, "-o", "flow"]
        words += ["--iterations", str(self.iterations)] if self.iterations else []
        words += ["--size", *map(str, self.size)] if self.size else []
        return shlex.join([*words, "--format", "flo", "color"])


@dataclass
class Job:
    """A request on its way; `state` is one of WAITING, RUNNING, DONE, FAILED, CANCELLED.

    In `folder` lie, for each frame k, frame_k.npy (uint8 [H, W, 3]) and, for each pair, flow_k.npy (float32 [H, W, 2]
    pixels), uncertainty_k.npy (float32 [H, W] pixels) and occlusion_k.npy (uint8 [H, W], 255 is hidden).
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
    planes: tuple[str, ...] = ()  # which of uncertainty and occlusion there are

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
        stem = Path(self.request.names[0]).stem
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
            "formats": [{"format": kind, "name": name.format(stem)} for kind, name in FORMATS.items()],
            "command": self.request.command(),
            "problem": self.problem,
        }

    @property
    def scale(self) -> float:
        """Pixels of motion at full color, one for all pairs."""
        return clip_scale(self.scales)

    def array(self, kind: str, k: int) -> np.ndarray:
        """Returns a stored array: kind is "frame", "flow", "uncertainty" or "occlusion"."""
        return np.load(self.folder / f"{kind}_{k}.npy", allow_pickle=False)

    def write(self, kind: str, k: int, path: Path) -> None:
        """Writes pair k in one of the formats of `predict`."""
        from fleetflow.inference.files import write_result

        write_result(
            path, kind, self.array("frame", k), self.array("flow", k), self.scale if kind in PICTURES else None
        )


def compute(job: Job, frame_limit: int, byte_limit: int) -> None:
    """Computes all pairs of a job and stores them in its folder.

    Args:
        job: whose state becomes DONE, FAILED or CANCELLED; one that is cancelled meanwhile stops behind its pair.
        frame_limit: frames of a clip that are looked at.
        byte_limit: what its results may take on the disk; a longer clip ends there, and `problem` says so.
    """
    job.started, job.state = time.monotonic(), RUNNING
    try:
        frames, total = _frames(job.request, frame_limit)
        job.total = total
        stream = Stream(
            _predictor(job.request),
            occlusion=job.request.occlusion,
            uncertainty=job.request.occlusion,
            warm_start=False,
        )
        for k, frame in enumerate(frames):
            if job.state == CANCELLED:
                return
            _take(job, stream, k, np.asarray(frame), getattr(frame, "time", None) or float(k))
            size = frame.nbytes + 13 * frame.shape[0] * frame.shape[1]  # with flow, uncertainty and occlusion
            if (k + 2) * size > byte_limit:
                job.problem = f"only the first {k + 1} frames: more would take over {byte_limit >> 20} MB"
                break
        if not job.done:
            raise FleetflowError(f"{job.request.names[0]} has one frame only; a flow needs two")
        job.total = job.done
        job.end(DONE, job.problem)
    except FleetflowError as error:
        job.end(FAILED, str(error))
    except MemoryError:
        job.end(FAILED, "out of memory; take a smaller size")
    except Exception as error:
        job.end(FAILED, f"our fault: {type(error).__name__}: {error}")
        raise


def _frames(request: Request, limit: int) -> tuple[Iterator[np.ndarray], int | None]:
    """The frames of a request, and the number of its pairs if that is known."""
    if len(request.sources) == 2:
        first, second = map(read_image, request.sources)
        if first.shape[:2] != second.shape[:2]:
            sizes = " and ".join(
                f"{name} is {image.shape[1]}x{image.shape[0]}" for name, image in zip(request.names, (first, second))
            )
            raise FleetflowError(f"{sizes}; both must have the same size: crop or resize one")
        return iter((first, second)), 1
    reader = read_video(request.sources[0])
    known = getattr(reader, "frames", None)
    return islice(iter(reader), limit), None if known is None else max(min(known, limit) - 1, 1)


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
    np.save(job.folder / f"flow_{k - 1}.npy", flow)
    planes = {"uncertainty": step.uncertainty, "occlusion": step.occlusion}
    job.planes = tuple(name for name, plane in planes.items() if plane is not None)
    if step.uncertainty is not None:
        np.save(job.folder / f"uncertainty_{k - 1}.npy", step.uncertainty.astype(np.float32))
    if step.occlusion is not None:
        np.save(job.folder / f"occlusion_{k - 1}.npy", (step.occlusion * np.float32(255)).astype(np.uint8))
    job.motion.append(float(np.linalg.norm(flow, axis=-1).mean()))
    job.scales.append(robust_scale(flow))
    job.done += 1


def _predictor(request: Request) -> Predictor:
    return _cached_predictor(request.network, request.iterations, request.size)


@lru_cache(maxsize=3)
def _cached_predictor(network: str, iterations: int | None, size: tuple[int, int] | None) -> Predictor:
    return Predictor(network, iterations=iterations, size=size)


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
                if owner in self._waiting:  # behind the others
                    self._waiting[owner] = self._waiting.pop(owner)
            try:
                self._run(job)
            finally:
                self._running = None


def event(facts: dict) -> bytes:
    """Returns facts as one server-sent event."""
    return f"data: {json.dumps(facts)}\n\n".encode()
