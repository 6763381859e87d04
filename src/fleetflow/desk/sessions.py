"""Sessions of the desk: one tab of a browser each, with its files, its jobs, and limits that are enforced."""

import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fleetflow.desk.jobs import Job
from fleetflow.io.images import IMAGE_SUFFIXES, read_image
from fleetflow.io.video import read_video
from fleetflow.types import FleetflowError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")


@dataclass(frozen=True)
class Limits:
    """What one visitor may take; stated on the page and enforced by the server."""

    upload_mb: int = 256  # of one file
    session_mb: int = 1024  # of all files of a session
    files: int = 32  # of a session; the oldest go first
    pixels: int = 16_000_000  # of a frame
    frames: int = 240  # of a clip
    result_mb: int = 2048  # of the results of one job
    jobs: int = 4  # of a session that wait at once
    kept: int = 4  # finished jobs of a session whose results are kept
    sessions: int = 64
    idle_seconds: int = 6 * 3600  # after which a session ends


@dataclass
class Upload:
    """A file that was received, by its place in the temporary folder."""

    path: Path
    name: str  # as the user knows it
    kind: str  # "picture" or "clip"
    width: int
    height: int
    frames: int | None

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
    jobs: dict[str, Job] = field(default_factory=dict)
    seen: float = field(default_factory=time.monotonic)


class Sessions:
    """All sessions, in one temporary folder that is gone afterwards."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self._all: dict[str, Session] = {}
        self._lock = threading.Lock()

    def begin(self) -> Session:
        """Returns a new session; the one idle for longest makes room where there are too many."""
        self.end_idle()
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

    def end_idle(self) -> list[Session]:
        """Ends the sessions that nobody has used for long; returns them."""
        oldest = time.monotonic() - self.limits.idle_seconds
        idle = [session for session in list(self._all.values()) if session.seen < oldest]
        for session in idle:
            self.end(session)
        return idle


async def receive(session: Session, name: str, chunks: AsyncIterator[bytes], limits: Limits) -> Path:
    """Writes a body into the session's folder while it arrives; returns the file.

    Raises:
        FleetflowError: for a suffix that no reader knows, and as soon as the body is over a limit.
    """
    suffix = PurePosixPath(name.replace("\\", "/")).suffix.lower()
    if suffix not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        raise FleetflowError(f'"{suffix}" is no suffix of a picture or clip; expected .png, .jpg, .mp4, ...')
    stored = sum(upload.path.stat().st_size for upload in list(session.files.values()))
    room = min(limits.upload_mb << 20, (limits.session_mb << 20) - stored)
    path, size = session.folder / f"{secrets.token_hex(8)}{suffix}", 0
    try:
        with open(path, "xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > room:
                    raise FleetflowError(f"{name} is over {room >> 20} MB, the room there is; send a smaller file")
                file.write(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def looked_at(path: Path, name: str, limits: Limits) -> Upload:
    """Returns what a received file is, by decoding its first frame as the command line does.

    Raises:
        FleetflowError: for files that are no picture and no clip, or too large; the file is gone then.
    """
    try:
        if path.suffix in IMAGE_SUFFIXES and path.suffix != ".gif":
            image = read_image(path)
            upload = Upload(path, name, "picture", image.shape[1], image.shape[0], 1)
        else:
            reader = read_video(path)
            frame = next(iter(reader))
            upload = Upload(path, name, "clip", frame.shape[1], frame.shape[0], getattr(reader, "frames", None))
    except (FleetflowError, StopIteration) as error:
        path.unlink(missing_ok=True)
        raise FleetflowError(str(error).replace(str(path), name) or f"{name} has no frame") from None
    if upload.width * upload.height > limits.pixels:
        path.unlink(missing_ok=True)
        raise FleetflowError(
            f"{name} is {upload.width}x{upload.height}; expected at most {limits.pixels / 1e6:.0f} million pixels"
        )
    return upload
