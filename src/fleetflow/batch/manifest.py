"""Lists of clips: text, CSV or Parquet, wherever fsspec reaches; every item has an id that stays the same."""

import csv
import hashlib
import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np

from fleetflow.io.atomic import reason, write_atomically
from fleetflow.io.images import IMAGE_SUFFIXES
from fleetflow.types import FleetflowError

VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".mov",
    ".avi",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".ogv",
    ".y4m",
)
FRAMES = 10**8  # that a clip may have: 46 days
LINE = 2**16  # characters in a line of a text or CSV manifest, at most
COLUMN = 2**28  # bytes that one column of one row group of a Parquet manifest may unpack to
ID = re.compile(r"[^\s./\\\0-\x1f][^/\\\0-\x1f]*")
ID_BYTES = 150  # the name of a folder may have 255


class Item(NamedTuple):
    """One line of a manifest."""

    id: str  # the name of its folder of results
    input: str  # a path, or an address that fsspec knows, such as s3://bucket/clip.mp4
    frames: int | None = None  # as far as the manifest says it


def place(url: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of an address and the path in it; what has no "://" is a local path.

    Raises:
        FleetflowError: fsspec does not know the scheme, or lacks its driver.
    """
    url = str(url)
    if "://" not in url:
        return fsspec.filesystem("file"), str(Path(os.path.expanduser(url)))
    if "::" in url:
        raise FleetflowError(f"{url} chains file systems; give the address of the file itself")
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise FleetflowError(f"{url} cannot be reached ({reason(error)}); install the driver of this scheme") from None


def local(url: str | Path) -> Path | None:
    """Returns the path on this machine that an address means, links followed; None where it means another place."""
    scheme, colons, _ = str(url).partition("://")
    if not colons or scheme in ("file", "local"):
        with suppress(ValueError):  # no file has this name, which is said when it is to be read
            return Path(os.path.realpath(place(url)[1]))
    return None


def read_manifest(url: str | Path) -> Iterator[Item]:
    """Yields the items of a manifest, one at a time, whatever its length.

    A text file has an input a line; empty lines and those that begin with # count for nothing. CSV (.csv) and Parquet
    (.parquet, needs pyarrow) have a column `input`, and if they like, `id` and `frames` (an integer: how many pictures
    the clip has, so that nobody has to look). Paths are relative to the folder of the manifest. An item without an id
    gets one from its input as it is written: the name of the file and a hash.

    Args:
        url: a path, or an address that fsspec knows.

    Raises:
        FleetflowError: the manifest cannot be read, has no such column, or a line of it is wrong; the message says which.
    """
    files, path = place(url)
    kind = Path(path).suffix.lower()
    if not files.isfile(path):
        raise FleetflowError(f"{url} is no file; expected a list of clips: text, .csv or .parquet")
    folder = str(url).rpartition("/")[0] if "://" in str(url) else str(Path(path).parent)
    rows = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(kind, _text_rows)
    with files.open(path, "rb") as opened:
        file: Any = opened  # fsspec's type allows for text
        try:
            for number, row in rows(file):
                with _line(url, number):
                    yield _item(row, folder)
        except (OSError, ValueError, csv.Error) as error:
            if isinstance(error, FleetflowError):
                raise
            raise FleetflowError(
                f"{url} cannot be read as a manifest ({reason(error)}); get a complete copy"
            ) from error


@contextmanager
def _line(url: str | Path, number: int) -> Iterator[None]:
    """Puts the line in front of what is wrong with it."""
    try:
        yield
    except FleetflowError as error:
        raise FleetflowError(f"{url}, line {number}: {error}") from None


def _lines(file: BinaryIO) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    while line := text.readline(LINE + 1):
        if len(line) > LINE or "\0" in line:
            raise FleetflowError(f"a line is over {LINE} characters long, or is no text; expected a list of clips")
        yield line


def _text_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(file), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield number, {"input": line}


def _csv_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    table = csv.DictReader(_lines(file))
    _check_columns(table.fieldnames or ())
    for row in table:
        yield table.line_num, row


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise FleetflowError("Parquet needs pyarrow; pip install 'fleetflow[batch]', or give CSV") from None
    table = parquet.ParquetFile(file)
    _check_columns(table.schema_arrow.names)
    wanted = [name for name in Item._fields if name in table.schema_arrow.names]
    for group in range(table.metadata.num_row_groups):
        about = table.metadata.row_group(group)
        sizes = [about.column(k) for k in range(about.num_columns)]
        for size in sizes:
            if size.path_in_schema in wanted and size.total_uncompressed_size > COLUMN:
                raise FleetflowError(f"a row group is over {COLUMN >> 20} MiB; write the list in smaller row groups")
    number = 0
    for batch in table.iter_batches(1024, columns=wanted):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _check_columns(names: Iterable[str]) -> None:
    if "input" not in names:
        raise FleetflowError(f"the columns are {', '.join(names) or 'none'}; expected input, and perhaps id and frames")


def _item(row: dict, folder: str) -> Item:
    given, id = row.get("input") or "", row.get("id")
    if not isinstance(given, str):
        raise FleetflowError(
            f"the input is of type {type(given).__name__}; expected text: the path or address of a clip"
        )
    given = given.strip()
    if not given:
        raise FleetflowError("no input is given; expected the path or address of a clip")
    name = ("" if id is None else str(id).strip()) or item_id(given)
    if not ID.fullmatch(name) or len(name.encode("utf-8", "surrogateescape")) > ID_BYTES:
        raise FleetflowError(f'the id is "{name}"; expected the name of a folder: no slash, no dot at its beginning')
    return Item(name, _whole(given, folder), _frame_count(row.get("frames")))


def _frame_count(said) -> int | None:
    if said in (None, ""):
        return None
    try:
        count = int(said)
    except (ValueError, TypeError, OverflowError):
        count = 0
    if not 1 <= count <= FRAMES or (isinstance(said, float) and said != count):
        raise FleetflowError(f"frames is {said}; expected a whole number from 1 to {FRAMES:,}")
    return count


def _whole(given: str, folder: str) -> str:
    """The path or address of an input that may be relative to the folder of its list."""
    if "://" in given:
        return given
    path = Path(os.path.expanduser(given))
    if "://" in folder and not path.is_absolute():
        return f"{folder}/{given}"
    return os.path.abspath(Path(folder) / path)


def item_id(given: str) -> str:
    """Returns the id of an item that has none: the name of its file, and twelve hexadecimal digits of its input's SHA-256."""
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    stem = re.sub(r"[^\w-]+", "-", Path(given).stem).strip("-")
    return f"{stem[:60] or 'clip'}-{digest}".encode("utf-8", "replace").decode().replace("?", "-")


class Ids:
    """A set of ids that takes eight bytes of each."""

    def __init__(self, ids: Iterable[str] = ()):
        self._keys, self._distinct = array("Q"), np.zeros(0, np.uint64)
        for id in ids:
            self.add(id)

    def add(self, id: str) -> None:
        self._keys.append(_key(id))

    @property
    def count(self) -> int:
        """How many were added."""
        return len(self._keys)

    def distinct(self) -> np.ndarray:
        """Returns their keys, uint64, in order, each once. Call it after the last was added."""
        if not len(self._distinct):
            self._distinct = np.unique(np.array(self._keys, np.uint64))
        return self._distinct

    def common(self, other: "Ids") -> int:
        """Returns how many ids both have."""
        return len(np.intersect1d(self.distinct(), other.distinct(), assume_unique=True))

    def __contains__(self, id: str) -> bool:
        keys, key = self.distinct(), np.uint64(_key(id))
        place = np.searchsorted(keys, key)
        return bool(place < len(keys) and keys[place] == key)


def _key(id: str) -> int:
    digest = hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def checked(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items, and keeps eight bytes of each, so that an id that comes twice is found at the end.

    Raises:
        FleetflowError: behind the last item, where two have one id, or where there is none.
    """
    ids = Ids()
    for item in items:
        ids.add(item.id)
        yield item
    if not ids.count:
        raise FleetflowError("the manifest has no item; expected the path of a clip a line")
    if twice := ids.count - len(ids.distinct()):
        raise FleetflowError(f"{twice} of {ids.count} items have the id of another one; give each clip once")


def clips_in(folder: str | Path) -> Iterator[Item]:
    """Yields the clips below a folder, in the order of their names: videos, and folders of two pictures or more.

    The id of each comes from its path in the folder, so it stays when the folder is moved.

    Args:
        folder: a path, or an address that fsspec knows; hidden files and folders are left out.
    """
    files, root = place(folder)
    if not files.isdir(root):
        raise FleetflowError(f"{folder} is no folder; expected one with videos or folders of pictures")
    start = "" if "://" not in str(folder) else str(folder).partition("://")[0] + "://"
    root = root if start else os.path.realpath(root)
    for path, folders, names in files.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        below = str(path).removeprefix(root).strip("/")
        found = [name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
        if sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names) >= 2:
            yield Item(item_id(below or Path(root).name), start + str(path))
        for name in found:
            yield Item(item_id(f"{below}/{name}".strip("/")), f"{start}{path}/{name}")


def write_manifest(items: Iterable[Item], path: Path) -> int:
    """Writes a manifest, CSV or Parquet as its suffix says; returns how many items there are.

    Raises:
        FleetflowError: for another suffix, no item, and where it cannot be written.
    """
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise FleetflowError(f"{path} has not the suffix .csv or .parquet; name the manifest so")
    count = 0

    def counted() -> Iterator[Item]:
        nonlocal count
        for item in checked(items):
            count += 1
            yield item

    write = _write_csv if path.suffix.lower() == ".csv" else _write_parquet
    write_atomically(path, lambda temporary: write(counted(), temporary))
    return count


def _write_csv(items: Iterable[Item], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(Item._fields)
        table.writerows(items)


def _write_parquet(items: Iterable[Item], path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FleetflowError("Parquet needs pyarrow; pip install 'fleetflow[batch]', or write .csv") from None
    schema = pyarrow.schema([("id", pyarrow.string()), ("input", pyarrow.string()), ("frames", pyarrow.int64())])
    items = iter(items)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(items, 10_000)):
            columns = dict(zip(Item._fields, map(list, zip(*some))))
            writer.write_table(pyarrow.table(columns, schema=schema))
