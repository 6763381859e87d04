"""The folder of a batch: results with a record each, settings, the list of items; local, or wherever fsspec reaches.

    OUT/ID/                         the results of an item and their record.json; both are there, or neither
    OUT/.batch/settings.json        what the results depend on
    OUT/.batch/run.json             the run that may write now
    OUT/.batch/progress.json        how far it is
    OUT/.batch/items/00000.jsonl    the manifest, a thousand items a file
    OUT/.batch/list.json            where the manifest was
    OUT/.batch/parts/ID/0000/       ranges of a long clip until they are joined, with a record each
    OUT/.batch/failed/ID.json       the record of an item that failed
    OUT/.batch/tries/ID             how often a worker began with it
    OUT/.batch/work/RUN/            unfinished results, in a local folder

In a local folder results and record appear with one rename of their folder. In an object store, which has no rename, a
copy of the record is written last, as OUT/.batch/records/ID.json, where all are listed quickly; without it results do not
count.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from fleetflow.batch.manifest import Ids, Item, place
from fleetflow.io.atomic import lock_folder, write_atomically, writing
from fleetflow.types import FleetflowError

RECORD = "record.json"
CONTROL = ".batch"
SHARD = 1000  # items in one file of the list
LEASE = 120.0  # seconds after which a run in an object store that has not renewed its lease counts as dead
RENEW = 20.0


@dataclass(frozen=True)
class Record:
    """What is known of one result, or of why there is none.

    Attributes:
        id: of the item.
        input: its path or address.
        outcome: "done" or "failed".
        reason: one line, if it failed.
        input_sha256: of the file; of a folder, of the names and contents of its files.
        input_stamp: tells cheaply whether the input is still the same.
        label: network, SHA-256 of its weights, iterations, dtype, device.
        settings: the other things that the results depend on.
        frames: pictures that were read.
        seconds: that the work took.
        time: when it ended, UTC, ISO 8601.
        worker: machine and process.
        run: the run that it was a part of.
        tries: how often a worker began with it.
        files: size in bytes and SHA-256 of each result, by its name.
        pairs: first pair, and the pair before which it ended, of a range of a long clip; None: all of them.
    """

    id: str
    input: str
    outcome: str
    reason: str | None = None
    input_sha256: str = ""
    input_stamp: str = ""
    label: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    frames: int = 0
    seconds: float = 0.0
    time: str = ""
    worker: str = ""
    run: str = ""
    tries: int = 1
    files: dict = field(default_factory=dict)
    pairs: list | None = None


class Superseded(Exception):
    """Another run has this folder now; what this worker has made is thrown away."""


class Store:
    """The folder of a batch, for the run and for its workers. It can be pickled."""

    def __init__(self, url: str | os.PathLike):
        """Opens, does not create. url: a local path, or an address that fsspec knows."""
        self.url = str(url)
        self.files, self.root = place(self.url)
        self.local = isinstance(self.files, LocalFileSystem)
        self.root = os.path.abspath(self.root) if self.local else self.root.rstrip("/")

    def __reduce__(self):
        return Store, (self.url if not self.local else self.root,)

    def path(self, *names: str) -> str:
        return "/".join((self.root, *names))

    def control(self, *names: str) -> str:
        return self.path(CONTROL, *names)

    # small files

    def read(self, path: str) -> dict | None:
        """Returns what a file of JSON holds; None where it is not there or damaged."""
        try:
            text = Path(path).read_bytes() if self.local else self.files.cat_file(path)
            found = json.loads(text)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, path: str, content: dict | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content) + "\n"
        if self.local:
            write_atomically(path, lambda temporary: temporary.write_text(text))
            return
        with writing(Path(path)):
            self.files.pipe_file(path, text.encode())

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.local:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            else:
                self.files.rm(path, recursive=True)

    def names(self, path: str) -> Iterator[str]:
        """Yields the names in a folder; none where there is no folder."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.local:
                with os.scandir(path) as entries:
                    yield from (entry.name for entry in entries)
            else:
                yield from (each.rstrip("/").rpartition("/")[2] for each in self.files.ls(path, detail=False))

    # one run at a time

    @contextmanager
    def claimed(self, what: str) -> Iterator[str]:
        """Keeps other runs out until the block ends or the process dies; gives the name of this run.

        Raises:
            FleetflowError: another run has the folder.
        """
        run = uuid.uuid4().hex[:12]
        holder = {"run": run, "what": what, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        if self.local:
            with lock_folder(self.root, what):
                self.write(self.control("run.json"), holder)
                self._tidy()
                try:
                    yield run
                finally:
                    self._tidy()
            return
        self._lease(holder)
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(holder, ended), daemon=True)
        thread.start()
        try:
            self._tidy()
            yield run
        finally:
            ended.set()
            thread.join()
            self._tidy()
            if self.is_current(run):
                self.remove(self.control("run.json"))

    def _lease(self, holder: dict) -> None:
        path = self.control("run.json")
        known = self.read(path)
        if known is not None and time.time() - known.get("time", 0) > LEASE:
            self.remove(path)
            known = None
        if known is None:
            try:  # of two runs that come at once, one: where the store has no such mode, they look once more below
                with self.files.open(path, "xb") as opened:
                    file: Any = opened  # fsspec's type allows for text
                    file.write(json.dumps(holder).encode())
            except FileExistsError:
                pass
            except (ValueError, NotImplementedError, OSError):
                self.write(path, holder)
            known = self.read(path) or {}
        if known.get("run") != holder["run"]:
            who = f'"{known.get("what")}" (process {known.get("pid")} on {known.get("host")})'
            raise FleetflowError(
                f"{self.url} is in use by {who}; wait for it, or {LEASE:.0f} s if it was killed, or choose another folder"
            )

    def _renew(self, holder: dict, ended: threading.Event) -> None:
        while not ended.wait(RENEW):
            with suppress(Exception):  # the next time, perhaps
                if self.is_current(holder["run"]):
                    self.write(self.control("run.json"), {**holder, "time": time.time()})

    def is_current(self, run: str) -> bool:
        return (self.read(self.control("run.json")) or {}).get("run") == run

    def _tidy(self) -> None:
        """Removes what killed runs have left: this run counts anew, and only its workers write."""
        self.remove(self.control("work"))
        self.remove(self.control("tries"))

    # the list of items

    def save_items(self, items: Iterable[Item]) -> int:
        """Keeps the manifest beside the results; returns how many items there are."""
        count, shards, rows = 0, 0, []

        def flush() -> None:
            nonlocal shards
            self.write(self.control("items", f"{shards:05d}.jsonl"), "".join(rows))
            shards += 1
            rows.clear()

        for item in items:
            rows.append(json.dumps(item) + "\n")
            count += 1
            if len(rows) == SHARD:
                flush()
        if rows:
            flush()
        for name in list(self.shards())[shards:]:
            self.remove(self.control("items", name))
        return count

    def shards(self) -> list[str]:
        return sorted(name for name in self.names(self.control("items")) if name.endswith(".jsonl"))

    def items(self, shard: str) -> Iterator[Item]:
        """Yields the items of one file of the list."""
        path = self.control("items", shard)
        found: Any = Path(path).read_bytes() if self.local else self.files.cat_file(path)
        for line in found.decode().splitlines():
            yield Item(*json.loads(line))

    def ids(self) -> Ids:
        """Returns the ids of all items of the list."""
        return Ids(item.id for shard in self.shards() for item in self.items(shard))

    # settings

    def check_settings(self, asked: dict) -> None:
        """Raises FleetflowError, with names, where the results of this folder depend on something else.

        Args:
            asked: "settings", and "label" as soon as it is known.
        """
        known = self.read(self.control("settings.json"))
        if known is None:
            return
        was, now = ({name: value for part in each for name, value in part.items()} for each in _both(known, asked))
        changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if changed:
            was, now = (", ".join(f"{name}={_short(each.get(name))}" for name in changed) for each in (was, now))
            raise FleetflowError(
                f"{self.url} was begun with {was}, not {now}; ask for the same, or choose another folder"
            )

    def settings(self) -> dict:
        """Returns what was kept; raises FleetflowError where there is no batch."""
        known = self.read(self.control("settings.json"))
        if known is None:
            raise FleetflowError(f"{self.url} is no folder of a batch; give the one that `fleetflow batch` wrote into")
        return known

    # results

    def target(self, id: str, part: int | None = None) -> str:
        return self.path(id) if part is None else self.control("parts", id, f"{part:04d}")

    def record(self, id: str, part: int | None = None) -> Record | None:
        """Returns the record of a result that is there."""
        return _record(self.read(self._mark(id, part)))

    def _mark(self, id: str, part: int | None) -> str:
        """The file whose being there makes results count."""
        if self.local or part is not None:
            return f"{self.target(id, part)}/{RECORD}"
        return self.control("records", f"{id}.json")

    def failure(self, id: str) -> Record | None:
        return _record(self.read(self.control("failed", f"{id}.json")))

    def failures(self) -> Iterator[Record]:
        for name in self.names(self.control("failed")):
            record = _record(self.read(self.control("failed", name)))
            if record:
                yield record

    def forget_changed(self) -> None:
        """Forgets that inputs of results were found changed; the next look says whether they still are."""
        for failure in self.failures():
            if self.record(failure.id) is not None:
                self.remove(self.control("failed", f"{failure.id}.json"))

    def forget_failures(self) -> int:
        """Returns how many items had failed; they will be tried again."""
        count = sum(1 for _ in self.failures())
        self.remove(self.control("failed"))
        return count

    def done(self) -> Iterator[str]:
        """Yields the ids of all items that have results."""
        if not self.local:
            yield from (name.removesuffix(".json") for name in self.names(self.control("records")))
            return
        for name in self.names(self.root):
            if not name.startswith(".") and os.path.exists(self._mark(name, None)):
                yield name

    def begin(self, run: str, id: str, part: int | None = None) -> int:
        """Notes that a worker begins; returns how often one has in this run, this time included."""
        path = self._tries(id, part)
        tries = (self.read(path) or {}).get("tries", 0) + 1
        if not self.is_current(run):
            raise Superseded(run)
        if self.local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with writing(Path(path)):
                Path(path).write_text(json.dumps({"tries": tries}))
        else:
            self.write(path, {"tries": tries})
        return tries

    def _tries(self, id: str, part: int | None) -> str:
        return self.control("tries", id if part is None else f"{id}.{part:04d}")

    def commit(self, folder: Path, record: Record, part: int | None = None) -> bool:
        """Makes the files of a folder the results of an item, with their record; returns False where it has some already.

        Raises:
            Superseded: another run has this folder.
            FleetflowError: it cannot be written, or what is there under this name is not ours.
        """
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        facts = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        content = {**asdict(record), "files": facts}
        target = self.target(record.id, part)
        if not self.is_current(record.run):
            raise Superseded(record.run)
        with writing(Path(target)):
            if self.local:
                fresh = self._rename(folder, target, content)
            else:
                fresh = self._upload(files, target, content, self._mark(record.id, part))
        if not fresh and self.record(record.id, part) is None:
            raise FleetflowError(f"{target} was not written by fleetflow and is in the way; move it")
        self.remove(self._tries(record.id, part))
        if part is None:
            self.remove(self.control("failed", f"{record.id}.json"))
        return fresh

    def _rename(self, folder: Path, target: str, content: dict) -> bool:
        (folder / RECORD).write_text(json.dumps(content) + "\n")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError:
            if not os.path.lexists(target):
                raise
            return False  # a folder that is not empty is never replaced: another worker was first
        return True

    def _upload(self, files: dict[str, Path], target: str, content: dict, mark: str) -> bool:
        if self.files.exists(mark):
            return False
        for name, path in files.items():
            self.files.put_file(str(path), f"{target}/{name}")
        for path in dict.fromkeys((f"{target}/{RECORD}", mark)):
            self.write(path, content)
        return True

    def fail(self, record: Record, part: int | None = None) -> None:
        """Keeps why an item failed."""
        if not self.is_current(record.run):
            raise Superseded(record.run)
        self.write(self.control("failed", f"{record.id}.json"), asdict(record))
        self.remove(self._tries(record.id, part))

    def damaged(self, id: str) -> list[str]:
        """Returns the names of the results of an item that are not as its record says."""
        record = self.record(id)
        wrong = []
        for name, facts in (record.files if record else {}).items():
            path = f"{self.target(id)}/{name}"
            if not self.files.isfile(path):
                wrong.append(name)
                continue
            with self.files.open(path, "rb") as opened:
                file: Any = opened  # fsspec's type allows for text
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    wrong.append(name)
        return wrong


def _record(content: dict | None) -> Record | None:
    with suppress(TypeError):
        return None if content is None else Record(**content)
    return None


def _both(known: dict, asked: dict) -> tuple[list[dict], list[dict]]:
    """The parts that both have."""
    parts = [name for name in ("settings", "label") if known.get(name) and asked.get(name)]
    return [known[name] for name in parts], [asked[name] for name in parts]


def _short(value) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
