"""Batches: lists of clips, records, what one worker does, runs of local processes, and runs that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import lay_out_example

from fleetflow.batch import manifest as lists
from fleetflow.batch import plan, work
from fleetflow.batch.manifest import Item, checked, clips_in, item_id, local, read_manifest, write_manifest
from fleetflow.batch.records import Record, Store, Superseded
from fleetflow.batch.run import _check_apart, batch, retry, status
from fleetflow.batch.task import Job, Settings, Task
from fleetflow.batch.work import Worker
from fleetflow.cli.main import main
from fleetflow.inference import files as predictions
from fleetflow.inference.predictor import Predictor
from fleetflow.io.images import write_image
from fleetflow.io.video import VideoReader, VideoWriter
from fleetflow.models.weights import shipped
from fleetflow.motion.scores import score
from fleetflow.types import FleetflowError

NPZ = Settings(format=("npz",), device="cpu")


def write_clip(path: Path, frames: int, seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    with VideoWriter(path, 10) as writer:
        for k in range(frames):
            writer.write(np.ascontiguousarray(picture[:, k % 30 : k % 30 + 64]))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The results below a folder, without records and what is hidden."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(found.items())
        if not name.startswith(".") and path.name != "record.json"
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A dozen clips of eight frames, and a list of them."""
    folder = tmp_path_factory.mktemp("batch")
    names = [write_clip(folder / f"c{k:02d}.mp4", 8, k).name for k in range(12)]
    (folder / "clips.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(clips) -> Path:
    """The results of a run that nothing disturbs."""
    summary = batch(clips / "clips.txt", clips / "whole", NPZ, workers=1)
    assert (summary.items, summary.done, summary.failed, summary.missing) == (12, 12, {}, 0)
    assert summary.frames == 12 * 8
    return clips / "whole"


# lists


def test_a_list_of_each_kind_gives_the_same_items(tmp_path):
    given = [Item("one", "/clips/a b.mp4", 40), Item("zwei-ö", "s3://bucket/c,d.mp4", None)]
    (tmp_path / "list.txt").write_text("# two clips\n\n/clips/a b.mp4\n  s3://bucket/c,d.mp4  \n")
    assert [item.input for item in read_manifest(tmp_path / "list.txt")] == [item.input for item in given]
    for name in ("list.csv", "list.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow", reason="needs the batch extra")
        assert write_manifest(given, tmp_path / name) == 2
        assert list(read_manifest(tmp_path / name)) == given


def test_ids_stay_and_paths_are_those_of_the_list(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "list.txt").write_text("a/clip.mp4\nb/clip.mp4\n")
    first, second = read_manifest(tmp_path / "sub" / "list.txt")
    assert first.input == str(tmp_path / "sub" / "a" / "clip.mp4") and first.id == item_id("a/clip.mp4")
    assert first.id != second.id and first.id.startswith("clip-")
    assert item_id("a/clip.mp4") == "clip-33b5d47cf233"  # as in all versions, or old batches would begin anew


def test_odd_lists(tmp_path):
    """Line ends of Windows, the mark of UTF-8, spaces, quotes, a name that is no text, a list that lies elsewhere."""
    lines = ['"a b", c.mp4', "../up.mp4", "/clips/\u65e5\u672c.mp4", "~/home.mp4", "100% {x} $y.mp4"]
    content = b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "# no clip", ""]).encode() + b"\xff.mp4"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "list.txt").write_bytes(content)
    items = list(read_manifest(tmp_path / "sub" / "list.txt"))
    sub = f"{tmp_path}/sub"
    expected = [f"{sub}/{lines[0]}", f"{tmp_path}/up.mp4", lines[2], str(Path.home() / "home.mp4"), f"{sub}/{lines[4]}"]
    assert [item.input for item in items] == [*expected, os.fsdecode(os.fsencode(f"{sub}/") + b"\xff.mp4")]
    assert len({item.id for item in items}) == 6 and all(lists.ID.fullmatch(item.id) for item in items)
    store = Store(tmp_path / "out")
    assert store.save_items(items) == 6 and list(store.items(store.shards()[0])) == items
    there = Store(f"memory://{tmp_path}/lists")
    there.files.pipe_file(f"{there.root}/list.csv", b"input\r\na.mp4\r\n/clips/b.mp4\r\ns3://bucket/c.mp4\r\n")
    inputs = [item.input for item in read_manifest(f"{there.url}/list.csv")]
    assert inputs == [f"{there.url}/a.mp4", "/clips/b.mp4", "s3://bucket/c.mp4"]


