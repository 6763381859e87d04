"""Sessions of the desk: one tab of a browser each, with its files, its jobs, and limits that are enforced."""

import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from fleetflow.desk.jobs import DONE, ENDED, Job
from fleetflow.inference.pairing import picture_size
from fleetflow.io.atomic import reason
from fleetflow.io.images import IMAGE_SUFFIXES, read_image
from fleetflow.io.video import VideoReader
from fleetflow.types import FleetflowError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")


@dataclass(frozen=True)
class Limits:
    """What one visitor may take; stated on the page and enforced by the server."""

    upload_mb: int = 256  # of one file
    session_mb: int = 1024  # of all files of a session
    files: int = 32  # of a session; the oldest go first, but not those of jobs that wait or run
    pixels: int = 4096 * 4096  # of a frame, as much as a canvas of all browsers holds
    frames: int = 240  # of a clip
    result_mb: int = 2048  # of the results of one job
    jobs: int = 4  # of a session that wait at once
    kept: int = 4  # finished jobs of a session whose results are kept
    memory: int | None = None  # bytes that the desk may take for its networks, see `Predictor`
    sessions: int = 64
    idle_seconds: int = 6 * 3600  # after which a session ends
    crowded_seconds: int = 600  # after which it ends where others want to begin and have no room


@dataclass
class Upload:
    """A file that was received, by its place in the temporary folder."""

    path: Path
    name: str  # as the user knows it
    kind: str  # "picture" or "clip"
    width: int
    height: int
    frames: int | None
    size: int  # bytes

    def described(self, key: str) -> dict:
        """Returns what the browser is told about it."""
        facts = {"id": key, "name": self.name, "kind": self.kind}
        return {**facts, "width": self.width, "height": self.height, "frames": self.frames}


@dataclass
class Session:
    """One tab: its folder, files and jobs."""

    key: str
    folder: Path
    files: dict[str, Upload] = field(default_factory=dict)
    arriving: dict[Path, int] = field(default_factory=dict)  # bytes of uploads that are not looked at yet
    jobs: dict[str, Job] = field(default_factory=dict)
    seen: float = field(default_factory=time.monotonic)

    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return any(job.state not in ENDED for job in self.jobs.values())

    def make_room(self, limits: Limits) -> None:
        """Drops the oldest files until the limits hold; raises FleetflowError where jobs or uploads need them all."""
        needed = {path for job in self.jobs.values() if job.state not in ENDED for path in job.request.sources}
        idle = [key for key, upload in self.files.items() if upload.path not in needed]
        while self._is_over(limits):
            if not idle:
                room = f"{limits.files} files and {limits.session_mb} MB"
                raise FleetflowError(f"there is no room beside {room} at once; wait for the jobs of this page to end")
            self.files.pop(idle.pop(0)).path.unlink(missing_ok=True)

    def _is_over(self, limits: Limits) -> bool:
        size = sum(upload.size for upload in self.files.values()) + sum(self.arriving.values())
        return len(self.files) + len(self.arriving) > limits.files or size > limits.session_mb << 20


