"""The files of a data set, listed once: an index of its folders, kept in the user's cache.

A folder's time of change moves when an entry comes or goes, so one look at that time saves listing it again: for
22,872 pairs in one folder, or in ten thousand folders on a shared disk.
"""

import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fleetflow.data.dataset import Files, Pair
from fleetflow.io.atomic import remove_leftovers, write_atomically
from fleetflow.types import FleetflowError

SMALL = 1000  # so many names are listed faster than an index is read
SETTLED = 2e9  # nanoseconds: a folder that changed just now may change again within the same tick of the clock


def digits(count: int) -> str:
    """Returns the pattern of so many digits, for `Listing.find`: other names, which are no frames, do not match."""
    return "[0-9]" * count


class Listing:
    """What lies below `root`. Paths here are relative to it, with slashes."""

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FleetflowError(f"{root} is not a folder; give the folder that holds the data set")
        self._index = _index_file(self.root)
        self._stored = _stored(self._index)
        self._folders: dict[str, frozenset[str]] = {}
        self._fresh: dict[str, list] = {}

    def names(self, folder: str) -> frozenset[str]:
        """Returns the names in the folder; none where it is missing, or is a file."""
        if folder not in self._folders:
            try:
                changed = os.stat(self.root / folder).st_mtime_ns
                known = self._stored.get(folder)
                if known and known[0] == changed:
                    names = known[1]
                else:
                    names = os.listdir(self.root / folder)
                    if time.time_ns() - changed > SETTLED:
                        self._fresh[folder] = [changed, names]
            except (FileNotFoundError, NotADirectoryError):
                names = []
            self._folders[folder] = frozenset(names)
        return self._folders[folder]

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.replace(os.sep, "/").rpartition("/")
        return name in self.names(folder)

    def find(self, *patterns: str) -> list[str]:
        """Returns the paths that match one of the patterns, such as training/flow/*/frame_*.flo, sorted."""
        everything: set[str] = set()
        for pattern in patterns:
            found = {""}
            for part in pattern.split("/"):
                if not any(sign in part for sign in "*?["):
                    found = {f"{folder}/{part}".lstrip("/") for folder in found}
                    continue
                matches = re.compile(fnmatch.translate(part)).match
                found = {
                    f"{folder}/{name}".lstrip("/")
                    for folder in found
                    for name in self.names(folder)
                    if matches(name) and not name.startswith(".")  # as a shell; what a killed run leaves begins so
                }
            everything |= {path for path in found if path in self}
        return sorted(everything)

    def require(self, archive: str, *folders: str) -> None:
        """Returns nothing; raises FleetflowError naming the first folder that is missing or empty."""
        for folder in folders:
            if not self.names(folder):
                raise FleetflowError(f"{self.root} holds no {folder}; expected what is in {archive}")

    def files(self, pairs: list[Pair], archive: str, example: str, truths: Sequence[Path] = ()) -> Files:
        """Returns the pairs as `Files` and keeps the index.

        Raises:
            FleetflowError: Where there are none (`example` says what was looked for), or a frame or one of `truths` is
                missing.
        """
        if not pairs:
            raise FleetflowError(f"{self.root} holds no {example}; expected what is in {archive}")
        needed = [path for pair in pairs for path in (pair.frame1, pair.frame2)]
        above = "" if str(self.root) == "." else os.path.join(self.root, "")  # relative_to() is slow for 1e5 paths
        missing = {path for path in (str(path).removeprefix(above) for path in (*needed, *truths)) if path not in self}
        if missing:
            count = len(missing)
            raise FleetflowError(f"{self.root} lacks {count} files, the first {min(missing)}; get {archive} again")
        self._keep()
        return Files(pairs)

    def _keep(self) -> None:
        if self._index and sum(len(names) for _, names in self._fresh.values()) >= SMALL:
            index = json.dumps({**self._stored, **self._fresh})
            with suppress(FleetflowError, UnicodeError):  # a home that cannot be written costs time only
                remove_leftovers(self._index.parent)
                write_atomically(self._index, lambda temporary: temporary.write_text(index))


def _index_file(root: Path) -> Path | None:
    """Returns where the index of a data set is kept; None where the user has no home, which costs time only."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = given if given.is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored (its norm)
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    except (OSError, RuntimeError):  # a user without an entry in the list of users has no home
        return None
    return cache / "fleetflow" / "listings" / f"{name}.json"


def _stored(index: Path | None) -> dict[str, list]:
    """Returns the index, folder -> [time of its last change, names]; empty where there is none or it is damaged."""
    if index is None:
        return {}
    try:
        stored = json.loads(index.read_text())
        whole = all(isinstance(changed, int) and all(isinstance(name, str) for name in names)
                    for changed, names in stored.values())  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return stored if whole else {}
