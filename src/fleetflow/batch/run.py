"""A batch from its list to its summary: one contract, an executor of this machine or of a Ray cluster."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from fleetflow.batch.manifest import VIDEO_SUFFIXES, Ids, Item, checked, local, read_manifest
from fleetflow.batch.records import Store
from fleetflow.batch.task import MOTION, Job, Settings
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError

EXECUTORS = ("local", "ray")
NOTED = 2.0  # seconds between two notes of how far a run is
STALE = 60.0  # seconds after which a note is that of a run that was killed
COLUMNS = ("id", "input", "outcome", "reason", "frames", "seconds", "time", "worker", "tries", "input_sha256")
ENDS = ("done", "skipped", "failed")


class Progress(NamedTuple):
    """How far a run is: items that have ended, and all of them."""

    done: int
    total: int
    what: str = ""


@dataclass
class Summary:
    """What became of the items of a batch.

    Attributes:
        items: in the manifest.
        done: in this run.
        skipped: they had results before.
        failed: how many, by reason.
        missing: neither results nor a reason; the run was stopped.
        frames: pictures read in this run.
        seconds: that this run took.
        workers: of this run.
        stopped: why the run ended before its end, if it did.
    """

    items: int = 0
    done: int = 0
    skipped: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    frames: int = 0
    seconds: float = 0.0
    workers: int = 0
    stopped: str | None = None

    def items_failed(self) -> int:
        """Returns how many items have failed."""
        return sum(self.failed.values())


def batch(
    manifest: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    on: str = "local",
    workers: int = 0,
    threads: int = 1,
    tries: int = 5,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Does every item of a manifest that has no results yet; each exactly once in effect.

    Args:
        manifest: a list of clips, see `read_manifest`.
        output: a folder, or an address that fsspec knows; each item gets a folder in it.
        settings: what to do. Results of a former run in this folder must have come of the same.
        on: "local", processes of this machine, or "ray".
        workers: 0 takes one a GPU, or one for `threads` cores.
        threads: of each worker on the CPU.
        tries: how often a worker may begin with an item before it counts as failed.
        progress: called after each item.

    Returns:
        What became of the items. Those that failed before are not tried again, see `retry`.

    Raises:
        FleetflowError: the manifest or the network cannot be read, another run has the folder, or it was begun with
            other settings.
    """
    store = Store(output)
    _check_apart(store, checked(read_manifest(manifest)))  # what is wrong is found before the list that is there goes
    with store.claimed(f"batch {manifest}") as run:
        job = Job(settings, store, run, threads, tries)
        store.check_settings({"settings": _plain(settings)})
        store.save_items(checked(read_manifest(manifest)))
        store.write(store.control("list.json"), {"list": _whole_path(manifest)})
        return _run(job, on, workers, progress)