class Sessions:
    """All sessions, in one temporary folder that is gone afterwards."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self._all: dict[str, Session] = {}
        self._lock = threading.Lock()

    def begin(self) -> Session:
        """Returns a new session; where there are too many, the one idle for longest and for ten minutes makes room."""
        if len(self._all) >= self.limits.sessions:
            idle = min((session for session in self._all.values() if not session.busy()), key=_seen, default=None)
            if idle is not None and time.monotonic() - idle.seen >= self.limits.crowded_seconds:
                self.end(idle)
        with self._lock:
            if len(self._all) >= self.limits.sessions:
                raise FleetflowError(f"{len(self._all)} pages are open; close one of them and reload")
            key = secrets.token_urlsafe(18)
            session = self._all[key] = Session(key, self.folder / key)
            session.folder.mkdir()
            return session

    def get(self, key: str) -> Session | None:
        """Returns the session of a key, or None."""
        session = self._all.get(key)
        if session is not None:
            session.seen = time.monotonic()
        return session

    def end(self, session: Session) -> None:
        """Forgets a session and removes its files."""
        with self._lock:
            self._all.pop(session.key, None)
        shutil.rmtree(session.folder, ignore_errors=True)

    def clear_up(self, job: Job) -> None:
        """Removes what a job has left that ended without results, or whose session ended before it."""
        if job.owner not in self._all:
            shutil.rmtree(job.folder.parent, ignore_errors=True)
        elif job.state != DONE:
            shutil.rmtree(job.folder, ignore_errors=True)

    def end_idle(self) -> list[Session]:
        """Ends the sessions that nobody has used for long; returns them."""
        oldest = time.monotonic() - self.limits.idle_seconds
        idle = [session for session in list(self._all.values()) if session.seen < oldest]
        for session in idle:
            self.end(session)
        return idle


def _seen(session: Session) -> float:
    return session.seen


def cleaned(name: str) -> str:
    """Returns the last part of a name, at most 200 characters of it, without line breaks and what turns text around."""
    last = re.split(r"[/\\]", name)[-1][-200:]
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "_", last)


async def receive(session: Session, name: str, chunks: AsyncIterator[bytes], limits: Limits) -> Path:
    """Writes a body into the session's folder while it arrives; returns the file, which counts as arriving.

    Raises:
        FleetflowError: for a suffix that no reader knows, as soon as the body is over a limit, and for a full disk.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        raise FleetflowError(f'"{suffix}" is no suffix of a picture or clip; expected .png, .jpg, .mp4, ...')
    path = session.folder / f"{secrets.token_hex(8)}{suffix}"
    session.arriving[path] = 0
    try:
        session.make_room(limits)
        with open(path, "xb") as file:
            async for chunk in chunks:
                session.arriving[path] += len(chunk)
                if session.arriving[path] > limits.upload_mb << 20:
                    raise FleetflowError(f"{name} is over {limits.upload_mb} MB; send a smaller file")
                session.make_room(limits)
                file.write(chunk)
    except BaseException as error:
        del session.arriving[path]
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise FleetflowError(
                f"{name} cannot be stored ({reason(error)}); free some space for temporary files"
            ) from error
        raise
    return path


def looked_at(path: Path, name: str, limits: Limits) -> Upload:
    """Returns what a received file is, by decoding its first frames as the command line does.

    Raises:
        FleetflowError: for files that are no picture and no clip, or too large; the file is gone then.
    """
    try:
        kind, width, height, frames = _looked_at(path, name, limits)
        return Upload(path, name, kind, width, height, frames, path.stat().st_size)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, MemoryError):
            raise FleetflowError(f"{name} takes more memory than there is; send smaller frames") from None
        if isinstance(error, FleetflowError):
            raise FleetflowError(str(error).replace(str(path), name)) from None
        raise


def _looked_at(path: Path, name: str, limits: Limits) -> tuple[str, int, int, int | None]:
    """Kind, width, height and number of frames; sizes are checked before anything is decoded."""
    if path.suffix in IMAGE_SUFFIXES:
        _check_pixels(name, *picture_size(path), limits)
        height, width = read_image(path).shape[:2]
        return "picture", width, height, 1
    reader = VideoReader(path)
    _check_pixels(name, reader.height, reader.width, limits)
    count = sum(1 for _ in islice(reader, 2))
    if count == 0:
        raise FleetflowError(f"{name} has no frame")
    if count == 1 and path.suffix != ".gif":
        raise FleetflowError(f"{name} has one frame only; a flow needs two")
    return ("clip" if count > 1 else "picture"), reader.width, reader.height, reader.frames if count > 1 else 1


def _check_pixels(name: str, height: int, width: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise FleetflowError(f"{name} is {width}x{height}; expected at most {limits.pixels / 1e6:.3g} million pixels")
