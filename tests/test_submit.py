"""Submissions: official names in miniature data sets, every fault that a server would refuse, interrupted runs."""

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.cli.main import main
from fleetflow.evaluation import submit as job
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import lock_folder
from fleetflow.io.flow import read_flow, write_flow
from fleetflow.io.images import write_image
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.types import FleetflowError, Prediction

HEIGHT, WIDTH = 12, 16
FRAMES = {
    "sintel": [f"test/{kind}/{scene}/frame_{k:04d}.png" for kind in ("clean", "final")
               for scene, count in (("ambush_1", 3), ("wall", 2)) for k in range(1, count + 1)],
    "kitti2012": [f"testing/colored_0/{k:06d}_{n}.png" for k in range(3) for n in (10, 11)],
    "kitti2015": [f"testing/image_2/{k:06d}_{n}.png" for k in range(3) for n in (10, 11)],
    "spring": [f"test/0003/frame_{side}/frame_{side}_{k:04d}.png" for side in ("left", "right") for k in (1, 2, 3)],
}  # fmt: skip
NAMES = {
    "sintel": [f"{kind}/{name}" for kind in ("clean", "final")
               for name in ("ambush_1/frame0001.flo", "ambush_1/frame0002.flo", "wall/frame0001.flo")],
    "kitti2012": ["000000_10.png", "000001_10.png", "000002_10.png"],
    "kitti2015": ["flow/000000_10.png", "flow/000001_10.png", "flow/000002_10.png"],
    "spring": [f"0003/flow_{way}_{side}/flow_{way}_{side}_{k:04d}.flo5"
               for side in ("left", "right") for way, numbers in (("FW", (1, 2)), ("BW", (2, 3))) for k in numbers],
}  # fmt: skip
BENCHMARKS = list(FRAMES)
LABEL = {"model": "brightness"}


def predict(image1, image2):
    """The difference in brightness as motion: frame k has brightness 10 k, so that time shows its direction."""
    change = float(image2.mean()) - float(image1.mean())
    return np.full((*image1.shape[:2], 2), change, np.float32)


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """The test frames of each benchmark in miniature, and its official numbers reduced to them."""
    for name in BENCHMARKS:
        for k, place in enumerate(FRAMES[name]):
            write_image(tmp_path / name / place, np.full((HEIGHT, WIDTH, 3), 10 * (k % 20), np.uint8))
        small = job.BENCHMARKS[name]._replace(flows=len(NAMES[name]))
        monkeypatch.setitem(job.BENCHMARKS, name, small._replace(size=small.size and (HEIGHT, WIDTH)))
    return tmp_path


@pytest.fixture
def kitti(roots):
    """A whole submission to KITTI 2015 as a folder."""
    return job.submit(predict, "kitti2015", roots / "kitti2015", roots / "k15", LABEL)


def test_official_numbers():
    """552 in each pass of Sintel; Spring has 1000 frames in 10 sequences, two cameras and two directions."""
    flows = {name: wanted.flows for name, wanted in job.BENCHMARKS.items()}
    assert flows == {"sintel": 1104, "kitti2012": 195, "kitti2015": 200, "spring": (1000 - 10) * 4}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_official_names(name, roots):
    if name == "spring":
        pytest.importorskip("h5py")
    output = job.submit(predict, name, roots / name, roots / "out.zip", LABEL)
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == NAMES[name] and archive.testzip() is None
    assert job.problems(output, name, roots / name) == []
    flow, valid = read_flow(roots / "out" / NAMES[name][-1])
    assert flow.shape == (HEIGHT, WIDTH, 2) and valid.all()
    assert (flow == (-10 if name == "spring" else 10)).all(), "the last of Spring goes backward"
    assert not list(roots.glob(".part*")) and "out" in job.next_step(name, output) or name.startswith("kitti")


def test_kitti_files_have_16_bits(kitti):
    assert (kitti / "flow" / "000000_10.png").read_bytes()[24:26] == b"\x10\x02", "16 bits, RGB"


def test_an_interrupted_run_continues(roots):
    done = []

    def interrupted(image1, image2):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return predict(image1, image2)

    arguments = ("kitti2015", roots / "kitti2015", roots / "k.zip", LABEL)
    with pytest.raises(KeyboardInterrupt):
        job.submit(interrupted, *arguments)
    assert not (roots / "k.zip").exists() and len(list((roots / "k").rglob("*.png"))) == 2
    calls = []
    job.submit(lambda *images: calls.append(1) or predict(*images), *arguments)
    assert len(calls) == 1 and (roots / "k.zip").is_file()


def test_other_flows_are_not_taken_over(kitti, roots):
    with pytest.raises(FleetflowError, match="brightness"):
        job.submit(predict, "kitti2015", roots / "kitti2015", kitti, {"model": "other"})
    (roots / "full").mkdir()
    (roots / "full" / "letter.txt").write_text("mine")
    with pytest.raises(FleetflowError, match="not empty"):
        job.submit(predict, "kitti2015", roots / "kitti2015", roots / "full", LABEL)


def test_flows_of_other_weights_are_not_taken_over(roots, capsys):
    """By command: the same name with other weights, another precision or another folder of frames is another run."""
    frames = roots / "kitti2012"
    for place in frames.rglob("*.png"):
        write_image(place, np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    checkpoint = roots / "own.safetensors"

    def run(seed: int, *more: str, root: str = "kitti2012") -> tuple[int, str]:
        torch.manual_seed(seed)
        model = weights.load("lightflow_050", weights=False)
        weights.save(model, checkpoint, {"network": "lightflow_050", "license": "none"})
        words = ["submit", f"lightflow_050:{checkpoint}", "kitti2012", "--root", str(roots / root), *more]
        return main([*words, "--device", "cpu", "-o", str(roots / "w.zip")]), capsys.readouterr().err

    assert run(0, "--precision", "fp32")[0] == 0 and run(0, "--precision", "fp32")[0] == 0
    for more, key in (((1, "--precision", "fp32"), "sha256"), ((0, "--precision", "bf16"), "dtype")):
        code, error = run(*more)
        assert code == 1 and f"made with {key}" in error.splitlines()[-1], error
    shutil.copytree(frames, roots / "copy")
    code, error = run(0, "--precision", "fp32", root="copy")
    assert code == 1 and "made with root" in error.splitlines()[-1]


def test_what_is_not_finite_is_not_written(roots):
    with pytest.raises(FleetflowError, match="not finite"):
        job.submit(lambda a, b: predict(a, b) * np.nan, "sintel", roots / "sintel", roots / "s.zip", LABEL)
    assert not (roots / "s.zip").exists()


def eight_bits(place):
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(place / "flow" / "000001_10.png")


def unknown(place):
    flow = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    flow[0, :3] = np.nan
    write_flow(place / "flow" / "000001_10.png", flow)


def other_folder(place):
    (place / "flow").rename(place / "flows")


FAULTS = {
    "is missing": lambda place: (place / "flow" / "000002_10.png").unlink(),
    "flow/Thumbs.db does not belong": lambda place: (place / "flow" / "Thumbs.db").write_text(""),
    "is 12x15, its frame 12x16": lambda place: write_flow(place / "flow/000001_10.png", np.zeros((12, 15, 2))),
    "16-bit RGB": eight_bits,
    "3 vectors that are unknown": unknown,
    "cannot be read": lambda place: (place / "flow" / "000001_10.png").write_bytes(b"\x89PNG"),
    "flows/000000_10.png does not belong": other_folder,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_would_refuse(fault, kitti, roots):
    assert job.problems(kitti, "kitti2015", roots / "kitti2015") == []
    FAULTS[fault](kitti)
    found = job.problems(kitti, "kitti2015", roots / "kitti2015")
    assert any(fault in phrase for phrase in found), found
    shutil.make_archive(str(roots / "made"), "zip", kitti)
    packed = job.problems(roots / "made.zip", "kitti2015", roots / "kitti2015")
    assert any(fault in phrase for phrase in packed), packed
    assert any(job.NOTE in phrase for phrase in packed), "the note belongs into the folder, not into the zip"


def test_a_file_that_a_zip_holds_twice(kitti, roots):
    shutil.make_archive(str(roots / "made"), "zip", kitti, "flow")
    with zipfile.ZipFile(roots / "twice.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for k in (0, 1, 1, 2):
            archive.write(kitti / f"flow/00000{k}_10.png", f"flow/00000{k}_10.png")
    found = job.problems(roots / "twice.zip", "kitti2015", roots / "kitti2015")
    assert found == ["flow/000001_10.png is in it twice"]


def test_kitti_limits_the_bytes(kitti, roots, monkeypatch):
    monkeypatch.setitem(job.BENCHMARKS, "kitti2015", job.BENCHMARKS["kitti2015"]._replace(byte_limit=100))
    assert any("MB are allowed" in phrase for phrase in job.problems(kitti, "kitti2015", roots / "kitti2015"))


@pytest.mark.parametrize("suffix", [".flo", ".flo5"])
def test_not_a_number_in_other_files(suffix, roots):
    """Written by hand, past the writer, which would mark such a vector as unknown."""
    name = "sintel" if suffix == ".flo" else "spring"
    if name == "spring":
        pytest.importorskip("h5py")
    place = job.submit(predict, name, roots / name, roots / "made", LABEL)
    flow = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    flow[2, 3, 1] = np.nan
    write_flow(place / NAMES[name][0], flow)
    assert job.problems(place, name, roots / name) == [
        f"{NAMES[name][0]} holds 1 vectors that are unknown or not finite"
    ]


def test_incomplete_data_sets_are_refused(roots):
    (roots / "kitti2015/testing/image_2/000002_11.png").unlink()
    with pytest.raises(FleetflowError, match="does not exist"):
        job.problems(roots, "kitti2015", roots / "kitti2015")
    (roots / "kitti2015/testing/image_2/000002_10.png").unlink()
    with pytest.raises(FleetflowError, match="2 flows; kitti2015 has 3"):
        job.submit(predict, "kitti2015", roots / "kitti2015", roots / "k.zip", LABEL)
    write_image(roots / "sintel" / FRAMES["sintel"][0], np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(FleetflowError, match="original frames"):
        job.submit(predict, "sintel", roots / "sintel", roots / "s.zip", LABEL)


def test_by_command(roots, capsys):
    pytest.importorskip("cv2")
    words = ["--root", str(roots / "kitti2012")]
    for place in (roots / "kitti2012").rglob("*.png"):
        write_image(place, np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    assert main(["submit", "farneback", "kitti2012", *words, "-o", str(roots / "f.zip")]) == 0
    assert "cvlibs.net" in capsys.readouterr().out
    assert main(["submit", str(roots / "f.zip"), "kitti2012", *words]) == 0
    assert "whole submission" in capsys.readouterr().out
    assert main(["submit", str(roots / "f.zip"), "kitti2015", "--root", str(roots / "kitti2015")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fleetflow: kitti2015 would refuse") and "and 3 more" in error
    assert main(["submit", "dis", "kitti2012", *words, "--iterations", "3"]) == 1
    assert "dis has no refinement iterations" in capsys.readouterr().err
    (roots / "text.zip").write_text("no zip")
    assert main(["submit", str(roots / "text.zip"), "kitti2012", *words]) == 1
    assert "cannot be read as a zip" in capsys.readouterr().err


def test_a_file_of_the_user(roots, capsys):
    """What evaluate takes, and its content is part of the label: changed, it is another run."""
    path, words = roots / "net.py", ["kitti2015", "--root", str(roots / "kitti2015"), "-o", str(roots / "n")]
    code = "import numpy\ndef predict(a, b):\n    return numpy.full((*a.shape[:2], 2), {}.0)\n"
    path.write_text(code.format(1))
    assert main(["submit", str(path), *words]) == 0 and main(["submit", str(path), *words]) == 0
    note = json.loads((roots / "n" / job.NOTE).read_text())["request"]
    assert note["model"] == "net" and note["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(code.format(2))
    assert main(["submit", str(path), *words]) == 1
    assert "made with sha256" in capsys.readouterr().err.splitlines()[-1]
    assert main(["submit", str(path), *words, "--device", "cpu"]) == 1 and "no --device" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_named(roots, capsys):
    for path in ("./nowhere", str(roots / "nowhere"), str(roots / "nowhere.zip")):
        assert main(["submit", path, "kitti2015", "--root", str(roots / "kitti2015")]) == 1
        assert f"{path} does not exist" in capsys.readouterr().err


class Walking(FlowModel):
    """Moves by one pixel more at each pair that goes on from the last one."""

    stride, fit = 4, "pad"

    def forward(self, frame1, frame2, previous=None, iterations=None):  # frames of one color move here, too
        return self.estimate(frame1, frame2, previous, iterations)

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        flow = torch.ones_like(frame1[:, :2]) + (0 if previous is None else previous.state[..., :1, :1])
        return Prediction(flow, state=flow)


def test_warm_start_goes_on_within_a_scene(roots):
    predictor = Predictor(Walking().eval(), device="cpu", precision="fp32")
    arguments = (predictor, "sintel", roots / "sintel", roots / "s", predictor.label())
    job.submit(*arguments, warm_start=True)

    def found():
        return [read_flow(roots / "s" / name)[0][0, 0, 0] for name in NAMES["sintel"]]

    assert (
        found() == [1, 2, 1, 1, 2, 1] and json.loads((roots / "s" / job.NOTE).read_text())["request"]["start"] == "warm"
    )
    (roots / "s" / NAMES["sintel"][1]).unlink()
    job.submit(*arguments, warm_start=True)
    assert found() == [1, 2, 1, 1, 2, 1], "an interrupted run continues with the same flows"
    with pytest.raises(FleetflowError, match="made with start warm"):
        job.submit(*arguments)
    with pytest.raises(FleetflowError, match="no pair here begins"):
        job.submit(predictor, "kitti2015", roots / "kitti2015", roots / "k", {}, warm_start=True)


def test_a_run_continues_into_a_folder_called_like_its_model(roots, monkeypatch, capsys):
    """`-o dis` makes a folder dis; the same command again means the method still, ./dis the folder."""
    pytest.importorskip("cv2")
    monkeypatch.chdir(roots)
    for place in (roots / "kitti2012").rglob("*.png"):
        write_image(place, np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    words = ["submit", "farneback", "kitti2012", "--root", "kitti2012", "-o", "farneback"]
    assert main(words) == 0
    (roots / "farneback" / "000001_10.png").unlink()
    assert main(words) == 0 and (roots / "farneback" / "000001_10.png").is_file()
    (roots / "farneback" / "000001_10.png").unlink()
    assert main(["submit", "./farneback", *words[2:]]) == 1
    assert "000001_10.png is missing" in capsys.readouterr().err


def in_a_child(work) -> int:
    """Runs `work` in a forked process; returns its wait status, 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a lock that another thread held at the fork can stop it for good
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_at_any_rename_is_finished_by_the_next(when, roots):
    """The renames are those of the note, of three flows and of the zip; nothing that a killed run leaves stays."""
    arguments = ("kitti2015", roots / "kitti2015", roots / "k" / "s.zip", LABEL)
    replace = os.replace

    def killed_at(number: int) -> bool:
        count = 0

        def killing(*names, **options):
            nonlocal count
            count += 1
            if count == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names, **options)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def work():
            os.replace = killing
            job.submit(predict, *arguments)

        return os.WIFSIGNALED(in_a_child(work))

    for number in range(1, 7):
        assert killed_at(number) == (number <= 5)
        assert job.submit(predict, *arguments) == roots / "k" / "s.zip"
        assert job.problems(roots / "k" / "s.zip", "kitti2015", roots / "kitti2015") == []
        assert {path.name for path in (roots / "k").rglob("*") if path.is_file()} == {
            "s.zip", job.NOTE, *(name.removeprefix("flow/") for name in NAMES["kitti2015"])
        }  # fmt: skip
        shutil.rmtree(roots / "k")


def test_a_damaged_flow_of_an_interrupted_run_is_predicted_again(roots):
    """A machine that lost its power may leave a file of our name that is empty."""
    arguments = ("kitti2015", roots / "kitti2015", roots / "s", LABEL)
    place = job.submit(predict, *arguments)
    (place / NAMES["kitti2015"][1]).write_bytes(b"")
    job.submit(predict, *arguments)
    assert job.problems(place, "kitti2015", roots / "kitti2015") == []
    (place / job.NOTE).write_text("{")
    with pytest.raises(FleetflowError, match="note of an earlier run"):
        job.submit(predict, *arguments)


def test_a_zip_that_is_not_ours_stays(roots):
    (roots / "k.zip").write_text("mine")
    with pytest.raises(FleetflowError, match="exists and is not of an earlier run"):
        job.submit(predict, "kitti2015", roots / "kitti2015", roots / "k.zip", LABEL)
    assert (roots / "k.zip").read_text() == "mine"
    (roots / "k.zip").unlink()
    for _ in range(2):
        job.submit(predict, "kitti2015", roots / "kitti2015", roots / "k.zip", LABEL)


def test_two_runs_into_one_folder(roots):
    with lock_folder(roots / "k", "another run"), pytest.raises(FleetflowError, match='in use by "another run"'):
        job.submit(predict, "kitti2015", roots / "kitti2015", roots / "k.zip", LABEL)
    assert not (roots / "k" / job.NOTE).exists()


def test_a_full_disk_is_one_line(roots, capfd):
    """A limit on the size of files stands for it: the note is smaller, a flow of noise is larger."""

    def noise(image1, image2):
        return np.random.default_rng(0).normal(0, 9, (*image1.shape[:2], 2)).astype(np.float32)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        try:
            job.submit(noise, "kitti2015", roots / "kitti2015", roots / "s", LABEL)
        except FleetflowError as error:
            os.write(1, f"{error}".encode())

    assert in_a_child(work) == 0
    said = capfd.readouterr().out
    assert "flow/000000_10.png cannot be written (" in said and "space left" in said and said.count("\n") == 0, said
    assert not list((roots / "s").rglob(".part-*"))


def test_members_of_a_zip_that_are_larger_than_a_flow(kitti, roots, monkeypatch):
    """Neither the size in the directory of a zip nor what unpacks from it is more than a flow of the frames can have."""
    zeros = bytes(50_000_000)
    with zipfile.ZipFile(roots / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES["kitti2015"]:
            archive.writestr(name, zeros if name.endswith("1_10.png") else (kitti / name).read_bytes())
    taken, real = [], zipfile.ZipExtFile.read

    def read(self, count=-1):
        content = real(self, count)
        taken.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    found = job.problems(roots / "bomb.zip", "kitti2015", roots / "kitti2015")
    assert found == ["flow/000001_10.png has 50 MB; a flow of its frames has 1 MB at most"]
    content = (roots / "bomb.zip").read_bytes()
    for claimed in (600, 2**20):
        (roots / "liar.zip").write_bytes(content.replace(struct.pack("<L", 50_000_000), struct.pack("<L", claimed)))
        (problem,) = job.problems(roots / "liar.zip", "kitti2015", roots / "kitti2015")
        assert problem.startswith("flow/000001_10.png cannot be read as a member of a zip (Bad CRC-32")
    assert max(taken) < 2**21
