"""The Predictor as an object: it leaves the model alone, takes paths and lists, is copied, pickled, used in threads."""

import copy
import math
import multiprocessing
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import skip_without

import fleetflow
from fleetflow.inference import tiles
from fleetflow.inference.memory import Budget, in_words, parse_bytes
from fleetflow.inference.predictor import Predictor
from fleetflow.io.images import write_image
from fleetflow.io.video import VideoReader, VideoWriter
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import load, shipped
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction

ITERATIONS = {"raft_small": 2, "deq_flow_tiny": 2, "gma": 2}  # networks that refine, and are small enough here


def made(name, **options):
    torch.manual_seed(0)
    return Predictor(models[name](), device="cpu", precision="fp32", iterations=ITERATIONS.get(name), **options)


@pytest.fixture
def frames():
    base = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return base, np.roll(base, 2, 1)


@pytest.mark.parametrize("name", ["fastflownet", "raft_small", "deq_flow_tiny", "gma", "liteflownet2"])
def test_copies_of_a_used_predictor(name, frames):
    predictor = made(name)
    first = predictor(*frames)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        np.testing.assert_allclose(other(*frames), first, atol=1e-4)
        assert other.label() == predictor.label()


@pytest.fixture
def textured():
    """Frames with coarse and fine texture that moves by (5, 3) pixels; no network's multiple as size."""
    generator = np.random.default_rng(0)
    coarse = np.kron(generator.random((30, 40, 3)), np.ones((8, 8, 1)))
    base = (200 * coarse + 50 * generator.random(coarse.shape)).astype(np.uint8)
    return base[:135, :241], base[3:138, 5:246]


def with_threads(count, name, precision, frames):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return Predictor(name, device="cpu", precision=precision)(*frames)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped("fastflownet").parent.glob("*.safetensors")))
def test_the_number_of_threads_does_not_matter(name, textured):
    """In bfloat16 not at all: whatever depends on it, by a last bit only, comes out as up to 0.4 px."""
    one, three = (with_threads(count, name, "fp32", textured) for count in (1, 3))
    np.testing.assert_allclose(one, three, rtol=0, atol=0.005)
    skip_without(torch.bfloat16)
    half, other = (with_threads(count, name, "bf16", textured) for count in (1, 3))
    np.testing.assert_allclose(half, other, rtol=0, atol=1e-4)
    assert np.linalg.norm(one - half, axis=-1).mean() < 0.1, "and it is near float32"


@pytest.mark.parametrize("name", ["raft_small", "deq_flow_tiny", "fastflownet"])
def test_the_first_calls_of_four_threads(name, frames):
    predictor, gate, found = made(name), threading.Barrier(4), []

    def work():
        gate.wait()
        found.append(predictor(*frames))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for flow in (*found, predictor(*frames)):
        np.testing.assert_allclose(flow, found[0], atol=1e-4)


def test_a_used_predictor_in_a_spawned_worker(frames):
    predictor = made("raft_small")
    first = predictor(*frames)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.starmap(predictor, [frames])
    np.testing.assert_allclose(found, first, atol=1e-3)


