"""The doctor finds what is missing, unreadable or unknown, and a flow that is stored otherwise than we read it."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fleetflow.cli.main import main
from fleetflow.data import doctor
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.ops.warp import pixel_grid, warp
from fleetflow.types import FleetflowError

SCENES = ("Dimetrodon", "Grove2", "RubberWhale")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames 72x96 that move by a zoom with a shift, and the flow of it: no other reading of it is the same."""
    made = []
    for seed in range(len(SCENES)):
        texture = torch.rand((1, 3, 18, 24), generator=torch.Generator().manual_seed(seed))
        frame2 = F.interpolate(texture, size=(72, 96), mode="bicubic").clamp(0, 1)
        x, y = pixel_grid(72, 96, frame2)
        flow = torch.stack((5 + 0.06 * (x - 48), -3 + 0.08 * (y - 36)))
        images = [(255 * frame[0].permute(1, 2, 0)).byte().numpy() for frame in (warp(frame2, flow[None]), frame2)]
        made.append((*images, flow.permute(1, 2, 0).numpy()))
    return made


def store(root, scenes, change=lambda flow: flow, order=(10, 11)) -> None:
    for name, (first, second, flow) in zip(SCENES, scenes):
        write_image(root / f"other-data/{name}/frame{order[0]}.png", first)
        write_image(root / f"other-data/{name}/frame{order[1]}.png", second)
        write_flow(root / f"other-gt-flow/{name}/flow10.flo", change(flow))


