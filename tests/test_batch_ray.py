"""Batches on Ray: this machine alone loses its worker, a cluster of three nodes also a node and the run itself (if slow).

Nothing shows it in the results.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SLOW
from test_batch import NPZ, a_worker, children, contents, write_clip

from fleetflow.batch.manifest import Item, read_manifest
from fleetflow.batch.records import Store
from fleetflow.batch.run import batch
from fleetflow.batch.task import Job, Report
from fleetflow.types import FleetflowError

CLIPS, BETWEEN, PATIENCE = 300, 5.0, 3600  # of the cluster; seconds between kills; for one run at most


def test_a_worker_that_is_killed_is_replaced(tmp_path, monkeypatch):
    """By Ray on this machine, which needs no cluster: after the first of eight clips."""
    pytest.importorskip("ray.data", reason="needs the batch extra")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    clips = [write_clip(tmp_path / f"{k}.mp4", 8, k) for k in range(8)]
    (tmp_path / "clips.txt").write_text("\n".join(path.name for path in clips))
    store = Store(tmp_path / "out")

    def kill() -> None:
        while not (done := list(store.done())):
            time.sleep(0.01)
        os.kill(int(store.record(done[0]).worker.rpartition(":")[2]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    summary = batch(tmp_path / "clips.txt", tmp_path / "out", NPZ, on="ray", workers=1)
    assert (summary.done, summary.failed, summary.missing) == (8, {}, 0)
    assert len({store.record(id).worker for id in store.done()}) == 2
    worker = a_worker(tmp_path / "whole")
    assert [worker(item).outcome for item in read_manifest(tmp_path / "clips.txt")] == ["done"] * 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one core each, on this machine."""
    pytest.importorskip("ray.data", reason="needs the batch extra")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def actors(cluster) -> list[int]:
    """The processes of the pool, on all nodes."""
    raylets = {each.process.pid for node in cluster.list_all_nodes() for each in node.all_processes["raylet"]}
    found = []
    for pid in children(raylets):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::MapWorker"):
            found.append(pid)
    return found


@pytest.mark.skipif(not SLOW, reason="minutes on two cores; FLEETFLOW_SLOW=1 runs it")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_cluster_that_loses_workers_a_node_and_the_run(cluster, tmp_path):
    clips = [write_clip(tmp_path / f"{k:03d}.mp4", 8, k) for k in range(CLIPS)]
    (tmp_path / "clips.txt").write_text("\n".join(path.name for path in clips))
    output, killed, restarts, begun = tmp_path / "out", 0, 0, time.monotonic()
    words = ["batch", "clips.txt", "-o", "out", "-f", "npz", "--device", "cpu", "--on", "ray", "--tries", "99"]
    log = (tmp_path / "log").open("w")

    def results() -> int:
        return sum(1 for _ in Store(output).done())

    def run() -> subprocess.Popen:
        own = {**os.environ, "RAY_ADDRESS": cluster.address}
        return subprocess.Popen(
            [sys.executable, "-m", "fleetflow", *words], cwd=tmp_path, env=own, stderr=log, stdout=log
        )

    process, last, seen, end = run(), time.monotonic(), 0, time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.25)
        done = results()
        if restarts == 0 and done > CLIPS // 3:
            process.kill()
            process.wait()
            process, restarts = run(), 1
        elif restarts == 1 and done > CLIPS // 2:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            restarts = 2
        elif done > seen and time.monotonic() - last > BETWEEN and (found := actors(cluster)):
            last, seen = time.monotonic(), done  # on a slow machine a network takes long to load
            os.kill(found[0], signal.SIGKILL)
            killed += 1
    process.kill()
    print(f"{killed} workers killed, {time.monotonic() - begun:.0f} s")
    assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert killed >= 2 and restarts == 2
    whole = batch(tmp_path / "clips.txt", tmp_path / "whole", NPZ, workers=1)
    assert whole.done == CLIPS
    assert contents(output) == contents(tmp_path / "whole")
    records = [Store(output).record(id) for id in Store(output).done()]
    assert len({record.id for record in records}) == len(records) == CLIPS
    assert len({record.run for record in records}) == 2 and len({record.worker for record in records}) >= 3
    assert list(Store(output).failures()) == []


def test_a_name_that_is_no_text_reaches_its_worker(tmp_path):
    pytest.importorskip("ray.data", reason="needs the batch extra")
    from fleetflow.batch import ray

    name = os.fsdecode(b"\xff.mp4")
    store = Store(tmp_path / "out")
    store.write(store.control("run.json"), {"run": "r"})
    store.save_items([Item("one", str(tmp_path / name))])
    job = Job(NPZ, store, "r")
    rows = [row["task"] for shard in store.shards() for row in ray._Plan(job)({"shard": shard})]
    assert len(rows) == 1 and rows[0].isascii()
    (found,) = ray._Actor(job)({"task": np.array(rows, object)})["report"]
    assert found.isascii()
    report = Report(*json.loads(found))
    assert report.id == "one" and report.outcome == "failed" and "does not exist" in report.reason
    assert store.failure("one").input == str(tmp_path / name)


def test_a_ray_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    """It says with a plain Exception that its processes have not come up in time."""
    pytest.importorskip("ray.data", reason="needs the batch extra")
    from fleetflow.batch import ray

    def late(**_):
        tried.append(1)
        raise Exception("The current node timed out\nduring startup.")

    tried: list[int] = []

    monkeypatch.setattr(ray.ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(FleetflowError, match="Ray does not start on this machine .The current node timed out during"):
        ray.Ray(Job(NPZ, Store(tmp_path / "out"), "r"))
    assert len(tried) == ray.STARTS
