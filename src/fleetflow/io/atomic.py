"""What readers and writers share: one-line errors, sizes checked before memory is taken, temporary files, renames."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av

from fleetflow.types import FleetflowError

PIXEL_LIMIT = 2**28  # pixels in one picture or flow field; a flow field of this size takes 2 GiB
DEFLATE_LIMIT = 1032  # DEFLATE packs at most 1032 bytes into one (zlib.net/zlib_tech.html)


def existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not os.path.isfile(path):
        raise FleetflowError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a file")
    return path


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what a library raises at a damaged or foreign file into one line about `path`."""
    try:
        yield
    except FleetflowError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, RuntimeError, ...
        raise FleetflowError(f"{path} cannot be read as {kind} ({reason(error)}); get a complete copy") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        message = f"{path} cannot be written ({reason(error)}); check the folder and the space left"
        raise FleetflowError(message) from error


def reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def check_size(path: Path, height: int, width: int, needed: int = 0, present: int = 0) -> None:
    """Raises FleetflowError unless height x width pixels are allowed and `present` bytes can hold the `needed` ones."""
    if height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise FleetflowError(f"{path} claims {height}x{width} pixels; expected at least 1x1 and at most 2^28 pixels")
    if needed > present:
        raise FleetflowError(f"{path} claims {height}x{width} pixels but is too short for them; get a complete copy")


def temporary_name(path: Path) -> Path:
    """Returns the name of a file that does not exist yet, hidden, in the folder and with the suffix of `path`."""
    return path.with_name(f".part-{uuid.uuid4().hex[:12]}{path.suffix.lower()}")


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Returns nothing: `write(temporary)` writes a file, which then takes the name `path` in one step.

    The folder is created. Where `write` raises, `path` stays as it was and the temporary file is removed.
    Raises FleetflowError where the file cannot be written; other errors of `write` pass through.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            os.chmod(temporary, mode)  # safetensors makes files that nobody else may read
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