@pytest.mark.parametrize("name", ["fastflownet", "deq_flow_tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_callers_model_stays_as_it_is(name, precision, frames):
    if precision == "bf16":
        skip_without(torch.bfloat16)
    torch.manual_seed(0)
    model = models[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [(key, type(part)) for key, part in model.named_modules()]
    predictor = Predictor(model, device="cpu", precision=precision)
    flow = predictor(*frames)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert [(key, type(part)) for key, part in model.named_modules()] == kinds
    after = model.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(predictor(*frames), flow)


class Means(FlowModel):
    """u, v: the means of both frames, so that every pair is told apart; counts its batches."""

    stride, fit = 1, "pad"

    def __init__(self):
        super().__init__()
        self.batches = []

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        self.batches.append(len(frame1))
        means = torch.stack((frame1.mean((1, 2, 3)), frame2.mean((1, 2, 3))), 1)
        return Prediction(100 * means[:, :, None, None].expand(-1, -1, *frame1.shape[2:]))


def test_paths_and_lists_of_pairs(tmp_path):
    predictor = Predictor(Means(), device="cpu")
    sizes = [(20, 30), (20, 30), (20, 30), (8, 9), (20, 30)]
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 50 * (k + 1), (*size, 3), dtype=np.uint8) for k, size in enumerate(sizes)]
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path, image in zip(paths, images):
        write_image(path, image)
    singles = [predictor(image, image) for image in images]
    for pairs in (list(zip(images, images)), list(zip(paths, map(str, paths))), zip(paths, images)):
        predictor.model.batches.clear()
        flows = predictor(pairs)
        assert all(np.allclose(flow, single, atol=1e-5) for flow, single in zip(flows, singles, strict=True))
        assert predictor.model.batches == [3, 1, 1]
    assert predictor([]) == []
    means = [100 * image.mean() / 255 for image in images[1:3]]
    np.testing.assert_allclose(predictor(str(paths[1]), paths[2])[0, 0], means, atol=1e-4)
    for wrong, words in (
        (images[0], "one picture"),
        (paths[0], "one picture"),
        ([images[0][0]], "entry 0 of the list"),
    ):
        with pytest.raises(FleetflowError, match=words):
            predictor(wrong)
    with pytest.raises(FleetflowError, match="0.png and .*3.png are 20x30 and 8x9"):
        predictor(paths[0], paths[3])
    with pytest.raises(FleetflowError, match="does not exist"):
        predictor(tmp_path / "none.png", paths[0])


def test_a_batch_is_what_single_pairs_are(frames):
    predictor = made("fastflownet")
    pairs = [frames, frames[::-1], frames]
    for flow, pair in zip(predictor(pairs), pairs, strict=True):
        np.testing.assert_allclose(flow, predictor(*pair), atol=1e-4)


def test_arrays_that_must_not_be_written(frames):
    predictor = Predictor(Means(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for change in (lambda a: a[::-1], lambda a: a[..., ::-1], lambda a: a.copy(order="F")):
            images = [change(image) for image in frames]
            for image in images:
                image.flags.writeable = False
            before = [image.copy() for image in images]
            assert predictor(*images).shape == (64, 96, 2)
            assert all((image == copy).all() for image, copy in zip(images, before))


def test_a_network_by_its_name(frames):
    flow = Predictor("fastflownet", device="cpu")(*frames)
    np.testing.assert_array_equal(flow, Predictor(load("fastflownet"), device="cpu")(*frames))
    with pytest.raises(FleetflowError, match="did you mean"):
        Predictor("fastflownett")


def test_another_size_for_the_network(pair):
    """The flow is that of the frames as they are; a network that sees them at their own size is the same."""
    predictor = fleetflow.Predictor("fastflownet", device="cpu", precision="fp32")
    flow = predictor(*pair)
    same = fleetflow.Predictor("fastflownet", device="cpu", precision="fp32", size=pair[0].shape[:2])
    np.testing.assert_array_equal(same(*pair), flow)
    other = fleetflow.Predictor("fastflownet", device="cpu", precision="fp32", size=(80, 112))
    assert other(*pair).shape == flow.shape and np.abs(other(*pair) - (2, 0)).mean() < 0.5
    assert other.label()["size"] == "80x112" and "size" not in predictor.label()
    for wrong in ((0, 5), (5,)):
        with pytest.raises(FleetflowError, match="size is"):
            fleetflow.Predictor("fastflownet", device="cpu", size=wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "image1 is None; expected uint8"),
        ([[1, 2], [3]], "image1 is a list .*; expected uint8"),
        (np.zeros((0, 8, 3), np.uint8), r"image1 is uint8 \[0, 8, 3\]; expected uint8"),
        (torch.zeros(8, 8, 3, requires_grad=True), "image1 is a Tensor .*requires grad.*; expected uint8"),
    ],
    ids=("none", "ragged", "empty", "grad"),
)
def test_what_is_no_picture_is_one_line(wrong, words, frames):
    predictor = made("fastflownet")
    for call in (lambda: predictor(wrong, frames[0]), lambda: predictor([(wrong, frames[0])])):
        with pytest.raises(FleetflowError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(FleetflowError, match="expected"):
        fleetflow.Stream(predictor)(wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 64}, "size is 64; expected height and width"),
        ({"size": (64.5, 64)}, "size is .*; expected height and width"),
        ({"memory": 10}, "a memory of 10B is too small"),
        ({"memory": "4G"}, "memory is '4G'; expected a number of bytes"),
        ({"memory": 0}, "memory is 0; expected a number of bytes"),
        ({"memory": math.inf}, "memory is inf; expected a number of bytes"),
        ({"device": None}, 'device "None" cannot be used'),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_one_line(options, words):
    with pytest.raises(FleetflowError, match=words):
        Predictor(**{"model": models["fastflownet"](), "device": "cpu", **options})


def test_calls_without_pictures_are_one_line():
    predictor = made("raft_small")
    for call, words in (
        (lambda: predictor(None), "expected two pictures, or a list of pairs"),
        (lambda: predictor([5]), "entry 0 of the list is no pair"),
        (lambda: Predictor(None), "model is a NoneType; expected a network"),
        (
            lambda: Predictor(models["raft_small"](), device="cpu", iterations=1.5),
            "iterations is 1.5; it must be a whole",
        ),
        (lambda: predictor.model(None, None), "frame1 is a NoneType; expected a tensor"),
    ):
        with pytest.raises(FleetflowError, match=words):
            call()
    assert Predictor(models["raft_small"](), device=torch.device("cpu")).device.type == "cpu"
    assert Predictor(models["fastflownet"](), device="cpu", memory=4e9).device.type == "cpu"


def test_a_compiled_network_is_one(frames):
    """And its compiler sees the whole of it at once: packed convolutions would break its graph."""

    def look(module, _):
        graphs.append(module)
        return module.forward

    network, graphs = models["fastflownet"]().eval(), []
    flow = Predictor(torch.compile(network, backend=look), device="cpu", precision="fp32")(frames[0], frames[1])
    assert len(graphs) == 1
    np.testing.assert_allclose(
        flow, Predictor(network, device="cpu", precision="fp32")(frames[0], frames[1]), atol=1e-4
    )


def test_tiles_cover_the_frame_and_agree_with_it():
    generator = np.random.default_rng(0)
    base = np.kron(generator.integers(0, 256, (50, 74, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frames = base[4:388, 4:580], base[2:386, 1:577]
    predictor = fleetflow.Predictor("fastflownet", device="cpu", precision="fp32")
    whole = predictor(*frames)
    calls = []

    def run(*parts):
        calls.append(parts[0].shape[2:])
        with torch.inference_mode():
            return predictor.model(*parts)

    tensors = [predictor.frame(image) for image in frames]
    found = tiles.tiled(run, *tensors, 400 * 400).flow[0].permute(1, 2, 0).numpy()
    assert len(calls) == 2 and all(height * width <= 400 * 400 for height, width in calls)
    difference = np.linalg.norm(found - whole, axis=2)
    assert difference.mean() < 0.05 and np.percentile(difference, 95) < 0.15, difference.mean()


@pytest.mark.parametrize("height, width, pixels", [(720, 1280, 200_000), (100, 5000, 70_000), (300, 300, 80_000)])
def test_tiles_of_every_shape(height, width, pixels):
    side = tiles.tile_size(height, width, pixels)
    assert side[0] * side[1] <= pixels
    frame = torch.rand(1, 3, height, width)
    found = tiles.tiled(lambda one, _: Prediction(one[:, :2]), frame, frame, pixels)
    torch.testing.assert_close(found.flow, frame[:, :2])


def test_a_memory_that_is_too_small_says_what_is_needed():
    with pytest.raises(FleetflowError, match=r"a memory of 100M is too small .* need [\d.]+[MG]"):
        fleetflow.Predictor("fastflownet", device="cpu", memory=100 << 20)(*np.zeros((2, 300, 300, 3), np.uint8))
    budget = Budget(memory=2**30, free=2**29, per_pixel=400)
    assert budget.pixels(10_000_000, 65536) < budget.pixels(1_000_000, 65536)
    assert [parse_bytes(text) for text in ("4G", "1.5GB", "300m", "2GiB", "7")] == [
        2**32, 3 * 2**29, 300 * 2**20, 2**31, 7,
    ]  # fmt: skip
    for text in ("", "G", "-1G", "nan", "4X"):
        with pytest.raises(FleetflowError, match="expected a size such as 4G"):
            parse_bytes(text)
    assert in_words(300 * 2**20) == "300M" and in_words(3.21 * 2**30) == "3.3G"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: no memory")])
def test_out_of_memory_says_what_would_fit(error, frames):
    predictor = fleetflow.Predictor("fastflownet", device="cpu")

    def run(*_):
        raise error

    predictor._run = run
    with pytest.raises(FleetflowError, match=r"out of memory at 64x96 with FastFlowNet.*--memory .*--size 64 64 fits"):
        predictor(*frames)
    predictor._run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predictor(*frames)


def test_arguments_of_a_wrong_type_are_one_line(frames, tmp_path, monkeypatch):
    """Whatever has another type than the signature says is refused where it is given, and by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    predictor, flow, header = made("raft_small"), np.zeros((64, 96, 2), np.float32), {"network": "n", "license": "l"}
    score, motion = fleetflow.motion.score, fleetflow.motion
    with VideoWriter("clip.mp4", 5) as writer:
        writer.write(frames[0])
    calls = {
        "fps": lambda wrong: score([*frames], predictor, fps=wrong),
        "network": lambda wrong: score([*frames], wrong),
        "previous": lambda wrong: predictor.predict(*frames, previous=wrong),
        "precision": lambda wrong: Predictor("fastflownet", precision=wrong),
        "budget_ms": lambda wrong: fleetflow.Stream(predictor, budget_ms=wrong),
        "dropped": lambda wrong: fleetflow.Stream(predictor)(frames[0], dropped=wrong),
        "frames": lambda wrong: fleetflow.read_video("clip.mp4", frames=wrong),
        "every": lambda wrong: fleetflow.read_video("clip.mp4", every=wrong),
        "start": lambda wrong: VideoReader("clip.mp4", start=wrong),
        "stop": lambda wrong: VideoReader("clip.mp4", stop=wrong),
        "the name": lambda wrong: fleetflow.load(wrong),
        "model": lambda wrong: fleetflow.save(wrong, "w.safetensors", header),
        "header": lambda wrong: fleetflow.save(predictor.model, "w.safetensors", wrong),
        "dtype": lambda wrong: fleetflow.save(predictor.model, "w.safetensors", header, wrong),
        "scale": lambda wrong: fleetflow.flow_to_color(flow, wrong),
        "flow": lambda wrong: fleetflow.show(wrong, *frames),
        "occlusion": lambda wrong: fleetflow.show(flow, *frames, occlusion=wrong),
        "size": lambda wrong: motion.resize(flow, wrong),
        "top": lambda wrong: motion.crop(flow, wrong, 0, (8, 8)),
        "the flow": lambda wrong: motion.fit_similarity(wrong),
        "state": lambda wrong: motion.is_cut(frames[0], wrong),
        "network ": lambda wrong: motion.track([*frames], np.zeros((1, 2)), wrong),
        "gaps": lambda wrong: motion.track([*frames], np.zeros((1, 2)), predictor, gaps=wrong),
        "the grid": lambda wrong: motion.grid((8, 8), wrong),
        "time": lambda wrong: VideoWriter("new.mp4", 5).write(frames[0], wrong),
        "time_base": lambda wrong: VideoWriter("new.mp4", 5, time_base=wrong),
        "background": lambda wrong: fleetflow.flow_to_color(flow, background=wrong),
    }
    for name, call in calls.items():
        for wrong in (object(), np.zeros(3), torch.zeros(3)):
            with pytest.raises(FleetflowError, match=f"(^|and ){name.strip()} ") as caught:
                call(wrong)
            assert "\n" not in str(caught.value), name
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert fleetflow.flow_to_color(flow, torch.tensor(2.0)).shape == (64, 96, 3), "a number in a tensor is one"
    assert motion.crop(flow, torch.tensor(3), np.int64(0), (8, 8))[0].shape == (8, 8, 2)
    with pytest.raises(FleetflowError, match="source is a object; expected frames"):
        next(fleetflow.Stream(predictor).follow(object()))
    with pytest.raises(FleetflowError, match="the name is a RAFT"):
        fleetflow.load(predictor.model)
    with pytest.raises(FleetflowError, match="names no file"):
        fleetflow.save(predictor.model, "", header)
    fleetflow.save(predictor.model, "~/own.safetensors", header)
    assert (tmp_path / "home" / "own.safetensors").is_file()
