"""Recordings for Rerun, read back by its own library."""

import numpy as np
import pytest

from fleetflow.io.rerun import Recording
from fleetflow.types import FleetflowError


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(FleetflowError, match="expected .rrd"):
        Recording(tmp_path / "clip.mp4")


def test_what_was_written_is_read_back(tmp_path):
    chunk = pytest.importorskip("rerun.chunk", reason="needs the extra rerun")
    frame, flow = np.full((40, 70, 3), 90, np.uint8), np.zeros((40, 70, 2), np.float32)
    flow[..., 0] = 3
    with Recording(tmp_path / "new" / "clip.rrd") as recording:
        recording.write(frame, 0.0)
        maps = {"occlusion": flow[..., 0] / 3, "uncertainty": flow[..., 0]}
        points = np.array([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)])
        recording.write(frame, 0.5, flow=flow, **maps, points=points, visible=[True, False, True])
        assert not (tmp_path / "new" / "clip.rrd").exists()
    rows, last = {}, {}
    for part in chunk.RrdReader(tmp_path / "new" / "clip.rrd").stream().to_chunks():
        rows[part.entity_path] = rows.get(part.entity_path, 0) + part.num_rows
        last[part.entity_path] = part.to_record_batch().to_pydict()
    names = ("/flow", "/frame/arrows", "/occlusion", "/uncertainty", "/frame/points")
    assert rows["/frame"] == 2 and all(rows[name] == 1 for name in names)
    assert last["/frame/points"]["Points2D:positions"] == [[[1.5, 2.5], [5.5, 6.5]]]
    assert last["/frame/arrows"]["Arrows2D:vectors"][0] == [[3, 0]] * 2
    assert last["/flow"]["frame"] == [1]


def test_a_recording_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("rerun", reason="needs the extra rerun")
    with pytest.raises(OSError, match="full"), Recording(tmp_path / "clip.rrd") as recording:
        recording.write(np.zeros((8, 8, 3), np.uint8))
        raise OSError("full")
    assert not list(tmp_path.iterdir())
