"""Data sets: each layout is built in miniature from the docstring of its reader, and read back."""

import io
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.data.dataset import Files, datasets
from fleetflow.data.listing import Listing
from fleetflow.data.loader import decoded
from fleetflow.data.speed import loading_speed
from fleetflow.io.flow import read_flow, write_flow
from fleetflow.io.images import read_image, read_mask, write_image
from fleetflow.types import FleetflowError

HEIGHT, WIDTH = 12, 16
MASKS = ("occ_", "occlusions", "invalid", "obj_map")
READERS = [name for name in datasets if name not in ("pairs", "footage")]  # footage is generated: test_footage.py


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tree(name: str) -> list[str]:
    """The files in the docstring of a reader, relative to its root."""
    return [path for path in re.findall(r"^ +root/(\S+)", datasets[name].__doc__, re.M) if not path.endswith("...")]


def build(name: str, root: Path) -> dict[str, np.ndarray]:
    """Makes the files of the docstring; returns what is in the flows and masks."""
    content = {}
    for path in tree(name):
        content[path] = make(name, root, path)
    return content


def make(name: str, root: Path, path: str) -> np.ndarray | None:
    generator = np.random.default_rng(len(path) + sum(path.encode()))
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    scale = 2 if file.suffix == ".flo5" else 1
    flow = np.round(generator.normal(0, 3, (HEIGHT * scale, WIDTH * scale, 2)), 2).astype(np.float32)
    flow[4:6, 7:9] = np.nan
    if file.suffix == ".flo5":
        pytest.importorskip("h5py")
    if "flow_occ/" in path and file.suffix == ".png" or "flow_noc/" in path or file.suffix in (".flo", ".pfm", ".flo5"):
        write_flow(file, flow)
        return flow
    if file.suffix == ".npz":
        flow = flow.astype(np.float16)
        flow[0, 0] = 1000
        np.savez(file, u=flow[..., 0], v=flow[..., 1])
        return flow.astype(np.float32)
    if file.suffix == ".npy":
        values = generator.choice(np.array([0, 1, 10, 100], np.uint8), (HEIGHT, WIDTH)) if "mask" in path else flow
        np.save(file, values)
        return values
    if "ward_flow_" in path:
        return deep_png(file, np.nan_to_num(flow))
    if any(part in path for part in MASKS):
        values = generator.random((HEIGHT, WIDTH)) < 0.4
        Image.fromarray((values * (7 if "obj_map" in path else 255)).astype(np.uint8)).save(file)
        return values
    if file.suffix in (".txt", ".json"):
        return None  # the tests write them
    write_image(file, generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return None


def deep_png(file: Path, flow: np.ndarray) -> np.ndarray:
    """Writes flow as Kubric does, range -20 to 20, (down, right, 0); returns what the 16 bits keep of it."""
    stored = np.round((flow + 20) / 40 * 65535).astype(np.uint16)
    steps = np.dstack((stored[..., ::-1], np.zeros(flow.shape[:2], np.uint16)))
    # io writes 16-bit PNG files only as KITTI flow, u and v as 64 x + 2^15: choose u and v so that the steps are stored
    u_v = (steps[..., :2].astype(np.float64) - 2**15) / 64
    write_flow(file, u_v)
    return stored.astype(np.float32) / 65535 * 40 - 20


def same(found: torch.Tensor, valid: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    known = np.isfinite(expected).all(-1)
    assert valid.dtype == torch.bool and np.array_equal(valid.numpy(), known)
    assert np.allclose(found.permute(1, 2, 0).numpy(), np.where(known[..., None], expected, 0), atol=tolerance)


def prepared(name: str, root: Path) -> dict[str, np.ndarray]:
    content = build(name, root)
    if name == "flyingchairs":
        (root / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    if name == "kubric":
        ranges = {f"{way}_flow": {"min": -20.0, "max": 20.0} for way in ("forward", "backward")}
        (root / "0" / "data_ranges.json").write_text(json.dumps(ranges))
    if name == "folder":
        (root / "train.txt").write_text("a/00001_img1.ppm a/00001_img2.ppm a/00001_flow.flo\n\n")
        (root / "val.txt").write_text("b/frame_1.png b/frame_2.png\n")
    return content


# name, options, the frames of the first pair, its flow, its backward flow, number of pairs
CASES = [
    ("flyingchairs", {}, "data/00001_img1.ppm", "data/00001_img2.ppm", "data/00001_flow.flo", None, 1),
    ("flyingchairs", {"split": "all"}, "data/00001_img1.ppm", "data/00001_img2.ppm", "data/00001_flow.flo", None, 1),
    ("flyingchairs2", {}, "train/0000000-img_0.png", "train/0000000-img_1.png", "train/0000000-flow_01.flo",
     "train/0000000-flow_10.flo", 1),
    ("flyingchairs2", {"direction": "backward"}, "train/0000000-img_1.png", "train/0000000-img_0.png",
     "train/0000000-flow_10.flo", "train/0000000-flow_01.flo", 1),
    ("flyingchairs2", {"direction": "both"}, "train/0000000-img_0.png", "train/0000000-img_1.png",
     "train/0000000-flow_01.flo", "train/0000000-flow_10.flo", 2),
    ("chairs_sdhom", {}, "data/train/t0/00000.png", "data/train/t1/00000.png", "data/train/flow/00000.pfm", None, 1),
    ("flyingthings3d", {}, "frames_cleanpass/TRAIN/A/0000/left/0006.png", "frames_cleanpass/TRAIN/A/0000/left/0007.png",
     "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm",
     "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm", 2),
    ("flyingthings3d", {"direction": "backward"}, "frames_cleanpass/TRAIN/A/0000/left/0007.png",
     "frames_cleanpass/TRAIN/A/0000/left/0006.png",
     "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm",
     "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm", 1),
    ("flyingthings3d_subset", {}, "train/image_clean/left/0000000.png", "train/image_clean/left/0000001.png",
     "train/flow/left/into_future/0000000.flo", "train/flow/left/into_past/0000001.flo", 2),
    ("flyingthings3d_subset", {"direction": "backward"}, "train/image_clean/left/0000001.png",
     "train/image_clean/left/0000000.png", "train/flow/left/into_past/0000001.flo",
     "train/flow/left/into_future/0000000.flo", 1),
    ("sintel", {}, "training/final/alley_1/frame_0001.png", "training/final/alley_1/frame_0002.png",
     "training/flow/alley_1/frame_0001.flo", None, 1),
    ("sintel", {"render": "clean", "split": "train"}, "training/clean/alley_1/frame_0001.png",
     "training/clean/alley_1/frame_0002.png", "training/flow/alley_1/frame_0001.flo", None, 1),
    ("sintel", {"split": "test", "render": "clean"}, "test/clean/ambush_1/frame_0001.png",
     "test/clean/ambush_1/frame_0002.png", None, None, 1),
    ("kitti2012", {}, "training/colored_0/000000_10.png", "training/colored_0/000000_11.png",
     "training/flow_occ/000000_10.png", None, 1),
    ("kitti2012", {"split": "testing"}, "testing/colored_0/000000_10.png", "testing/colored_0/000000_11.png",
     None, None, 1),
    ("kitti2015", {}, "training/image_2/000000_10.png", "training/image_2/000000_11.png",
     "training/flow_occ/000000_10.png", None, 1),
    ("kitti2015", {"split": "testing"}, "testing/image_2/000000_10.png", "testing/image_2/000000_11.png",
     None, None, 1),
    ("hd1k", {}, "hd1k_input/image_2/000000_0000.png", "hd1k_input/image_2/000000_0001.png",
     "hd1k_flow_gt/flow_occ/000000_0000.png", None, 1),
    ("spring", {"split": "test"}, "test/0003/frame_left/frame_left_0001.png",
     "test/0003/frame_left/frame_left_0002.png", None, None, 1),
    ("middlebury", {}, "other-data/RubberWhale/frame10.png", "other-data/RubberWhale/frame11.png",
     "other-gt-flow/RubberWhale/flow10.flo", None, 1),
    ("middlebury", {"split": "eval"}, "eval-data/Army/frame10.png", "eval-data/Army/frame11.png", None, None, 1),
    ("autoflow", {}, *(f"static_40k_png_1_of_4/table_0_batch_0_sample_0/{name}"
                       for name in ("im0.png", "im1.png", "forward.flo")), None, 1),
    ("kubric", {}, "0/rgba_00000.png", "0/rgba_00001.png", "0/forward_flow_00000.png", "0/backward_flow_00001.png", 1),
    ("kubric", {"direction": "backward"}, "0/rgba_00001.png", "0/rgba_00000.png", "0/backward_flow_00001.png",
     "0/forward_flow_00000.png", 1),
    ("folder", {}, "a/00001_img1.ppm", "a/00001_img2.ppm", "a/00001_flow.flo", None, 2),
    ("folder", {"split": "train"}, "a/00001_img1.ppm", "a/00001_img2.ppm", "a/00001_flow.flo", None, 1),
    ("folder", {"split": "val"}, "b/frame_1.png", "b/frame_2.png", None, None, 1),
]  # fmt: skip


@pytest.mark.parametrize("name, options, first, second, truth, backward, count", CASES)
def test_layout_of_the_docstring(name, options, first, second, truth, backward, count, tmp_path):
    content = prepared(name, tmp_path)
    files = datasets[name](tmp_path, **options)
    assert len(files) == count
    pair, sample = files.pairs[0], files.complete(0)
    assert (pair.frame1, pair.frame2) == (tmp_path / first, tmp_path / second)
    assert np.array_equal((255 * sample.frame1).round().permute(1, 2, 0).numpy(), read_image(tmp_path / first))
    assert np.array_equal((255 * sample.frame2).round().permute(1, 2, 0).numpy(), read_image(tmp_path / second))
    if truth is None:
        assert pair.truth is None and not sample.valid.any() and not sample.flow.any()
    else:
        same(sample.flow, sample.valid, content[truth], 1 / 64 if truth.endswith(".png") else 1e-5)
    assert (sample.backward is None) == (backward is None)
    if backward:
        known = np.nan_to_num(content[backward])
        assert np.allclose(sample.backward.permute(1, 2, 0).numpy(), known, atol=1e-5)


def test_every_reader_has_a_case():
    assert {case[0] for case in CASES} | {"tartanair", "viper"} == set(READERS)
    for name in READERS:
        assert len(tree(name)) >= 3, f"the docstring of {name} shows no folders"


@pytest.mark.parametrize("name", READERS)
def test_what_is_missing_is_named_in_one_line(name, tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FleetflowError) as caught:
            datasets[name](root)
        assert str(root) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) > 40


@pytest.mark.parametrize("name", [name for name in READERS if name != "folder"])
def test_a_missing_frame_is_named(name, tmp_path):
    prepared(name, tmp_path)
    files = datasets[name](tmp_path)
    lost = files.pairs[0].frame2
    lost.unlink()
    if name == "flyingthings3d":  # the scene goes on behind it, with every flow that 0006 and 0008 would need
        for path in ("frames_cleanpass/TRAIN/A/0000/left/0008.png",
                     "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0008_L.pfm"):  # fmt: skip
            make(name, tmp_path, path)
    sequences = ("hd1k", "viper", "kubric")  # there the clip ends earlier
    with pytest.raises(FleetflowError, match="holds no" if name in sequences else lost.name):
        datasets[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_files_that_do_not_belong_there(name, tmp_path):
    """Hidden ones, as other systems and killed runs leave them, are not seen; other names are no traceback."""
    prepared(name, tmp_path)
    count = len(datasets[name](tmp_path))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        for hidden in (f"._{path.name}", f".part-0123456789ab{path.suffix}"):
            path.with_name(hidden).write_bytes(b"x")
    assert len(datasets[name](tmp_path)) == count
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]:
        for other in (f"copy_of_{path.name}", f"{path.stem}_copy{path.suffix}", f"{path.stem}x{path.suffix}"):
            path.with_name(other).write_bytes(b"x")
    try:
        assert len(datasets[name](tmp_path)) >= count  # where any name is a pair, a copy of all its files is one
    except FleetflowError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name, option", [("sintel", "split"), ("spring", "side"), ("kubric", "direction")])
def test_unknown_options_say_what_is_known(name, option, tmp_path):
    with pytest.raises(FleetflowError, match=f'no {option} is called "tset"'):
        datasets[name](tmp_path, **{option: "tset"})


def test_masks(tmp_path):
    content = prepared("sintel", tmp_path / "s")
    masks = datasets["sintel"](tmp_path / "s").masks(0)
    assert np.array_equal(masks["occluded"], content["training/occlusions/alley_1/frame_0001.png"])
    assert np.array_equal(masks["invalid"], content["training/invalid/alley_1/frame_0001.png"])
    assert datasets["sintel"](tmp_path / "s", split="test", render="clean").masks(0) == {}

    content = prepared("kitti2015", tmp_path / "k")
    noc = content["training/flow_noc/000000_10.png"].copy()
    noc[:6] = np.nan
    write_flow(tmp_path / "k" / "training/flow_noc/000000_10.png", noc)
    files = datasets["kitti2015"](tmp_path / "k")
    masks, known = files.masks(0), np.isfinite(content["training/flow_occ/000000_10.png"]).all(-1)
    assert np.array_equal(masks["noc"], np.isfinite(noc).all(-1))
    assert np.array_equal(masks["occluded"], known & ~masks["noc"]) and masks["occluded"].any()
    assert np.array_equal(masks["foreground"], content["training/obj_map/000000_10.png"])
    assert np.array_equal(files.complete(0).occluded.numpy(), masks["occluded"])

    for name, path in (
        ("flyingchairs2", "train/0000000-occ_01.png"),
        ("flyingthings3d_subset", "train/flow_occlusions/left/into_future/0000000.png"),
    ):
        content = prepared(name, tmp_path / name)
        (key, mask), *rest = datasets[name](tmp_path / name).masks(0).items()
        assert key == "occluded" and not rest and np.array_equal(mask, read_mask(tmp_path / name / path))


def test_things_at_the_ends_of_a_scene(tmp_path):
    """Frames 0006 to 0015, each with a flow both ways: nine pairs a direction, none out of the scene."""
    for number in range(6, 16):
        for path in ("frames_cleanpass/TRAIN/A/0000/left/{:04d}.png",
                     "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_{:04d}_L.pfm",
                     "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_{:04d}_L.pfm"):  # fmt: skip
            make("flyingthings3d", tmp_path, path.format(number))
    reader = datasets["flyingthings3d"]
    steps = {
        way: [tuple(int(path.stem) for path in pair[2:4]) for pair in reader(tmp_path, direction=way).pairs]
        for way in ("forward", "backward")
    }
    assert steps["forward"] == [(k, k + 1) for k in range(6, 15)]
    assert steps["backward"] == [(k + 1, k) for k in range(6, 15)]
    assert len(reader(tmp_path)) == 18
    sample = reader(tmp_path, direction="backward").complete(8)
    truth, valid = read_flow(tmp_path / "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0015_L.pfm")
    assert np.array_equal(sample.flow.permute(1, 2, 0).numpy(), truth) and not valid[4:6, 7:9].any()
    (tmp_path / "optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0009_L.pfm").unlink()
    with pytest.raises(FleetflowError, match="OpticalFlowIntoPast_0009_L.pfm"):
        reader(tmp_path)


def test_sintel_splits(tmp_path):
    """The whole training set by name: 1041 pairs; the two published validation sets have 225 and 133 of them."""
    frames = {"alley_1": 50, "alley_2": 50, "ambush_2": 21, "ambush_4": 33, "ambush_5": 50, "ambush_6": 20,
              "ambush_7": 50, "bamboo_1": 50, "bamboo_2": 50, "bandage_1": 50, "bandage_2": 50, "cave_2": 50,
              "cave_4": 50, "market_2": 50, "market_5": 50, "market_6": 40, "mountain_1": 50, "shaman_2": 50,
              "shaman_3": 50, "sleeping_1": 50, "sleeping_2": 50, "temple_2": 50, "temple_3": 50}  # fmt: skip
    for scene, count in frames.items():
        for folder, suffix, last in (("final", "png", count), ("flow", "flo", count - 1)):
            place = tmp_path / "training" / folder / scene
            place.mkdir(parents=True)
            for k in range(1, last + 1):
                (place / f"frame_{k:04d}.{suffix}").touch()
    names = {
        (split, way): [pair.name for pair in datasets["sintel"](tmp_path, split=split, validation=way).pairs]
        for split in ("all", "train", "val")
        for way in ("scenes", "pairs")
    }
    everything = names["all", "pairs"]
    assert len(everything) == 1041 and names["all", "scenes"] == everything
    places = [*range(199, 218), *range(340, 365), *range(536, 561), *range(659, 698), *range(967, 992)]
    assert names["val", "pairs"] == [everything[k] for k in places] and len(places) == 133
    assert len(names["val", "scenes"]) == 225
    assert {name.split("/")[0] for name in names["val", "scenes"]} == {
        "ambush_2", "ambush_6", "bamboo_2", "cave_4", "market_6", "temple_2"
    }  # fmt: skip
    for way in ("scenes", "pairs"):
        assert sorted(names["train", way] + names["val", way]) == everything


def test_chairs_splits(tmp_path):
    prepared("flyingchairs", tmp_path)
    for kind in ("img1.ppm", "img2.ppm", "flow.flo"):
        make("flyingchairs", tmp_path, f"data/00002_{kind}")
    reader = datasets["flyingchairs"]
    assert [pair.name for pair in reader(tmp_path).pairs] == ["00001"]
    assert [pair.name for pair in reader(tmp_path, split="val").pairs] == ["00002"]
    assert len(reader(tmp_path, split="all")) == 2
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n")
    with pytest.raises(FleetflowError, match="1 lines, none for pair 00002"):
        reader(tmp_path)


def test_spring_takes_the_upper_left_of_four_vectors(tmp_path):
    content = prepared("spring", tmp_path)
    truth = content["train/0001/flow_FW_left/flow_FW_left_0001.flo5"]
    sample = datasets["spring"](tmp_path).complete(0)
    same(sample.flow, sample.valid, truth[::2, ::2])
    assert truth.shape[0] == 2 * sample.flow.shape[1] and sample.backward.shape == sample.flow.shape
    assert len(datasets["spring"](tmp_path, direction="both")) == 2
    backward = datasets["spring"](tmp_path, direction="backward").pairs[0]
    assert (backward.frame1.name, backward.frame2.name) == ("frame_left_0002.png", "frame_left_0001.png")


def test_tartanair_masks(tmp_path):
    content = prepared("tartanair", tmp_path)
    track = "abandonedfactory/Easy/P000/"
    flow, mask = (content[f"{track}flow/000000_000001_{kind}.npy"] for kind in ("flow", "mask"))
    files = datasets["tartanair"](tmp_path)
    sample = files.complete(0)
    same(sample.flow, sample.valid, np.where((mask == 100)[..., None], np.nan, flow))
    assert np.array_equal(sample.occluded.numpy(), mask > 0)
    assert len(datasets["tartanair"](tmp_path, difficulty="Easy")) == 1
    (tmp_path / "abandonedfactory").rename(tmp_path / "archive")
    (tmp_path / "above").mkdir()
    (tmp_path / "archive").rename(tmp_path / "above" / "abandonedfactory")
    assert len(datasets["tartanair"](tmp_path)) == 1, "a folder more above"


def test_viper_unknown_vectors(tmp_path):
    content = prepared("viper", tmp_path)
    flow = content["train/flow/001/001_00001.npz"]
    flow[np.abs(flow).max(-1) > 512] = np.nan
    sample = datasets["viper"](tmp_path)[0]
    same(sample.flow, sample.valid, flow)
    assert not sample.valid[0, 0] and not sample.valid[4, 7]


def test_files(tmp_path):
    prepared("flyingthings3d_subset", tmp_path)
    files = datasets["flyingthings3d_subset"](tmp_path)
    first, second = (pair.name for pair in files.pairs)
    assert [pair.name for pair in files.without([first]).pairs] == [second]
    assert len(files.without([f"flyingthings3d_subset/clean/{first}"])) == 1
    with pytest.raises(FleetflowError, match=f'did you mean "{first}"'):
        files.without([first[:-1]])
    assert files[0].backward is None and files[0].occluded is None, "read by `complete` only"
    write_flow(tmp_path / "train/flow/left/into_past/0000001.flo", np.zeros((HEIGHT, WIDTH - 1, 2)))
    with pytest.raises(FleetflowError, match="are of sizes"):
        files.complete(0)


def test_lists_of_a_folder(tmp_path):
    prepared("folder", tmp_path)
    assert [pair.name for pair in datasets["folder"](tmp_path).pairs] == ["00001_img1", "frame_1"]
    (tmp_path / "train.txt").write_text("a/00001_img1.ppm\n")
    with pytest.raises(FleetflowError, match="line 1 has 1 words"):
        datasets["folder"](tmp_path, split="train")
    (tmp_path / "train.txt").write_text("\na/00001_img1.ppm a/nothing.ppm\n")
    with pytest.raises(FleetflowError, match="line 2 names .*nothing.ppm"):
        datasets["folder"](tmp_path, split="train")


def pictures(root: Path, *names: str) -> None:
    for name in names:
        write_image(root / name, np.zeros((2, 2, 3), np.uint8))


def steps(root: Path) -> list[tuple[str, str]]:
    return [(pair.frame1.name, pair.frame2.name) for pair in datasets["folder"](root).pairs]


def test_sequences_of_a_folder(tmp_path):
    """A pair differs in its last number alone, by one: never from one KITTI scene to the next, nor over a gap."""
    pictures(tmp_path / "kitti", *(f"00000{scene}_{k}.png" for scene in range(3) for k in (10, 11)), "000003_10.png")
    assert steps(tmp_path / "kitti") == [(f"00000{scene}_10.png", f"00000{scene}_11.png") for scene in range(3)]
    pictures(tmp_path / "gap", *(f"frame{k}.png" for k in (8, 9, 10, 12, 13, 15)))
    assert steps(tmp_path / "gap") == [(f"frame{k}.png", f"frame{k + 1}.png") for k in (8, 9, 12)]
    pictures(tmp_path / "two", *(f"{k}_{side}.png" for k in (1, 2, 3) for side in ("left", "right")))
    assert steps(tmp_path / "two") == [
        (f"{k}_{side}.png", f"{k + 1}_{side}.png") for side in ("left", "right") for k in (1, 2)
    ]
    pictures(tmp_path / "named", "before.png", "later.png")
    assert steps(tmp_path / "named") == [("before.png", "later.png")]
    pictures(tmp_path / "firsts", "000000_10.png", "000001_10.png")
    with pytest.raises(FleetflowError, match="holds no pairs"):
        steps(tmp_path / "firsts")


def test_a_missing_second_picture_is_named(tmp_path):
    pictures(tmp_path, "a_img1.PNG", "a_img2.PNG", "b_img1.png", "b_img2.jpg")
    assert steps(tmp_path) == [("a_img1.PNG", "a_img2.PNG"), ("b_img1.png", "b_img2.jpg")]
    (tmp_path / "a_img2.PNG").unlink()
    with pytest.raises(FleetflowError, match="a_img2.PNG does not exist, which follows a_img1.PNG") as caught:
        steps(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_list_names_what_lies_below_its_root(tmp_path):
    """What it names may be linked there; a pair is called by its place below the root."""
    root = tmp_path / "root"
    pictures(root, "a/1.png", "a/2.png")
    pictures(tmp_path, "elsewhere/1.png", "root of another/1.png")
    (root / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "train.txt").write_text(f"{root / 'a/1.png'} a/../a/2.png\nlink.png a/2.png\n")
    (tmp_path / "other name").symlink_to(root)
    for known in (root, tmp_path / "other name"):
        assert [pair.name for pair in datasets["folder"](known, split="train").pairs] == ["a/1.png", "link.png"]
    for outside in ("../elsewhere/1.png", "a/../../elsewhere/1.png", f"'{tmp_path / 'root of another/1.png'}'"):
        for line in (f"{outside} a/2.png", f"a/1.png {outside}"):
            (root / "train.txt").write_text(line)
            with pytest.raises(FleetflowError, match="line 1 names .*, which is not below .*root; move or link it"):
                datasets["folder"](root, split="train")


@pytest.mark.parametrize(
    "line",
    [
        "one\\1.png it's.png",
        "  one\\1.png \tit's.png",
        '"a b/1.png" "a b/2.png"',
        "'a b/1.png' it\\'s.png",
        "'a b/1.png'\t\"it's.png\" 'the flow.flo'",
        "a b/1.png\ta b/2.png",
        "a b/1.png\ta b/2.png\tthe flow.flo",
    ],
)
def test_names_with_blanks_in_a_list(line, tmp_path):
    pictures(tmp_path, "one\\1.png", "it's.png", "a b/1.png", "a b/2.png")
    write_flow(tmp_path / "the flow.flo", np.zeros((2, 2, 2)))
    (tmp_path / "train.txt").write_text(f"\n{line}\n \n")
    (pair,) = datasets["folder"](tmp_path, split="train").pairs
    assert pair.frame1 in (tmp_path / "one\\1.png", tmp_path / "a b/1.png")
    assert pair.frame2 in (tmp_path / "it's.png", tmp_path / "a b/2.png")
    assert (pair.truth is not None) == ("flow" in line) and (pair.truth is None or pair.truth()[1].all())
    (tmp_path / "train.txt").write_text(line.replace("1.png", "lost.png"))
    with pytest.raises(FleetflowError, match="line 1 names .*(one.|a b/)lost.png, which does not exist"):
        datasets["folder"](tmp_path, split="train")


@pytest.mark.parametrize(
    "low, high", [("NaN", "1"), ("-Infinity", "1"), ("1", "-1"), ('"a"', "1"), ("null", "1"), ("[]", "1")]
)
def test_ranges_of_kubric_that_are_none(low, high, tmp_path):
    prepared("kubric", tmp_path)
    for text in (
        f'{{"forward_flow": {{"min": {low}, "max": {high}}}}}',
        '{"forward_flow": 5}',
        "[]",
        "\udcff{",
        "[" * 9999,
    ):
        (tmp_path / "0" / "data_ranges.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(FleetflowError, match="data_ranges.json") as caught:
            datasets["kubric"](tmp_path)[0]
        assert "\n" not in str(caught.value)


def test_lists_that_are_no_text(tmp_path):
    prepared("folder", tmp_path / "f")
    (tmp_path / "f" / "train.txt").write_bytes(b"a/00001_img1.ppm \xff\xfe\n")
    with pytest.raises(FleetflowError, match="train.txt cannot be read as a list of pairs in UTF-8"):
        datasets["folder"](tmp_path / "f", split="train")
    (tmp_path / "f" / "train.txt").write_bytes(b"\xef\xbb\xbfa/00001_img1.ppm a/00001_img2.ppm\r\n")
    assert len(datasets["folder"](tmp_path / "f", split="train")) == 1, "as an editor of Windows writes it"
    prepared("flyingchairs", tmp_path / "c")
    (tmp_path / "c" / "FlyingChairs_train_val.txt").write_bytes(b"1\n\xff\n")
    with pytest.raises(FleetflowError, match="cannot be read as the published split"):
        datasets["flyingchairs"](tmp_path / "c")


def header_of(shape: tuple[int, ...], dtype: str, content: bytes) -> bytes:
    """A .npy stream that claims a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize("name", ["viper", "tartanair", "pairs"])
def test_small_files_that_claim_gigabytes(name, tmp_path):
    """A few hundred bytes that say they are an array of 2 GiB, packed and not, in what only one reader reads."""
    prepared(name, tmp_path)
    if name == "pairs":
        for path in (tmp_path).rglob("flow.png"):
            path.unlink()
    path = {
        "viper": "train/flow/001/001_00001.npz", "pairs": "SET/NAME/flow.npz",
        "tartanair": "abandonedfactory/Easy/P000/flow/000000_000001_mask.npy",
    }[name]  # fmt: skip
    claims = header_of((2**14, 2**14), "<f8", b"0" * 100)
    if name == "tartanair":
        (tmp_path / path).write_bytes(claims)
    else:
        members = {"viper": ("u", "v"), "pairs": ("flow", "valid")}[name]
        with zipfile.ZipFile(tmp_path / path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.writestr(f"{member}.npy", claims)
    tracemalloc.start()
    try:
        with pytest.raises(FleetflowError, match="claims 16384x16384 pixels but is too short"):
            datasets[name](tmp_path)[0]
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_arrays_of_other_shapes_and_kinds(tmp_path):
    prepared("viper", tmp_path / "v")
    truth = tmp_path / "v" / "train/flow/001/001_00001.npz"
    for arrays in (
        {"u": np.zeros((4, 4)), "v": np.zeros((4, 5))},
        {"u": np.zeros((4, 4))},
        {"u": np.array([{}]), "v": 1},
    ):
        np.savez(truth, **arrays)
        with pytest.raises(FleetflowError, match="001_00001.npz"):
            datasets["viper"](tmp_path / "v")[0]
    prepared("tartanair", tmp_path / "t")
    np.save(tmp_path / "t" / "abandonedfactory/Easy/P000/flow/000000_000001_mask.npy", np.zeros(7, np.uint8))
    with pytest.raises(FleetflowError, match=r"_mask.npy is \[7\], its flow"):
        datasets["tartanair"](tmp_path / "t")[0]
    prepared("pairs", tmp_path / "p")
    (tmp_path / "p/SET/NAME/flow.png").unlink(missing_ok=True)
    for arrays in (
        {"flow": np.zeros((12, 16, 2), np.float16), "valid": np.zeros(3, np.uint8)},
        {"flow": np.zeros((12, 16), np.float16), "valid": np.zeros(24, np.uint8)},
        {"flow": np.zeros((12, 16, 2), np.float16), "valid": np.zeros(200)},
    ):
        np.savez(tmp_path / "p/SET/NAME/flow.npz", **arrays)
        with pytest.raises(FleetflowError, match="expected flow .H, W, 2. and valid of H x W bits"):
            datasets["pairs"](tmp_path / "p")[0]


def test_kubric_stores_steps_down_before_steps_right(tmp_path):
    write_image(tmp_path / "0/rgba_00000.png", np.zeros((2, 2, 3), np.uint8))
    write_image(tmp_path / "0/rgba_00001.png", np.zeros((2, 2, 3), np.uint8))
    right = np.zeros((2, 2, 2), np.float32)
    right[..., 0] = 5
    deep_png(tmp_path / "0/forward_flow_00000.png", right)
    with pytest.raises(FleetflowError, match="data_ranges.json does not exist"):
        datasets["kubric"](tmp_path)[0]
    (tmp_path / "0/data_ranges.json").write_text('{"forward_flow": {"min": -20, "max": 20}}')
    assert torch.allclose(datasets["kubric"](tmp_path)[0].flow[:, 0, 0], torch.tensor([5.0, 0.0]), atol=1e-3)


def test_read_mask(tmp_path):
    values = np.arange(12).reshape(3, 4) % 3 == 0
    gray = Image.fromarray((255 * values).astype(np.uint8))
    deep = Image.fromarray((300 * values).astype(np.uint16))
    for number, picture in enumerate((gray, gray.convert("1"), gray.convert("RGBA"), gray.convert("LA"), deep)):
        picture.save(tmp_path / f"{number}.png")
        assert np.array_equal(read_mask(tmp_path / f"{number}.png"), values)


# ---- the index of folders ----


def test_index_of_folders_is_kept_and_follows_changes(tmp_path, monkeypatch):
    root, listed = tmp_path / "data", []
    (root / "many").mkdir(parents=True)
    for k in range(1000):
        (root / "many" / f"{k}.flo").touch()
    past = time.time() - 60
    for folder in (root, root / "many"):
        os.utime(folder, (past, past))
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(Path(folder).name) or listdir(folder))

    def look() -> int:
        listing = Listing(root)
        found = listing.find("many/*.flo")
        listing.files([], "", "") if not found else listing._keep()
        return len(found)

    assert look() == 1000 and listed == ["many"]
    assert look() == 1000 and listed == ["many"], "the second time from the index"
    (root / "many" / "new.flo").touch()
    assert look() == 1001 and listed == ["many"] * 2
    assert look() == 1001 and listed == ["many"] * 3, "changed a moment ago: not trusted yet"
    index = next((Path(os.environ["XDG_CACHE_HOME"]) / "fleetflow" / "listings").iterdir())
    damaged = (b"damaged", b"\xff", b"[" * 100_000, b'{"many": 5}', b'{"many": [1]}', b'{"many": [0, [1, 2]]}', b"[1]")
    for content in damaged:
        index.write_bytes(content)
        assert look() == 1001, content[:20]


@pytest.mark.parametrize("home", ["none", "a file", "missing", "not ours"])
def test_a_home_that_cannot_be_used_costs_time_only(home, tmp_path, monkeypatch):
    """The index is optional: without a home, in a home that is no folder, or that nobody may write to."""
    root = tmp_path / "data"
    for number in (10, 11):
        write_image(root / f"training/image_2/000000_{number}.png", np.zeros((4, 4, 3), np.uint8))
    write_flow(root / "training/flow_occ/000000_10.png", np.zeros((4, 4, 2)))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("fleetflow.data.listing.SMALL", 0)
    monkeypatch.setattr("fleetflow.data.listing.SETTLED", -1e18)
    (tmp_path / "file").write_text("")
    if home == "none":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # no entry in the list of users
        with pytest.raises(RuntimeError):
            Path.home()
    else:
        monkeypatch.setenv("HOME", {"a file": str(tmp_path / "file"), "missing": "/proc/no", "not ours": "/proc"}[home])
    assert len(datasets["kitti2015"](root)) == 1


def test_a_cache_folder_that_is_relative_is_not_used(tmp_path, monkeypatch):
    """So says the XDG base directory specification; the folder would be a new one in each place of work."""
    prepared("sintel", tmp_path / "sintel")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fleetflow.data.listing.SMALL", 0)
    monkeypatch.setattr("fleetflow.data.listing.SETTLED", -1e18)
    monkeypatch.chdir(tmp_path)
    datasets["sintel"](tmp_path / "sintel")
    assert not (tmp_path / "cache").exists() and list((tmp_path / "home").rglob("*.json"))


def test_relative_roots(tmp_path, monkeypatch):
    prepared("sintel", tmp_path / "sintel")
    for place, root in ((tmp_path, "sintel"), (tmp_path / "sintel", "."), (tmp_path / "sintel", "./training/..")):
        monkeypatch.chdir(place)
        assert datasets["sintel"](root)[0].valid.any()
    Path("training/final/alley_1/frame_0002.png").unlink()
    with pytest.raises(FleetflowError, match="lacks 1 files, the first training/final/alley_1/frame_0002.png;"):
        datasets["sintel"](".")


def test_a_small_set_leaves_no_index(tmp_path):
    prepared("sintel", tmp_path)
    datasets["sintel"](tmp_path)
    assert not any(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"))


# ---- loading ----


@pytest.mark.parametrize("workers", [0, 1])
def test_decoded(workers, tmp_path):
    prepared("folder", tmp_path)
    files = datasets["folder"](tmp_path)
    samples = list(decoded(files, workers=workers, order=[1, 0, 0]))
    assert len(samples) == 3 and torch.equal(samples[1].flow, files[0].flow) and samples[0].backward is None
    files.pairs[0] = files.pairs[0]._replace(frame2=tmp_path / "none.png")
    with pytest.raises(FleetflowError, match="none.png does not exist") as caught:
        list(decoded(files, workers=workers))
    assert "\n" not in str(caught.value)


def test_loading_speed(tmp_path):
    prepared("folder", tmp_path)
    read = partial(loading_speed, datasets["folder"](tmp_path), seconds=0.2)
    assert read(workers=0) > 0 and read(workers=1) > 0


def test_a_process_ends_with_its_workers(tmp_path):
    """An iterator that is still alive at the end of Python, as after an error, does not keep the process."""
    prepared("folder", tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from fleetflow.data.dataset import datasets; from fleetflow.data.loader import decoded\n"
        "samples = decoded(datasets['folder'](Path(sys.argv[1])), workers=1, order=[0] * 99); next(samples)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_real_pairs_as_a_folder(shared):
    """The tree of real pairs is readable without a list: the pairs, and the frames of sequences."""
    files = datasets["folder"](shared / "data")
    truths = [pair for pair in files.pairs if pair.truth]
    assert len(truths) == 30
    k = next(k for k, pair in enumerate(files.pairs) if "RubberWhale" in pair.name)
    sample = files[k]
    assert sample.valid.float().mean() == pytest.approx(0.984, abs=1e-3)
    assert sample.flow.square().sum(0).sqrt()[sample.valid].mean() == pytest.approx(1.256, abs=0.01)
    steps = [pair for pair in files.pairs if pair.group == "sequences" and "yosemite" in pair.name]
    assert len(steps) == 14 and steps[0].truth is None
    assert isinstance(files, Files)
