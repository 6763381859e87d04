"""The temporary folder of a desk: gone afterwards, and so are those of desks that were killed."""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fleetflow.io.atomic import LOCK, lock_folder
from fleetflow.types import FleetflowError

PREFIX = "fleetflow-desk-"
YOUNG = 60.0  # seconds in which another desk, which has just made its folder, gets round to locking it


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields an empty folder that nobody else can read; it is removed at the end, and first what killed desks left."""
    remove_killed(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        with lock_folder(Path(name), "fleetflow desk"):
            content = Path(name) / "content"
            content.mkdir()
            yield content


def remove_killed(parent: Path) -> list[Path]:
    """Removes the folders of desks that no process holds any more, only this user's, and returns them."""
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, FleetflowError):  # in use, or gone meanwhile
            state = folder.lstat()
            own = not hasattr(os, "getuid") or state.st_uid == os.getuid()
            if not stat.S_ISDIR(state.st_mode) or not own:
                continue
            if not (folder / LOCK).exists() and time.time() - state.st_mtime < YOUNG:
                continue
            with lock_folder(folder, "fleetflow desk"):
                shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed
