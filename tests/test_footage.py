"""The generated data set `footage`: the same on every run, true, and as its classes say."""

import numpy as np
import pytest
import torch

from fleetflow.data.dataset import open_files
from fleetflow.data.datasets.footage import CLASSES, PAIRS, SIZES, _surfaces, footage, shoot
from fleetflow.data.generate.held_out import use_of
from fleetflow.evaluation.evaluate import evaluate, measure
from fleetflow.evaluation.tables import rows_of_clips
from fleetflow.evaluation.warm_start import Warm
from fleetflow.inference.predictor import Predictor
from fleetflow.io.images import write_image
from fleetflow.models.weights import load
from fleetflow.ops.warp import warp
from fleetflow.types import FleetflowError

SMALL = "96x160"


def test_all_classes_have_fifty_pairs_in_clips_and_none_is_rendered_before_it_is_asked_for():
    files = footage()
    groups = [pair.group for pair in files.pairs]
    assert list(dict.fromkeys(groups)) == list(CLASSES) and len(CLASSES) == 10
    assert all(groups.count(name) == PAIRS >= 50 for name in CLASSES)
    assert len({(pair.group, pair.name) for pair in files.pairs}) == len(files)
    assert "procedural" in files.about and files.without(["moving/00/1"]).about == files.about
    followed = sum(old.frame2 == new.frame1 for old, new in zip(files.pairs, files.pairs[1:]))
    assert followed == 8 * PAIRS * 3 // 4 + 2 * PAIRS // 2


@pytest.mark.parametrize("name", CLASSES)
def test_clips_are_the_same_on_every_run_true_and_follow_each_other(name):
    step = CLASSES[name].pairs
    files = footage(split="test", classes=name, limit=step, size=SMALL)
    samples = [files.complete(k) for k in range(step)]
    shoot.cache_clear()
    again = footage(split="test", classes=name, limit=step, size=SMALL)[1]
    assert all(torch.equal(a, b) for a, b in zip(again[:4], samples[1][:4]))
    for old, new in zip(samples, samples[1:]):
        assert torch.equal(old.frame2, new.frame1)
    for sample in samples:
        assert sample.frame1.shape == (3, 96, 160) and sample.flow.isfinite().all()
        seen = sample.valid & ~sample.occluded
        loop = (sample.flow + warp(sample.backward[None], sample.flow[None])[0]).norm(dim=0)
        assert loop[seen].median() < 0.02 and (loop[seen] < 0.5).float().mean() > 0.9
    other = footage(split="validation", classes=name, limit=1, size=SMALL)[0]
    assert not torch.equal(other.frame1, samples[0].frame1)


def test_classes_move_as_they_say():
    def lengths(name):
        files = footage(classes=name, limit=12, size=SMALL)
        return torch.stack([files[k].flow.norm(dim=0) for k in range(0, 12, CLASSES[name].pairs)])

    assert lengths("still").max() == 0
    moving = lengths("moving")
    assert (moving == 0).float().mean() > 0.5 and moving.max() > 1
    assert (lengths("ground") < 0.1).float().mean() > 0.5
    assert lengths("pan").median() > 2 and lengths("drive").max() > 5
    assert 0.3 < lengths("shake").median() < 12
    front = lengths("front")
    assert (front < 3).float().mean() > 0.1 and front.max() > 10


def test_frames_differ_though_nothing_moves():
    """What the camera and the codec do differs from frame to frame."""
    sample = footage(classes="still", limit=1, size=SMALL)[0]
    assert 0.001 < (sample.frame1 - sample.frame2).abs().mean() < 0.3


def test_sizes_are_those_of_videos():
    assert all(288 <= height <= 448 and 512 <= width <= 768 and height % 2 == width % 2 == 0 for height, width in SIZES)
    assert footage(classes="ground", limit=1)[0].frame1.shape[1:] in SIZES


def test_wrong_options_are_one_line():
    for options, words in (
        ({"split": "train"}, "split"),
        ({"classes": "grund"}, 'did you mean "ground"'),
        ({"limit": "0"}, "limit is 0"),
        ({"size": "96"}, "width of size"),
    ):
        with pytest.raises(FleetflowError, match=words):
            footage(**options)
    with pytest.raises(FleetflowError, match="give --root DIR"):
        open_files("sintel", None)


def test_validation_and_test_use_other_photographs_and_training_none_of_them(tmp_path):
    names = {
        use: next(f"{k}.jpg" for k in range(999) if use_of(f"{k}.jpg") == use)
        for use in ("train", "validation", "test")
    }
    for use, color in (("train", 0), ("validation", 1), ("test", 2)):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[..., color] = 250
        write_image(tmp_path / names[use], picture)
    for split, color in (("validation", 1), ("test", 2)):
        textures = _surfaces(tmp_path, split)
        assert textures.count == 1 and textures.table[0, :3].float().argmax() == color
    assert "photographs" in footage(tmp_path).about
    with pytest.raises(FleetflowError, match="is no folder"):
        footage(tmp_path / "none")


def test_evaluation_by_class(capsys):
    """No motion at all is right where nothing moves: no false motion there, and an error that does not flicker."""
    files = footage(classes="still+pan", limit=4, size=SMALL)
    nothing = lambda image1, image2: np.zeros((*image1.shape[:2], 2), np.float32)  # noqa: E731
    result = measure(nothing, files, model="nothing", dataset="footage")
    rows = {row[0]: row[1:] for row in rows_of_clips(result)}
    assert rows["still"][:4] == ["0.00"] * 4 and rows["still"][-1] == "0.00"
    assert rows["pan"][0] == "-" and float(rows["pan"][5]) > 1
    assert "edition" in result.protocol["pairs"]
    assert evaluate(nothing, files)["still"]["epe"] == 0


def test_a_network_may_start_where_it_ended_on_the_pair_before():
    files = footage(classes="moving", limit=2, size=SMALL)
    predictor = Predictor(load("raft_small"), iterations=2)
    warm = measure(Warm(predictor, files.pairs), files, model="raft_small", dataset="footage")
    cold = measure(predictor, files, model="raft_small", dataset="footage")
    assert warm.pairs[0].errors == cold.pairs[0].errors and warm.pairs[1].errors != cold.pairs[1].errors
