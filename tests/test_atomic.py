"""Locks of folders and leftovers of killed runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import hear_signals

from fleetflow.io import atomic
from fleetflow.io.atomic import LOCK, lock_folder, remove_leftovers, temporary_name, write_atomically
from fleetflow.types import FleetflowError

HOLD = """
import sys, time
from pathlib import Path
from fleetflow.io.atomic import lock_folder, write_atomically
def slow(path):
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
with lock_folder(sys.argv[1], "predict clip.mp4"):
    write_atomically(Path(sys.argv[1]) / "x.txt", slow)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_told_who_has_the_folder(holder, tmp_path):
    with pytest.raises(FleetflowError, match="predict clip.mp4") as caught:
        with lock_folder(tmp_path, "other"):
            pass
    assert f"process {holder.pid} on" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert remove_leftovers(tmp_path) == [], "what a living process writes stays"
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path, "other"):
        assert len(remove_leftovers(tmp_path)) == 1
    assert not list(tmp_path.iterdir())


def test_one_process_locks_a_folder_once(tmp_path):
    with lock_folder(tmp_path / "new", "first"):
        with pytest.raises(FleetflowError, match="first"):
            with lock_folder(tmp_path / "new", "second"):
                pass
    with lock_folder(tmp_path / "new", "third"):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with lock_folder(tmp_path, "parent"):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with lock_folder(tmp_path, "next"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_our_leftovers_go(tmp_path):
    ours = temporary_name(tmp_path / "a.flo")
    theirs = [tmp_path / name for name in (".part-notes.txt", "part-0123456789ab.flo", ".part-0123456789ab.flo.bak")]
    for path in (ours, *theirs):
        path.write_text("x")
    (tmp_path / ".part-0123456789ac").mkdir()
    (tmp_path / ".part-0123456789ad.flo").symlink_to(theirs[0])
    assert remove_leftovers(tmp_path) == [ours]
    assert all(path.exists() for path in theirs) and (tmp_path / ".part-0123456789ac").exists()
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_where_the_file_system_knows_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_lock", lambda file: None)
    old, new = temporary_name(tmp_path / "a.flo"), temporary_name(tmp_path / "b.flo")
    for path in (old, new):
        path.write_text("x")
    os.utime(old, (time.time() - 2 * atomic.LEFTOVER_AGE,) * 2)
    assert remove_leftovers(tmp_path) == [old]
    with lock_folder(tmp_path, "first"):
        with pytest.raises(FleetflowError, match="first.*remove"):
            with lock_folder(tmp_path, "second"):
                pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    facts = {"what": "old", "pid": dead.pid, "host": atomic.socket.gethostname(), "since": "then"}
    (tmp_path / LOCK).write_text(json.dumps(facts))
    with lock_folder(tmp_path, "third"):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**facts, "host": "elsewhere"}))
    with pytest.raises(FleetflowError, match="elsewhere"):
        with lock_folder(tmp_path, "fourth"):
            pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(FleetflowError, match="cannot be written"):
        with lock_folder(tmp_path / "out", "run"):
            pass
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_run_as_ctrl_c_does(number, tmp_path):
    code = f"""
import sys, time
from fleetflow.cli import main
from fleetflow.io.atomic import write_atomically
def slow(path):
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
def wait():
    write_atomically({str(tmp_path / "x.txt")!r}, slow)
def other(): pass
main.COMMANDS.clear()
main.COMMANDS.update(wait=wait, other=other)
sys.exit(main.main(["wait"]))
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, preexec_fn=hear_signals)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    _, error = run.communicate(timeout=20)
    assert run.returncode == 128 + number and error.startswith("fleetflow: stopped") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "x", lambda path: 1 / 0)
    assert not list(tmp_path.iterdir())