def test_a_header_that_promises_billions_makes_few_tasks(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(plan, "VideoReader", lambda _: type("", (), {"frames": 10**12}))
    tasks = plan.plan(Job(NPZ, Store(tmp_path / "out"), "r"), Item("a", str(tmp_path / "a.mp4")))
    assert len(tasks) <= (tmp_path / "a.mp4").stat().st_size / 4000 + 1


WRONG = {
    "empty.txt": ("# nothing\n", "no item"),
    "twice.txt": ("a.mp4\nb.mp4\na.mp4\n", "1 of 3 items"),
    "columns.csv": ("clip,id\na.mp4,1\n", "clip, id; expected input"),
    "slash.csv": ("id,input\na,a.mp4\n../b,b.mp4\n", 'line 3: the id is "../b"'),
    "dot.csv": ("id,input\n.batch,a.mp4\n", "line 2"),
    "long.csv": (f"id,input\n{'x' * 151},a.mp4\n", "line 2"),
    "none.csv": ("id,input\na,\n", "line 2: no input"),
    "frames.csv": ("id,input,frames\na,b.mp4,many\n", "frames is many"),
    "negative.csv": ("id,input,frames\na,b.mp4,-5\n", "frames is -5; expected a whole number from 1 to"),
    "billions.csv": ("id,input,frames\na,b.mp4,1000000000000\n", "frames is 1000000000000"),
    "binary.txt": ("a\0b", "no text"),
    "endless.txt": ("x" * 70_000, "65536 characters"),
    "text.parquet": ("no parquet", "cannot be read as a manifest"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_is_one_line(name, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs the batch extra")
    text, message = WRONG[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(FleetflowError, match=message) as caught:
        list(checked(read_manifest(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_columns_of_other_types(tmp_path):
    """Numbers as ids, also 0; what is no path and no number of frames is one line."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the batch extra")
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "list.parquet"

    def listed(**columns) -> list[Item]:
        parquet.write_table(pyarrow.table(columns), path)
        return list(checked(read_manifest(path)))

    found = listed(input=["a.mp4", "b.mp4"], id=[0, 1], frames=[25.0, None])
    assert [(item.id, item.frames) for item in found] == [("0", 25), ("1", None)]
    for message, columns in {
        "line 1: the input is of type bytes; expected text": {"input": [b"a.mp4"]},
        "the input is of type list": {"input": [["a.mp4"]]},
        "line 2: frames is 2.5; expected a whole number": {"input": ["a.mp4", "b.mp4"], "frames": [2.0, 2.5]},
    }.items():
        with pytest.raises(FleetflowError, match=message):
            listed(**columns)


def test_a_list_that_unpacks_too_far_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="needs the batch extra")
    write_manifest([Item(f"{k}", "x" * 200) for k in range(100)], tmp_path / "list.parquet")
    monkeypatch.setattr(lists, "COLUMN", 100)
    with pytest.raises(FleetflowError, match="smaller row groups"):
        list(read_manifest(tmp_path / "list.parquet"))


def test_clips_in_a_folder(tmp_path, capsys):
    for name in ("b/two.mp4", "one.MKV", "b/notes.txt", ".hidden/x.mp4", "frames/1.png", "frames/2.png", "c/only.png"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).touch()
    found = list(clips_in(tmp_path / "clips"))
    assert {Path(item.input).name for item in found} == {"two.mp4", "one.MKV", "frames"}
    os.rename(tmp_path / "clips", tmp_path / "moved")
    assert [item.id for item in clips_in(tmp_path / "moved")] == [item.id for item in found]
    assert main(["batch", "manifest", str(tmp_path / "moved"), "-o", str(tmp_path / "list.csv")]) == 0
    assert "3 clips" in capsys.readouterr().out and len(list(read_manifest(tmp_path / "list.csv"))) == 3
    with pytest.raises(FleetflowError, match="no item"):
        write_manifest(clips_in(tmp_path / "moved" / "c"), tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_memory_does_not_grow_with_the_list(tmp_path):
    """Eight bytes an item are kept, for the search of doubles."""
    code = (
        "import resource, sys\n"
        "from fleetflow.batch.manifest import Item, checked\n"
        "from fleetflow.batch.records import Store\n"
        "store, n = Store(sys.argv[1]), int(sys.argv[2])\n"
        "store.save_items(checked(Item(f'clip-{k}', f'/clips/{k:09d}.mp4') for k in range(n)))\n"
        "assert n == store.ids().count == sum(1 for shard in store.shards() for _ in store.items(shard))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    pytest.importorskip("resource", reason="needs Unix")
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, str(tmp_path / n), n], capture_output=True, check=True).stdout)
        for n in ("1000", "100000")
    ]
    assert peaks[1] < peaks[0] + 8 * 1024, "KiB"


# records


def a_result(folder: Path, text: str = "flow") -> Path:
    folder.mkdir(parents=True)
    (folder / "a.npz").write_text(text)
    return folder


@pytest.mark.parametrize("url", ["{}/out", "memory://{}/out"])
def test_results_and_record_appear_together_and_once(url, tmp_path):
    store = Store(url.format(tmp_path))
    with store.claimed("test") as run:
        record = Record("one", "a.mp4", "done", run=run)
        assert store.record("one") is None and list(store.done()) == []
        assert store.begin(run, "one") == 1 and store.begin(run, "one") == 2
        store.fail(replace(record, outcome="failed", reason="why"))
        assert store.commit(a_result(tmp_path / "w1"), record)
        assert not store.commit(a_result(tmp_path / "w2", "other"), replace(record, worker="late"))
        assert store.record("one").worker == "" and list(store.done()) == ["one"]
        assert store.record("one").files["a.npz"]["bytes"] == 4 and store.damaged("one") == []
        assert store.begin(run, "one") == 1, "a commit ends the count"
        assert list(store.failures()) == [], "and the failure before it"
        with store.files.open(f"{store.target('one')}/a.npz", "wb") as file:
            file.write(b"floe")
        assert store.damaged("one") == ["a.npz"]
        store.write(store.control("run.json"), {"run": "another"})
        for action in (
            lambda: store.begin(run, "two"),
            lambda: store.fail(record),
            lambda: store.commit(a_result(tmp_path / "w3"), replace(record, id="two")),
        ):
            with pytest.raises(Superseded):
                action()
        store.write(store.control("run.json"), {"run": run})
    assert Store(store.url).record("one") == store.record("one")


@pytest.mark.parametrize("url", ["{}/out", "memory://{}/two"])
def test_two_runs_into_one_folder(url, tmp_path):
    url = url.format(tmp_path)
    with Store(url).claimed("batch first.txt"):
        with pytest.raises(FleetflowError, match='in use by "batch first.txt"'):
            with Store(url).claimed("batch second.txt"):
                pass
    with Store(url).claimed("batch third.txt"):
        pass


def test_a_lease_in_an_object_store_ends_with_its_run(tmp_path):
    url = f"memory://{tmp_path}/lease"
    store = Store(url)
    store.write(store.control("run.json"), {"run": "dead", "what": "batch", "time": time.time() - 1000})
    with store.claimed("next") as run:
        assert store.is_current(run)
    assert store.read(store.control("run.json")) is None


def test_what_is_in_the_way_is_not_replaced(tmp_path):
    store = Store(tmp_path / "out")
    with store.claimed("test") as run:
        mine = a_result(tmp_path / "out" / "one", "mine")
        with pytest.raises(FleetflowError, match="in the way"):
            store.commit(a_result(tmp_path / "w"), Record("one", "a.mp4", "done", run=run))
        assert (mine / "a.npz").read_text() == "mine"


# one worker


def a_worker(url, settings: Settings = NPZ, *, tries: int = 5) -> Worker:
    store = Store(url)
    store.write(store.control("run.json"), {"run": "r"})
    return Worker(Job(settings, store, "r", tries=tries))


def test_from_one_store_into_another(clips, tmp_path):
    """Inputs and results through fsspec: here both in memory."""
    store = Store(f"memory://{tmp_path}/out")
    store.files.put_file(str(clips / "c00.mp4"), f"{tmp_path}/in/c00.mp4")
    worker = a_worker(store.url)
    item = Item("one", f"memory://{tmp_path}/in/c00.mp4")
    assert worker(item).outcome == "done" and worker(item).outcome == "skipped"
    folder = tmp_path / "flow"
    predictions.predict_video(Predictor("fastflownet", device="cpu"), clips / "c00.mp4", folder, ["npz"])
    assert {name: store.files.cat_file(f"{store.target('one')}/{name}") for name in contents(folder)} == contents(
        folder
    )
    store.files.pipe_file(f"{tmp_path}/in/c00.mp4", b"another")
    assert "has changed" in worker(item).reason
    report = worker(Item("two", f"memory://{tmp_path}/in/nowhere.mp4"))
    assert report.outcome == "failed" and "cannot be fetched" in report.reason


def test_a_folder_of_pictures(tmp_path):
    for k in range(3):
        write_image(tmp_path / "frames" / f"{k}.png", np.full((64, 64, 3), 20 * k, np.uint8))
    worker, item = a_worker(tmp_path / "out"), Item("one", str(tmp_path / "frames"))
    report = worker(item)
    assert (report.outcome, report.frames) == ("done", 3) and len(contents(tmp_path / "out" / "one")) == 2
    os.utime(tmp_path / "frames" / "0.png")
    assert worker(item).outcome == "skipped", "the same contents"
    write_image(tmp_path / "frames" / "0.png", np.full((64, 64, 3), 9, np.uint8))
    assert "has changed" in worker(item).reason
    assert "whose results are there" in worker(Item("one", str(tmp_path / "other"))).reason


def test_a_task_whose_workers_die_ends_as_a_failure(clips, tmp_path):
    worker = a_worker(tmp_path / "out", tries=2)
    item = Item("one", str(clips / "c00.mp4"))
    for _ in range(2):
        worker.store.begin("r", "one")  # and dies
    report = worker(item)
    assert report.outcome == "failed" and "died 2 times" in report.reason
    assert worker.store.failure("one").reason == report.reason


def test_a_full_disk_ends_the_run_not_the_item(clips, tmp_path, monkeypatch):
    worker = a_worker(tmp_path / "out")
    item = Item("one", str(clips / "c00.mp4"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    report = worker(item)
    assert report.outcome == "stop" and "No space left" in report.reason
    monkeypatch.undo()
    assert list(worker.store.failures()) == [] and worker(item).outcome == "done"


def test_a_disk_that_is_really_full(clips, tmp_path):
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path / "small")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        worker = a_worker(tmp_path / "small" / "out")
        reports = [worker(item) for item in read_manifest(clips / "clips.txt")]
        stopped = [report for report in reports if report.outcome == "stop"]
        assert stopped and all("No space left" in report.reason for report in stopped)
        assert {report.outcome for report in reports} <= {"done", "stop"}
        assert all(not worker.store.damaged(id) for id in worker.store.done())
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_machine_with_another_network_is_refused(tmp_path):
    worker = a_worker(tmp_path / "out")
    label = {**worker.label, "dtype": "float16"}
    with pytest.raises(FleetflowError, match="the run dtype=float16; say which"):
        Worker(replace(worker.job, label=label))


def test_a_bug_of_ours_is_a_failure_with_its_place(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(work.WORKS, "predict", lambda *_: 1 / 0)
    report = a_worker(tmp_path / "out")(Item("one", str(clips / "c00.mp4")))
    assert (
        report.outcome == "failed"
        and report.reason.startswith("ZeroDivisionError")
        and "test_batch.py" in report.reason
    )


# runs


def test_results_are_those_of_predict(clips, whole, tmp_path):
    predictor = Predictor("fastflownet", device="cpu")
    for item in list(read_manifest(clips / "clips.txt"))[:2]:
        predictions.predict_video(predictor, Path(item.input), tmp_path / item.id, ["npz"])
        assert contents(tmp_path / item.id) == contents(whole / item.id)
    record = Store(whole).record(item.id)
    assert record.frames == 8 and record.label["sha256"] == predictor.label()["sha256"] and record.tries == 1
    assert record.input_sha256 == work.sha256(Path(item.input)) and len(record.files) == 7


def test_what_cannot_be_read_is_said_and_the_rest_is_done(clips, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    write_clip(tmp_path / "one.mp4", 1)
    names = [str(clips / "c00.mp4"), str(tmp_path / "text.mp4"), str(tmp_path / "one.mp4"), str(tmp_path / "none.mp4")]
    (tmp_path / "clips.txt").write_text("\n".join(names))
    words = [str(tmp_path / "clips.txt"), "-o", str(tmp_path / "out"), "-f", "npz", "--device", "cpu"]
    assert main(["batch", *words, "--workers", "1", "--json", str(tmp_path / "all.json")]) == 1
    said = capsys.readouterr()
    assert "3 of 4 clips failed" in said.err.splitlines()[-1]
    summary = json.loads((tmp_path / "all.json").read_text())
    assert summary["done"] == 1 and summary["missing"] == 0 and sum(summary["failed"].values()) == 3
    for reason in ("cannot be read as a video", "fewer than two frames", "does not exist"):
        assert any(reason in key for key in summary["failed"]), (reason, summary["failed"])
    write_clip(tmp_path / "none.mp4", 3)
    assert retry(tmp_path / "out").done == 1
    assert main(["batch", "status", str(tmp_path / "out"), "--check", "--json", str(tmp_path / "now.json")]) == 0
    found = json.loads((tmp_path / "now.json").read_text())
    assert found["done"] == 2 and found["damaged"] == {} and "running" not in found
    next((tmp_path / "out").glob("c00-*/*.npz")).write_bytes(b"")
    assert main(["batch", "status", str(tmp_path / "out"), "--check"]) == 1


def test_what_no_clip_can_be_done_with_is_said_before_any_has_failed(clips, tmp_path, capsys):
    for words, said in (
        (["--threads", "0"], "--threads is 0; expected a number from 1 on"),
        (["--tries", "0"], "--tries is 0; expected a number from 1 on"),
        (["--split", "-1"], "--split is -1; expected"),
        (["--do", "track", "--grid", "0"], "--grid is 0; expected"),
        (["--scale", "-1"], "scale is -1.0; expected"),
        (["--do", "evaluate", "--dataset", "nothing"], 'no data set is called "nothing"'),
    ):
        output = tmp_path / words[-2]
        assert main(["batch", str(clips / "clips.txt"), "-o", str(output), "--device", "cpu", *words]) == 1
        assert said in capsys.readouterr().err and not list(Store(output).failures()) and not list(Store(output).done())
    store = Store(tmp_path / "out")
    store.write(store.control("settings.json"), {"settings": {"do": "predict"}, "label": {}})
    with store.claimed("test") as run:
        store.fail(Record("a", "a.mp4", "failed", reason="why", run=run))
    with pytest.raises(FleetflowError, match="--tries is 0"):
        retry(store.root, tries=0)
    assert store.failure("a"), "a wrong option forgets no failure"


def test_another_list_into_the_same_folder(tmp_path):
    """Counts are those of the items of the list; results of other lists stay."""
    store = Store(tmp_path / "out")
    store.write(store.control("settings.json"), {"settings": {"do": "predict"}, "label": {}})
    with store.claimed("test") as run:
        for k in range(3):
            store.commit(a_result(tmp_path / f"w{k}"), Record(f"c{k}", f"c{k}.mp4", "done", run=run))
        for name in ("bad", "worse"):
            store.fail(Record(name, f"{name}.mp4", "failed", reason="why", run=run))
        store.save_items([Item(name, f"{name}.mp4") for name in ("c1", "c2", "bad", "new", "newer")])
    found = status(store.root)
    assert (found["items"], found["done"], found["failed"], found["missing"]) == (5, 2, {"why": 1}, 2)
    assert len(list(store.done())) == 3


def test_a_list_that_means_other_clips_than_it_did_is_said(clips, tmp_path):
    """Results of another input under the same id count as failed, until the list is right again."""
    listed, output = tmp_path / "clips.csv", tmp_path / "out"
    for name, expected in (("c00", (1, 0, 0)), ("c01", (0, 0, 1)), ("c01", (0, 0, 1)), ("c00", (0, 1, 0))):
        listed.write_text(f"id,input\none,{clips / name}.mp4\n")
        found = batch(listed, output, NPZ, workers=1)
        assert (found.done, found.skipped, found.items_failed(), found.missing) == (*expected, 0)
        assert all("whose results are there" in reason for reason in found.failed)
        assert status(output)["done"] == found.done + found.skipped


def test_a_device_is_no_clip(tmp_path):
    report = a_worker(tmp_path / "out")(Item("one", os.devnull))
    assert report.outcome == "failed" and "neither a file nor a folder" in report.reason


def test_status_of_a_run_that_has_not_loaded_its_network(tmp_path, capsys):
    store = Store(tmp_path / "out")
    with store.claimed("test"):
        store.save_items([Item("one", "a.mp4"), Item("two", "b.mp4")])
        found = status(store.root)
        assert (found["items"], found["done"], found["missing"], found["settings"]) == (2, 0, 2, None)
        assert main(["batch", "status", store.root]) == 0
        assert "2 clips" in " ".join(capsys.readouterr().out.split())
        with pytest.raises(FleetflowError, match="no folder of a batch"):
            retry(store.root)


def test_other_settings_are_refused_by_name(clips, whole):
    for settings, message in (
        (replace(NPZ, format=("flo",)), "format"),
        (replace(NPZ, warm_start=True), "warm_start"),
    ):
        with pytest.raises(FleetflowError, match=f"was begun with .*{message}="):
            batch(clips / "clips.txt", whole, settings, workers=1)
    assert status(whole)["items"] == 12
    assert batch(clips / "clips.txt", whole, NPZ, workers=1).skipped == 12


@pytest.mark.parametrize("change", [{"do": "dance"}, {"model": "fastflownett"}, {"device": "meta"}], ids=str)
def test_wrong_settings_are_one_line(change, clips, tmp_path):
    with pytest.raises(FleetflowError) as caught:
        batch(clips / "clips.txt", tmp_path / "out", replace(NPZ, **change), workers=1)
    assert "\n" not in str(caught.value)


def test_no_batch_is_said(tmp_path):
    for action in (retry, status):
        with pytest.raises(FleetflowError, match="no folder of a batch"):
            action(tmp_path)
    with pytest.raises(FleetflowError, match="no executor"):
        (tmp_path / "a.txt").write_text("a.mp4")
        batch(tmp_path / "a.txt", tmp_path / "out", NPZ, on="moon")


def test_a_long_clip_is_done_in_ranges_and_joined(tmp_path):
    """Of 9 pairs in ranges of 4 the flows are those of predict; a header that promises more does no harm."""
    clip = write_clip(tmp_path / "long.mp4", 10)
    worker = a_worker(tmp_path / "out", replace(NPZ, format=("npz", "color"), split=4))
    report = worker(Item("one", str(clip)))
    assert report.outcome == "split" and [task.part for task in report.tasks] == [0, 1, 2]
    assert [worker(task).outcome for task in report.tasks] == ["part", "part", "done"]
    assert [worker(task).outcome for task in report.tasks] == ["skipped", "part", "part"], "as after a crash"
    late = [task.tasks for task in (worker(Item("two", str(clip), 20)),)][0]
    assert len(late) == 5 and [worker(task).outcome for task in reversed(late)][-1] == "done"
    predictor = Predictor("fastflownet", device="cpu")
    predictions.predict_video(predictor, clip, tmp_path / "alone", ["npz", "color"])
    alone = contents(tmp_path / "alone")
    for id in ("one", "two"):
        joined = contents(tmp_path / "out" / id)
        assert joined.keys() == alone.keys()
        assert all(joined[name] == alone[name] for name in alone if name.endswith("npz"))
        films = [VideoReader(folder / "long_color.mp4") for folder in (tmp_path / "out" / id, tmp_path / "alone")]
        pictures = [[(picture, picture.time) for picture in film] for film in films]
        assert [time for _, time in pictures[0]] == pytest.approx([time for _, time in pictures[1]], abs=1e-3)
        assert max(np.abs(a[0].astype(int) - b[0]).mean() for a, b in zip(*pictures)) < 3, "one color scale for all"
        record = worker.store.record(id)
        assert record.frames == 10 and record.pairs is None and len(record.files) == 10
    assert not list((tmp_path / "out" / ".batch" / "parts").iterdir())


def test_ranges_of_another_film_are_not_joined(tmp_path):
    """A film that changes between two runs, a list that says another number of frames: its ranges are done anew."""
    clip = write_clip(tmp_path / "long.mp4", 10)
    worker = a_worker(tmp_path / "out", replace(NPZ, format=("npz", "color"), split=4))
    first, second, third = worker(Item("one", str(clip))).tasks
    assert [worker(task).outcome for task in (third, second)] == ["part", "part"]
    write_clip(clip, 10, seed=1)
    assert [worker(task).outcome for task in (first, second, third)] == ["part", "part", "done"]
    promised = worker(Item("two", str(clip), 20)).tasks
    assert [worker(task).outcome for task in promised[1:]] == ["part"] * 4
    assert [worker(Task(Item("two", str(clip)), part, 3)).outcome for part in range(3)] == ["part", "part", "done"]
    predictions.predict_video(Predictor("fastflownet", device="cpu"), clip, tmp_path / "alone", ["npz"])
    alone = contents(tmp_path / "alone")
    for id in ("one", "two"):
        joined = contents(tmp_path / "out" / id)
        assert {name: joined[name] for name in alone} == alone
        assert sum(1 for _ in VideoReader(tmp_path / "out" / id / "long_color.mp4")) == 9


def test_a_clip_that_changes_while_it_is_read_is_a_failure(clips, tmp_path, monkeypatch):
    clip = Path(shutil.copy(clips / "c00.mp4", tmp_path / "a.mp4"))

    def predict(*given):
        os.utime(clip, (1, 1))
        return 1

    monkeypatch.setitem(work.WORKS, "predict", predict)
    report = a_worker(tmp_path / "out")(Item("one", str(clip)))
    assert report.outcome == "failed" and "has changed while it was read" in report.reason


def test_a_wrong_list_does_not_replace_the_one_that_is_there(clips, tmp_path):
    store = Store(tmp_path / "out")
    store.save_items([Item("one", "a.mp4")])
    (tmp_path / "clips.txt").write_text("a.mp4\nb.mp4\na.mp4\n")
    with pytest.raises(FleetflowError, match="have the id of another one"):
        batch(tmp_path / "clips.txt", store.root, NPZ)
    assert [item.id for shard in store.shards() for item in store.items(shard)] == ["one"]


def test_track_a_list(clips, tmp_path):
    for k in range(3):
        write_image(tmp_path / "frames" / f"{k}.png", np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8))
    worker = a_worker(tmp_path / "out", Settings(do="track", device="cpu", grid=16))
    for id, given, frames in (("one", clips / "c00.mp4", 8), ("two", tmp_path / "frames", 3)):
        report = worker(Item(id, str(given)))
        assert (report.outcome, report.frames) == ("done", frames), report
        found = np.load(tmp_path / "out" / id / "tracks.npz")
        assert found["tracks"].shape == (16, frames, 2) and found["occluded"].shape == (16, frames)


def test_motion_of_a_list_as_a_table(clips, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "clips.txt").write_text(f"{clips / 'c00.mp4'}\n{clips / 'c01.mp4'}\ntext.mp4\n")
    words = [str(tmp_path / "clips.txt"), "-o", str(tmp_path / "out"), "--do", "motion", "--workers", "1"]
    assert main(["batch", *words]) == 1
    assert main(["batch", "status", str(tmp_path / "out"), "--table", str(tmp_path / "all.json")]) == 0
    rows = sorted(json.loads((tmp_path / "all.json").read_text()), key=lambda row: row["input"])
    assert [row["outcome"] for row in rows] == ["done", "done", "failed"]
    alone = score(clips / "c00.mp4", Predictor("fastflownet"))
    assert rows[0]["motion"] == pytest.approx(alone.motion, rel=1e-4) and rows[0]["clip_seconds"] == alone.seconds
    assert "cannot be read" in rows[2]["reason"] and rows[2]["motion"] is None and rows[2].keys() == rows[0].keys()


def test_status_replaces_neither_the_list_nor_what_belongs_to_the_batch(clips, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(whole, tmp_path / "out")
    listed = tmp_path / "clips.csv"
    listed.write_text("input\n" + "".join(f"{path}\n" for path in sorted(clips.glob("*.mp4"))))
    batch(listed, tmp_path / "out", NPZ, workers=1)
    record = next((tmp_path / "out").glob("*/record.json"))
    settings = tmp_path / "out" / ".batch" / "settings.json"
    for words, place in (
        (["status", "--table"], listed),
        (["status", "--json"], record),
        (["status", "--json"], settings),
        (["retry", "--json"], listed),
        (["retry", "--json"], settings),
    ):
        before = place.read_bytes()
        for output in (str(tmp_path / "out"), "~/out", f"file://{tmp_path / 'out'}"):
            assert main(["batch", words[0], output, words[1], str(place)]) == 1
            assert "choose another output" in capsys.readouterr().err and place.read_bytes() == before
    for _ in range(2):
        assert main(["batch", "status", str(tmp_path / "out"), "--json", str(tmp_path / "out" / "status.json")]) == 0


def test_a_summary_replaces_nothing_that_the_batch_reads(tmp_path, capsys, monkeypatch):
    """Neither the list, nor a clip of it, nor a picture of one, nor the weights; it is said before anything begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "pictures"
    for name in ("1.png", "2.png"):
        write_image(folder / name, np.zeros((64, 64, 3), np.uint8))
    write_clip(tmp_path / "a clip.mp4", 2)
    (tmp_path / "link.mp4").symlink_to("a clip.mp4")
    shutil.copy(shipped("fastflownet"), tmp_path / "own.safetensors")
    (tmp_path / "clips.txt").write_text(f"a clip.mp4\n{folder}\n")
    places = ("clips.txt", "a clip.mp4", "link.mp4", folder / "1.png", "own.safetensors")
    before = {place: Path(place).read_bytes() for place in places}
    for listed in ("clips.txt", "~/clips.txt", f"file://{tmp_path}/clips.txt"):
        for place in before:
            words = ["batch", listed, "-o", "out", "--model", "fastflownet:own.safetensors", "--json", str(place)]
            assert main(words) == 1 and "choose another output" in capsys.readouterr().err
            assert Path(place).read_bytes() == before[place] and not Path("out").exists()
    for inside in ("pictures", "pictures/out", "~/pictures/out", f"file://{folder}/out"):
        assert main(["batch", "clips.txt", "-o", inside]) == 1 and "choose another" in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == ["1.png", "2.png"], "results would change the clip"
    summary = ["--json", str(folder / "summary.json")]  # which would be another picture folder than before
    assert main(["batch", "clips.txt", "-o", "out", *summary]) == 1 and "choose another" in capsys.readouterr().err
    assert (
        main(["batch", "clips.txt", "-o", "out", "-f", "npz", "--workers", "1", "--json", "fastflownet/all.json"]) == 0
    )
    store = Store(tmp_path / "out")
    for words in (["retry", "--json"], ["status", "--json"]):
        assert main(["batch", words[0], "out", words[1], "a clip.mp4"]) == 1
        assert "choose another output" in capsys.readouterr().err and store.ids().count == 2
    store.write(store.control("settings.json"), {"settings": {"model": "fastflownet:own.safetensors"}})
    assert main(["batch", "retry", "out", "--json", "own.safetensors"]) == 1
    assert "choose another output" in capsys.readouterr().err
    assert all(Path(place).read_bytes() == content for place, content in before.items())


def test_what_can_be_no_path_is_the_failure_of_its_clip_alone(tmp_path):
    for wrong in ("a\0b", "file:///a::b"):
        assert local(wrong) is None
        _check_apart(Store(tmp_path / "out"), [Item("a", wrong)])
    assert local(f"file://{tmp_path}") == local(tmp_path) == Path(os.path.realpath(tmp_path))


def test_evaluate_a_list_of_data_sets(tmp_path):
    lay_out_example(tmp_path)
    worker = a_worker(tmp_path / "out", Settings(do="evaluate", device="cpu"))
    report = worker(Item("one", str(tmp_path / "pairs")))
    assert (report.outcome, report.frames) == ("done", 2), report
    scores = json.loads((tmp_path / "out" / "one" / "scores.json").read_text())
    assert scores["pairs"][0]["pair"] == "example" and scores["pairs"][0]["epe"]["value"] < 5
    assert (tmp_path / "out" / "one" / "pairs.csv").read_text().count("\n") == 2
    assert "no pair" in worker(Item("two", str(tmp_path / "frames"))).reason


def test_a_run_splits_a_film(tmp_path):
    write_clip(tmp_path / "long.mp4", 9)
    write_clip(tmp_path / "short.mp4", 3)
    (tmp_path / "clips.txt").write_text("long.mp4\nshort.mp4\n")
    summary = batch(tmp_path / "clips.txt", tmp_path / "out", replace(NPZ, split=3), workers=2)
    assert (summary.done, summary.missing, summary.frames) == (2, 0, 12)
    assert len(contents(tmp_path / "out")) == 10


# runs that are killed


def children(of: set[int]) -> set[int]:
    """The processes whose parent is one of these (Linux)."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in of and fields[0] != "Z":
            found.add(int(entry.parent.name))
    return found


def driver(clips: Path, output: Path) -> subprocess.Popen:
    words = ["batch", str(clips / "clips.txt"), "-o", str(output), "-f", "npz", "--device", "cpu", "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "fleetflow", *words, "--tries", "99"], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_and_run_are_killed_and_nothing_shows_it(clips, whole, tmp_path):
    output, killed, ended = tmp_path / "out", 0, set()

    def results() -> int:
        return sum(1 for _ in Store(output).done())

    for restart in range(2):
        process = driver(clips, output)
        seen = results()
        refused = False
        while process.poll() is None:
            holder = {} if refused else Store(output).read(str(output / ".batch" / "run.json")) or {}
            if holder.get("pid") == process.pid:
                with pytest.raises(FleetflowError, match="is in use by"):
                    batch(clips / "clips.txt", output, NPZ)
                refused = True
            workers = children(children({process.pid}))  # the server that forks them is between
            ended |= workers
            if results() > seen and workers:
                seen = results()
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(min(workers), signal.SIGKILL)
                    killed += 1
            if restart == 0 and killed >= 2 and results() >= 4:
                process.kill()
            time.sleep(0.05)
        _, error = process.communicate()
        assert process.returncode == (-signal.SIGKILL if restart == 0 else 0), error
    assert killed >= 4
    assert contents(output) == contents(whole)
    records = [Store(output).record(id) for id in Store(output).done()]
    assert len(records) == 12 and len({record.run for record in records}) == 2
    until = time.monotonic() + 20
    while ended & {int(path.name) for path in Path("/proc").glob("[0-9]*")} and time.monotonic() < until:
        time.sleep(0.05)
    assert not ended & {int(path.name) for path in Path("/proc").glob("[0-9]*")}, "no worker outlives its run"
    left = {path.name for path in (output / ".batch").iterdir()}
    assert left == {"items", "list.json", "progress.json", "run.json", "settings.json"}