def test_a_sound_set(scenes, tmp_path, capsys):
    def unknown(flow):
        flow = flow.copy()
        flow[:18] = np.nan
        return flow

    store(tmp_path, scenes, unknown)
    report = doctor.check("middlebury", tmp_path)
    assert not report.problems and [part.pairs for part in report.parts] == [3, 0]
    assert [pair.name for pair in report.opened] == [f"middlebury/{name}" for name in SCENES]
    pair = report.opened[0]
    assert (pair.height, pair.width, pair.unknown) == (72, 96, 0.25) and 4 < pair.length < pair.longest < 12
    assert set(report.readings) == set(doctor.READINGS) and min(report.readings.values()) > 1.5
    assert "3 of 8 pairs" in report.remarks[1] and "split=eval" in report.remarks[0]
    assert main(["doctor", "dataset", "middlebury", str(tmp_path), "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "no problem was found" in shown and "split=eval" in shown and "25.0" in shown


WRONG = {
    "negated": lambda flow: -flow,
    "with u and v exchanged": lambda flow: flow[..., ::-1],
    "with v upwards": lambda flow: flow * np.float32([1, -1]),
    "upside down": lambda flow: flow[::-1],
    "half as long": lambda flow: 2 * flow,
    "twice as long": lambda flow: flow / 2,
}


@pytest.mark.parametrize("reading", doctor.READINGS)
def test_a_flow_stored_otherwise(reading, scenes, tmp_path, capsys):
    exchanged = reading == "from frame2 to frame1"
    store(tmp_path, scenes, WRONG.get(reading, lambda flow: flow), (11, 10) if exchanged else (10, 11))
    report = doctor.check("middlebury", tmp_path)
    assert min(report.readings, key=report.readings.get) == reading
    assert len(report.problems) == 1 and reading in report.problems[0]
    assert main(["doctor", "dataset", "middlebury", str(tmp_path)]) == 1
    assert f"better {reading}" in capsys.readouterr().err


def store_kitti(root, scenes) -> None:
    for k, (first, second, flow) in enumerate(scenes):
        write_image(root / f"training/image_2/{k:06d}_10.png", first)
        write_image(root / f"training/image_2/{k:06d}_11.png", second)
        for folder in ("flow_occ", "flow_noc"):
            write_flow(root / f"training/{folder}/{k:06d}_10.png", flow)
        write_image(root / f"training/obj_map/{k:06d}_10.png", np.zeros_like(first))


def test_masks_that_are_absent_or_do_not_fit(scenes, tmp_path, capsys):
    def remarks(name, root) -> list[str]:
        report = doctor.check(name, root)
        assert not report.problems and all(ratio > 1 for ratio in report.readings.values())
        return [remark for remark in report.remarks if ' mask "' in remark]

    store_kitti(tmp_path / "k", scenes)
    assert remarks("kitti2015", tmp_path / "k") == []
    write_image(tmp_path / "k/training/obj_map/000001_10.png", np.zeros((72, 95, 3), np.uint8))
    write_flow(tmp_path / "k/training/flow_noc/000001_10.png", scenes[0][2][1:])
    assert remarks("kitti2015", tmp_path / "k") == [
        f'the mask "{name}" of kitti2015/000001 is {size} and its frames are 72x96: it cannot be used'
        for name, size in (("noc", "71x96"), ("foreground", "72x95"))
    ]
    (tmp_path / "k/training/flow_noc/000001_10.png").unlink()
    shutil.rmtree(tmp_path / "k/training/obj_map")
    (noc, foreground) = remarks("kitti2015", tmp_path / "k")
    assert noc.startswith('1 of 3 opened pairs have no mask "noc" (training/flow_noc)') and "visible" in noc
    assert foreground.startswith('3 of 3 opened pairs have no mask "foreground" (training/obj_map)')
    assert foreground.endswith("measures will lack Fl-bg and Fl-fg")
    (tmp_path / "k/training/image_2").rename(tmp_path / "k/training/colored_0")
    assert remarks("kitti2012", tmp_path / "k") == [noc]

    for k, (first, second, flow) in enumerate(scenes):
        for number, frame in ((1, first), (2, second)):
            write_image(tmp_path / f"s/training/final/scene_{k}/frame_{number:04d}.png", frame)
        write_flow(tmp_path / f"s/training/flow/scene_{k}/frame_0001.flo", flow)
        write_image(tmp_path / f"s/training/occlusions/scene_{k}/frame_0001.png", np.zeros((36, 48, 3), np.uint8))
    *sizes, invalid = remarks("sintel", tmp_path / "s")
    assert len(sizes) == 3 and all('"occluded"' in size and "is 36x48" in size for size in sizes)
    assert invalid.startswith('3 of 3 opened pairs have no mask "invalid" (training/invalid)')
    assert main(["doctor", "dataset", "sintel", str(tmp_path / "s")]) == 0
    assert "remark: the mask" in capsys.readouterr().out


def test_masks_of_a_test_set_are_not_missed(scenes, tmp_path):
    store_kitti(tmp_path, scenes)
    (tmp_path / "training").rename(tmp_path / "testing")
    assert not any(' mask "' in remark for remark in doctor.check("kitti2015", tmp_path).remarks)


def test_what_cannot_be_read_or_is_not_there(scenes, tmp_path, capsys):
    with pytest.raises(FleetflowError, match='did you mean "sintel"'):
        doctor.check("sintell", tmp_path)
    assert main(["doctor", "dataset", "sintel", str(tmp_path)]) == 1
    assert "holds no training/final; expected what is in MPI-Sintel-complete.zip" in capsys.readouterr().err
    store(tmp_path, scenes)
    path = tmp_path / "other-gt-flow" / "Grove2" / "flow10.flo"
    path.write_bytes(path.read_bytes()[:999])
    report = doctor.check("middlebury", tmp_path)
    assert len(report.opened) == 2 and len(report.problems) == 1 and "flow10.flo" in report.problems[0]
    path.unlink()
    (tmp_path / "other-data/Dimetrodon/frame11.png").unlink()
    assert main(["doctor", "dataset", "middlebury", str(tmp_path)]) == 1
    assert "lacks 1 files, the first other-data/Dimetrodon/frame11.png" in capsys.readouterr().err


def test_nothing_is_judged_by_no_pair(scenes, tmp_path, capsys):
    store(tmp_path, scenes)
    assert main(["doctor", "dataset", "middlebury", str(tmp_path), "--samples", "0"]) == 1
    assert "--samples is 0" in capsys.readouterr().err


def test_truth_that_is_kept_back_or_lost(scenes, tmp_path):
    store(tmp_path, scenes, lambda flow: np.full_like(flow, np.nan))
    assert "no opened pair has a known pixel" in doctor.check("middlebury", tmp_path).problems[0]


def test_still_frames_fit_every_reading_alike(tmp_path):
    gray = np.full((72, 96, 3), 127, np.uint8)
    store(tmp_path, [(gray, gray, np.full((72, 96, 2), 3.0, np.float32))])
    report = doctor.check("middlebury", tmp_path)
    assert not report.problems and report.readings
    assert all(ratio == pytest.approx(1, abs=1e-3) for ratio in report.readings.values()), report.readings


def test_real_pairs_are_as_we_read_them(shared):
    report = doctor.check("pairs", shared / "data", samples=5)
    assert not report.problems and len(report.opened) == 5
    assert all(ratio > 1.2 for ratio in report.readings.values()), report.readings
