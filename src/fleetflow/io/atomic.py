"""What readers and writers share: one-line errors, sizes checked before memory is taken, temporary files, locks."""

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from av.error import FFmpegError
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fleetflow.io.formats import not_this
from fleetflow.types import FleetflowError


def existing(path: str | os.PathLike) -> Path:
    """Returns the path of a file that is there, with `~` as the home folder; raises FleetflowError for others."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        what = (
            "is a folder"
            if os.path.isdir(path)
            else "is a pipe or device"
            if os.path.exists(path)
            else "does not exist"
        )
        raise FleetflowError(f"{path} {what}; expected a file")
    return path


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what a library raises at a damaged or foreign file into one line about `path`.

    Args:
        path: the file that is read in the block.
        kind: what it is read as, such as "a picture"; if it is something else that is known, the line says so.
    """
    try:
        yield
    except FleetflowError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, RuntimeError, ...
        why = not_this(path, kind) or f"({reason(error)}); get a complete copy"
        raise FleetflowError(f"{path} cannot be read as {kind}{':' * (why[0] != '(')} {why}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FFmpegError, SafetensorError) as error:
        message = f"{path} cannot be written ({reason(error)}); check the folder and the space left"
        raise FleetflowError(message) from error


def reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def temporary_name(path: Path) -> Path:
    """Returns the name of a file that does not exist yet, hidden, in the folder and with the suffix of `path`."""
    return path.with_name(f".part-{uuid.uuid4().hex[:12]}{path.suffix.lower()}")


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Returns nothing: `write(temporary)` writes a file, which then takes the name `path` in one step.

    The folder is created. Where `write` raises, `path` stays as it was and the temporary file is removed.

    Raises:
        FleetflowError: Where the file cannot be written; other errors of `write` pass through.
    """
    path = Path(os.path.expanduser(path))
    if not path.name:
        raise FleetflowError(f'"{path}" names no file; give the file to write')
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with held(temporary):
                mode = temporary.stat().st_mode
                write(temporary)
                os.chmod(temporary, mode)  # safetensors makes files that nobody else may read
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


LEFTOVER = re.compile(r"\.part-[0-9a-f]{12}(\.\w+)?")  # what `temporary_name` makes
LEFTOVER_AGE = 24 * 3600  # seconds after which a leftover goes where the file system knows no locks
LOCK = ".fleetflow.lock"

_open_locks: set[BinaryIO] = (
    set()
)  # a child that is forked closes its copies: a lock ends with the process that took it


def _close_in_child() -> None:
    for file in _open_locks:
        file.close()
    _open_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(file: BinaryIO) -> bool | None:
    """Locks an open file for this process; returns True, False where another one has it, None where locks are unknown.

    The system ends the lock with the process, however it dies.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Creates a temporary file, and shows `remove_leftovers` in other processes that it is being written."""
    temporary.touch()
    if fcntl is None:  # and a file that is open cannot be renamed there
        yield
        return
    with temporary.open("rb") as file:
        _lock(file)
        _open_locks.add(file)
        try:
            yield
        finally:
            _open_locks.discard(file)


def remove_leftovers(folder: str | os.PathLike) -> list[Path]:
    """Removes the temporary files of killed runs from a folder (not those below it) and returns them.

    Only files that are called as `temporary_name` calls them and that no living process is writing. Where the file
    system knows no locks, those that have not changed for a day.
    """
    removed = []
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not LEFTOVER.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError), path.open("rb") as file:
            free = _lock(file)
            if free or (free is None and time.time() - path.stat().st_mtime > LEFTOVER_AGE):
                path.unlink()
                removed.append(path)
    return removed


@contextmanager
def lock_folder(folder: str | os.PathLike, what: str, *, patience: float = 0) -> Iterator[None]:
    """Keeps other runs out of a folder, which is created, until the block ends or this process dies.

    Args:
        folder: where the results of a run lie.
        what: the run, for the message that another one gets, such as "predict clip.mp4".
        patience: seconds to wait for the run that has it.

    Raises:
        FleetflowError: another run has the folder; the message says which, its process, its machine, and since when.
    """
    folder = Path(folder)
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked_file(path, time.monotonic() + patience)
    holder = {"what": what, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M")}
    _open_locks.add(file)
    try:
        with writing(path):
            file.truncate(0)
            file.write(json.dumps(holder).encode())
            file.flush()
        yield
    finally:
        _open_locks.discard(file)
        if not file.closed:  # as it is in a forked child
            if fcntl is None:  # an open file cannot be removed there
                file.close()
            with suppress(OSError):
                path.unlink()
            file.close()


def _locked_file(path: Path, until: float) -> BinaryIO:
    """Returns the lock file at `path`, open and locked; raises FleetflowError where another run has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        free = _lock(file)
        text = file.read(4096)
        file.seek(0)
        if free is False or (free is None and not _dead(text)):
            file.close()
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise FleetflowError(_holder(path, text, free is None))
        with suppress(OSError):
            if free is None or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return file
        file.close()  # the run that had it has ended and removed it: take a new one


def _holder(path: Path, text: bytes, by_hand: bool) -> str:
    """The message about the run that has the lock."""
    try:
        known = json.loads(text)
        who = f'"{known["what"]}" (process {known["pid"]} on {known["host"]}, since {known["since"]})'
    except (ValueError, TypeError, KeyError):
        who = "another run"
    advice = f"; if it has ended, remove {path}" if by_hand else ""
    return f"{path.parent} is in use by {who}; wait for it, or choose another folder{advice}"


def _dead(text: bytes) -> bool:
    """Whether the run that wrote this into a lock file has ended: known of processes of this machine only."""
    if not text:
        return True
    try:
        known = json.loads(text)
        if known["host"] != socket.gethostname() or os.name == "nt":  # where os.kill has another meaning
            return False
        os.kill(known["pid"], 0)  # asks only
    except ProcessLookupError:
        return True
    except (ValueError, TypeError, KeyError, OSError, OverflowError):
        return False
    return False