def retry(
    output: str | Path,
    *,
    on: str | None = None,
    workers: int = 0,
    threads: int = 1,
    tries: int = 5,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Tries the items anew that have failed, and does those that are missing, as the folder was begun.

    Arguments and errors as of `batch`; on: None takes what the folder was begun on.
    """
    store = Store(output)
    known = store.settings()
    with store.claimed(f"batch retry {output}") as run:
        job = Job(_settings(known["settings"]), store, run, threads, tries)
        store.forget_failures()
        return _run(job, on or known.get("on", "local"), workers, progress)


def status(output: str | Path, *, check: bool = False) -> dict:
    """Returns what is known of a batch: its summary, the run that is at work, if one is, and damaged results.

    Args:
        output: the folder of the batch.
        check: compare all results with the sizes and hashes of their records.

    Raises:
        FleetflowError: it is no folder of a batch.
    """
    store = Store(output)
    known = {"settings": None, "label": None} if store.shards() else store.settings()  # it may be loading its network
    known |= store.read(store.control("settings.json")) or {}
    found = {"settings": known["settings"], "label": known["label"], **asdict(_summary(store, store.ids()))}
    now = store.read(store.control("progress.json"))
    if now and now.get("running") and store.is_current(now.get("run", "")) and time.time() - now["time"] < STALE:
        found["running"] = now
    if check:
        found["damaged"] = {id: wrong for id in store.done() if (wrong := store.damaged(id))}
    return found


def sources(output: str | Path) -> Iterator[str]:
    """Yields the paths and addresses of what a batch reads: the list that its folder was last given, and its clips."""
    store = Store(output)
    if listed := (store.read(store.control("list.json")) or {}).get("list"):
        yield listed
    for shard in store.shards():
        yield from (item.input for item in store.items(shard))


def _whole_path(manifest: str | Path) -> str:
    return str(manifest) if "://" in str(manifest) else os.path.abspath(os.path.expanduser(manifest))


def rows(output: str | Path) -> Iterator[dict]:
    """Yields what the records say, a row for each item that ended, all with the same keys; of motion its columns, too."""
    store = Store(output)
    motion = store.settings()["settings"]["do"] == "motion"
    names = _motion_columns() if motion else ()
    for record in (*map(store.record, store.done()), *store.failures()):
        if record is None:
            continue
        row = {name: getattr(record, name) for name in COLUMNS}
        row["weights_sha256"] = record.label.get("sha256")
        found = (store.read(f"{store.target(record.id)}/{MOTION}") or {}) if motion else {}
        yield {**row, **{f"clip_{name}" if name in row else name: found.get(name) for name in names}}


def _motion_columns() -> tuple[str, ...]:
    from fleetflow.motion.scores import COLUMNS  # it needs torch

    return COLUMNS


def _run(job: Job, on: str, workers: int, progress: Callable[[Progress], None]) -> Summary:
    store, began = job.store, time.perf_counter()
    listed = store.ids()
    store.forget_changed()
    before = listed.common(Ids(store.done()))
    summary = Summary(listed.count, skipped=before)
    try:
        with _executor(on)(job, workers) as executor:
            summary.workers = executor.workers
            asked = {"settings": _plain(job.settings), "label": executor.label, "on": on}
            store.check_settings(asked)
            store.write(store.control("settings.json"), asked)
            _follow(executor, job, summary, progress)
    finally:
        found = _summary(store, listed, before)
        summary.done, summary.skipped = found.done, found.skipped
        summary.failed, summary.missing = found.failed, found.missing
        summary.seconds = time.perf_counter() - began
        end = {"run": job.run, "running": False, "time": time.time(), **asdict(summary)}
        with suppress(FleetflowError, OSError):  # on a full disk
            store.write(store.control("progress.json"), end)
    return summary


def _follow(executor, job: Job, summary: Summary, progress: Callable[[Progress], None]) -> None:
    """Counts what the workers report until all is done, and keeps how far it is for `status` in another terminal."""
    ended, began = 0, time.perf_counter()
    noted = began
    for report in executor.run(job.store.shards()):
        if report is not None:
            summary.frames += report.frames
            ended += report.outcome in ENDS
            if report.outcome == "stop":
                summary.stopped = report.reason
                return
            progress(Progress(ended, summary.items))
        now = time.perf_counter()
        if now - noted > NOTED:
            noted, rate = now, ended / (now - began)
            state = {"run": job.run, "running": True, "time": time.time(), "ended": ended, "items": summary.items}
            left = (summary.items - ended) / rate if rate else None
            state |= {"rate": rate, "seconds_left": left, "workers": executor.state()}
            with suppress(FleetflowError, OSError):
                job.store.write(job.store.control("progress.json"), state)


def _executor(on: str) -> type:
    if on == "local":
        from fleetflow.batch.local import Local

        return Local
    if on == "ray":
        from fleetflow.batch.ray import Ray

        return Ray
    raise unknown("executor", on, list(EXECUTORS))


def _summary(store: Store, listed: Ids, before: int = 0) -> Summary:
    """What the folder says of the items of a list, whatever any run believed. before: results at the begin of the run."""
    results, changed = listed.common(Ids(store.done())), 0
    reasons: Counter[str] = Counter()
    for record in store.failures():
        if record.id in listed:
            reasons[(record.reason or "").replace(record.input, "CLIP")] += 1
            changed += store.record(record.id) is not None  # of another input than the list now says
    skipped = max(0, before - changed)
    done, missing = results - changed - skipped, max(0, listed.count - (results - changed) - reasons.total())
    return Summary(listed.count, done, skipped, dict(reasons.most_common()), missing)


def _check_apart(store: Store, items: Iterable[Item]) -> None:
    """Raises FleetflowError where results would lie in a folder of pictures that is read, and thereby change it."""
    root = Path(os.path.realpath(store.root))
    around = {root, *root.parents} if store.local else set()
    for item in items:
        video = item.input.lower().endswith(VIDEO_SUFFIXES)  # of a million of them none is looked at on the disk
        if around and not video and local(item.input) in around:
            raise FleetflowError(
                f"{store.url} is or lies in {item.input}, which this batch reads; choose another output"
            )


def _plain(settings: Settings) -> dict:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(asdict(settings)))


def _settings(known: dict) -> Settings:
    tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Settings(**{**known, **tuples})
