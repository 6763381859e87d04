"""A folder of saved flows in the place of a network: every way of naming them, and what is said of those that fail."""

import json

import numpy as np
import pytest

from fleetflow.cli.main import main
from fleetflow.data.dataset import Files, Pair
from fleetflow.evaluation.evaluate import measure
from fleetflow.evaluation.saved_flows import saved_flows
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.types import FleetflowError

HEIGHT, WIDTH = 8, 12
TRUTH = np.zeros((HEIGHT, WIDTH, 2), np.float32)
TRUTH[..., 0] = 2


def pair(group: str, name: str, frame1: str, frame2: str, root) -> Pair:
    for frame in (frame1, frame2):
        if not (root / frame).exists():
            write_image(root / frame, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return Pair(group, name, root / frame1, root / frame2, lambda: (TRUTH.copy(), np.ones((HEIGHT, WIDTH), bool)))


def sintel(root) -> Files:
    rows = [(scene, k) for scene in ("alley_1", "wall") for k in (1, 2)]
    place = "training/final/{}/frame_{:04d}.png"
    return Files([pair("sintel/final", f"{scene}/frame_{k:04d}", place.format(scene, k), place.format(scene, k + 1), root)
                  for scene, k in rows])  # fmt: skip


def kitti(root) -> Files:
    place = "training/image_2/{:06d}_{}.png"
    return Files([pair("kitti2015", f"{k:06d}", place.format(k, 10), place.format(k, 11), root) for k in (0, 1)])


def spring(root) -> Files:
    place = "train/0001/frame_left/frame_left_{:04d}.png"
    return Files([pair("spring", f"0001/left/{a:04d}-{b:04d}", place.format(a), place.format(b), root)
                  for a, b in ((1, 2), (2, 1), (2, 3))])  # fmt: skip


def sets(root) -> Files:
    return Files([pair(group, name, f"{group}/{name}/img1.png", f"{group}/{name}/img2.png", root)
                  for group, name in (("one", "a"), ("two", "b"))])  # fmt: skip


NAMES = [
    (sintel, ["final/alley_1/frame0001.flo", "final/alley_1/frame0002.flo", "final/wall/frame0001.flo"]),  # submit
    (sintel, ["alley_1/frame_0001.flo", "alley_1/frame_0002.flo", "wall/frame_0001.flo"]),
    (sintel, ["sintel/final/alley_1/frame_0001.npz", "sintel/final/alley_1/frame_0002.npz"]),
    (sintel, ["of/training/final/alley_1/frame_0001.flo", "of/training/final/wall/frame_0001.flo"]),
    (sintel, ["alley_1/frame_0001_kitti.png", "alley_1/frame_0002_kitti.png"]),  # predict -f kitti
    (kitti, ["flow/000000_10.png", "flow/000001_10.png"]),
    (kitti, ["000000_10_kitti.png", "000001_10_kitti.png"]),
    (kitti, ["000000.flo", "000001.flo"]),
    (kitti, ["kitti2015/000001.pfm"]),
    (spring, ["0001/flow_FW_left/flow_FW_left_0001.npy", "0001/flow_BW_left/flow_BW_left_0002.npy"]),
    (spring, ["0001/left/0001-0002.flo", "0001/left/0002-0001.flo", "0001/left/0002-0003.flo"]),
    (sets, ["one/a.flo", "two/b.flo"]),
    (sets, ["a/img1.flo", "b/img1.flo"]),  # predict into a folder a pair
    (sets, ["one/a/img1.flo"]),
]


@pytest.mark.parametrize("made, names", NAMES, ids=[f"{made.__name__} {names[0]}" for made, names in NAMES])
def test_ways_of_naming(made, names, tmp_path):
    """Flow k is (k, 0) and the true one (2, 0), so the error says which file was taken."""
    for k, name in enumerate(names):
        write_flow(tmp_path / "results" / name, np.full_like(TRUTH, (k, 0)))
    files = made(tmp_path / "data")
    found = saved_flows(tmp_path / "results", files)
    assert [str(path.relative_to(tmp_path / "results")) for path in found.flows] == names
    assert len(found.lacking) == len(files) - len(names) and found.unused == 0
    result = measure(found, found.files, model="saved", dataset="made")
    assert [row.errors["epe"] for row in result.pairs] == [abs(k - 2) for k in range(len(names))]
    assert "flow files of" in result.protocol["method"]


def test_what_is_not_a_flow_and_what_is_left_over(tmp_path):
    root = tmp_path / "results"
    for name in ("000000_10.flo", "000000_10_kitti.png", "other.flo"):
        write_flow(root / name, np.full_like(TRUTH, 1 / 3))
    for name in ("000001_10_color.png", "000001_10_side.png"):
        write_image(root / name, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_flow(root / ".part-0123456789ab.flo", TRUTH)
    found = saved_flows(root, kitti(tmp_path / "data"))
    assert [path.name for path in found.flows] == ["000000_10.flo"], "the format with more digits"
    assert found.lacking == ["kitti2015/000001"] and found.unused == 1
    lines = found.summary()
    assert (
        lines[0].startswith("1 of 2 pairs have a flow")
        and "kitti2015/000001" in lines[1]
        and "1 flow files" in lines[2]
    )


def test_unknown_vectors_are_not_forgiven(tmp_path):
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[0] = False
    write_flow(tmp_path / "results" / "000000_10.png", TRUTH, valid)
    found = saved_flows(tmp_path / "results", kitti(tmp_path / "data"))
    result = measure(found, found.files, model="saved", dataset="made")
    assert result.pooled()["all"]["not_finite"].value == pytest.approx(100 / HEIGHT)


def test_folders_that_say_nothing_or_two_things(tmp_path):
    files = kitti(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FleetflowError, match="empty holds 0 flow files and none for a pair .* expected kitti2015/000000"
    ):
        saved_flows(tmp_path / "empty", files)
    for method in ("one", "two"):
        write_flow(tmp_path / "results" / method / "000000_10.flo", TRUTH)
    with pytest.raises(FleetflowError, match="one/000000_10.flo and two/000000_10.flo for kitti2015/000000; name the"):
        saved_flows(tmp_path / "results", files)
    with pytest.raises(FleetflowError, match="2 flow files, such as one/000000_10.flo, and none"):
        saved_flows(tmp_path / "results", sets(tmp_path / "sets"))


@pytest.fixture
def data(tmp_path):
    for name in ("one/a", "one/b"):
        for k in (1, 2):
            write_image(tmp_path / "data" / name / f"img{k}.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        write_flow(tmp_path / "data" / name / "flow.png", TRUTH)
    return tmp_path / "data"


def test_by_command(data, tmp_path, capsys):
    words = ["pairs", "--root", str(data)]
    write_flow(tmp_path / "results" / "a.flo", np.zeros_like(TRUTH))
    results = str(tmp_path / "results")
    out = [str(tmp_path / name) for name in ("t.json", "t.csv", "r.html")]
    assert main(["evaluate", results, *words, "--json", out[0], "--csv", out[1], "--html", out[2]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 pairs have a flow" in shown and "warning: not measured, as they have none: one/b" in shown
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["score"]["one"]["epe"] == 2 and "1 of 2 pairs" in content["protocol"]["method"]
    assert main(["evaluate", results, *words, "--device", "cpu"]) == 1
    assert "so nothing is computed" in capsys.readouterr().err
    write_flow(tmp_path / "results" / "b.flo", np.zeros((HEIGHT, WIDTH + 1, 2)))
    assert main(["evaluate", results, *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("b.flo is 8x13, the frames of one/b 8x12; save each flow at the size of its frames")
    (tmp_path / "results" / "b.flo").write_bytes(b"PIEH")
    assert main(["evaluate", results, *words]) == 1
    assert "b.flo cannot be read" in capsys.readouterr().err


def test_what_submit_and_predict_write_can_be_judged(data, tmp_path, monkeypatch, capsys):
    """The flows of `predict` are those that the network gives when it is judged itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        frames = [str(data / "one" / name / f"img{k}.png") for k in (1, 2)]
        assert (
            main(["predict", *frames, "-o", f"out/{name}", "-f", "flo", "--precision", "fp32", "-m", "fastflownet"])
            == 0
        )
    scores = []
    for model in (["out"], ["fastflownet", "--precision", "fp32"]):
        assert main(["evaluate", model[0], "pairs", "--root", str(data), *model[1:], "--json", "t.json"]) == 0
        scores.append(json.loads((tmp_path / "t.json").read_text())["score"])
    assert scores[0]["one"] == pytest.approx(scores[1]["one"], abs=1e-4)


def test_a_folder_called_like_a_network_is_the_network(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    write_flow(tmp_path / "dis" / "a.flo", TRUTH)
    assert main(["evaluate", "dis", "pairs", "--root", str(data)]) == 0
    assert "pairs have a flow" not in capsys.readouterr().out
    assert main(["evaluate", "./dis", "pairs", "--root", str(data)]) == 0
    assert "1 of 2 pairs have a flow" in capsys.readouterr().out


@pytest.mark.parametrize("model, said", [("results/", "does not exist"), ("./results", "does not exist"),
                                         ("a/results.zip", "unpack it"), ("results", "no network is called")])  # fmt: skip
def test_a_folder_that_is_not_there(model, said, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", model, "pairs", "--root", str(data)]) == 1
    assert said in capsys.readouterr().err
