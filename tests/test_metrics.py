"""Every metric against numbers worked out by hand, at its edges, and KITTI's formulas against known results."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.evaluation.metrics import (
    Mean,
    angular_error,
    ause,
    boundaries,
    boundary_distance,
    boundary_rule,
    end_point_error,
    error_histogram,
    flicker,
    judge,
    motion_edges,
    pair_errors,
    pixel_sums,
    pool,
    quantile,
    sparsification,
    speed_profile,
    still_histogram,
    wauc_score,
)
from fleetflow.io.flow import read_flow
from fleetflow.types import FleetflowError, Sample


def sample_of(flow: torch.Tensor, valid: torch.Tensor | None = None, occluded: torch.Tensor | None = None) -> Sample:
    frame = torch.zeros(3, *flow.shape[1:])
    return Sample(frame, frame, flow, torch.ones(flow.shape[1:], dtype=torch.bool) if valid is None else valid,
                  occluded=occluded)  # fmt: skip


def row(*u: float) -> torch.Tensor:
    """A flow [2, 1, n] to the right."""
    return torch.stack((torch.tensor([u]), torch.zeros(1, len(u))))


def test_sums_by_hand():
    truth = row(0, 10, 100, 50, 7)
    found = truth + torch.tensor([[2.0, 4.0, 4.0, 0.0, 99.0]])[None] * torch.tensor([0.0, 1.0])[:, None, None]
    valid = torch.tensor([[True, True, True, True, False]])
    occluded = torch.tensor([[False, True, True, False, True]])
    foreground = torch.tensor([[False, True, False, False, True]])
    sums = pixel_sums(found, sample_of(truth, valid, occluded), foreground=foreground)
    assert sums["epe"] == (10, 4)
    assert {name: sums[name].value for name in ("out1", "out3", "out5")} == {"out1": 75, "out3": 50, "out5": 0}
    assert sums["fl"].value == 25 and sums["fl_fg"] == (100, 1) and sums["fl_bg"] == (0, 3)
    assert sums["epe_visible"] == (2, 2) and sums["epe_occluded"] == (8, 2)
    assert sums["fl_visible"].value == 0 and sums["out3_visible"].value == 0
    assert (sums["s0-10"], sums["s10-40"], sums["s40+"]) == ((2, 1), (4, 1), (4, 2)), "lower bounds belong to the band"
    assert sums["not_finite"].value == 0
    whole = pool([sums, sums, {"other": Mean(1.0, 1)}])
    assert whole["epe"] == (20, 8) and whole["epe"].value == 2.5 and whole["other"].count == 1


def test_pooled_and_per_image_differ():
    """Two pairs of different numbers of known pixels: 1 pixel with 4 px, 3 pixels with 0 px."""
    one = pixel_sums(row(4, 0, 0, 0), sample_of(row(0, 0, 0, 0), torch.tensor([[True, False, False, False]])))
    two = pixel_sums(row(0, 0, 0, 0), sample_of(row(0, 0, 0, 0), torch.tensor([[False, True, True, True]])))
    assert (one["epe"].value + two["epe"].value) / 2 == 2 and pool([one, two])["epe"].value == 1


def test_no_known_pixel():
    truth, unknown = row(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    sums = pixel_sums(truth, sample_of(truth, unknown))
    assert sums["epe"] == (0, 0) and math.isnan(sums["epe"].value)
    assert pool([sums, {"epe": Mean(3.0, 1)}])["epe"].value == 3, "such a pair adds nothing"
    with pytest.raises(FleetflowError, match="no known pixel"):
        pair_errors(truth, sample_of(truth, unknown))
    with pytest.raises(FleetflowError, match="at least one"):
        sparsification(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_an_error(wrong):
    truth = row(1, 2, 3, 4)
    found = row(1, wrong, 3, 4)
    sums = pixel_sums(found, sample_of(truth))
    assert sums["not_finite"].value == 25 and sums["epe"].value == math.inf
    assert all(sums[name].value == 25 for name in ("out1", "out3", "out5", "fl"))
    assert sums["angle"].value == 45 and sums["wauc"].value == pytest.approx(75)
    numbers = pair_errors(found, sample_of(truth))
    assert numbers["epe"] == math.inf and numbers["out5"] == numbers["fl"] == 25
    histogram = error_histogram(end_point_error(found, truth))
    assert histogram[-1] == 1 and quantile(histogram, 1.0) == math.inf and quantile(histogram, 0.75) == 0


def test_the_nearest_of_several_true_vectors():
    """The formulas of Spring's server: nearest vector, Fl by the longest, bands by the mean length, all four known."""
    generator = np.random.default_rng(0)
    gt = generator.normal(0, 30, (500, 2, 4)) * generator.random((500, 1, 1)) + generator.normal(0, 2, (500, 2, 4))
    found = gt[:, :, 2] + generator.normal(0, 4, (500, 2))
    known = generator.random(500) > 0.1
    error = np.linalg.norm(gt - found[:, :, None], axis=1).min(1)
    lengths = np.linalg.norm(gt, axis=1)
    wrong = (error > 3) & (error > 0.05 * lengths.max(1))
    slow = lengths.mean(1) < 10
    truths = torch.from_numpy(gt).permute(2, 1, 0)[:, :, None]
    sample = sample_of(truths[0].float(), torch.from_numpy(known)[None])._replace(truths=truths)
    flow = torch.from_numpy(found).T[:, None]
    sums, numbers = pixel_sums(flow, sample), pair_errors(flow, sample)
    assert sums["epe"].value == pytest.approx(error[known].mean()) == pytest.approx(numbers["epe"])
    assert sums["out1"].value == pytest.approx(100 * (error > 1)[known].mean()) == pytest.approx(numbers["out1"])
    assert sums["fl"].value == pytest.approx(100 * wrong[known].mean()) == pytest.approx(numbers["fl"])
    assert sums["s0-10"].value == pytest.approx(error[known & slow].mean()) and 0 < sums["s0-10"].count < known.sum()
    judged = judge(flow, sample)
    assert torch.allclose(end_point_error(flow, judged.nearest), judged.error)
    assert judge(truths[3], sample).error.max() == 0 and pixel_sums(truths[3], sample)["angle"].value < 1e-4


def test_angle_by_hand():
    angle = angular_error(row(0, 1, 1, 0), row(0, 0, 1, 3))
    assert angle[0].tolist() == pytest.approx([0, 45, 0, math.degrees(math.atan(3))], abs=1e-4)


def test_wauc_by_hand():
    """Weights 1, 0.99, ..., 0.01 have the sum 50.5; an error of 4.97 px is within the last limit only."""
    score = wauc_score(torch.tensor([0.0, 0.05, 0.0501, 4.97, 5.0, 5.01, math.inf], dtype=torch.float64))
    assert score.tolist() == pytest.approx([1, 1, 1 - 1 / 50.5, 0.01 / 50.5, 0.01 / 50.5, 0, 0])


def test_boundaries_and_their_distance():
    truth = row(0, 0, 0, 5, 5, 5.5, 0)
    valid = torch.tensor([[True, True, True, True, True, True, False]])
    assert boundaries(sample_of(truth, valid)).tolist() == [[False, False, True, True, False, False, False]]
    assert boundary_distance(sample_of(truth, valid)).tolist() == [[2, 1, 0, 0, 1, 2, 3]]
    occluded = torch.tensor([[True, False, False, False, False, False, False]])
    assert boundaries(sample_of(truth, valid, occluded)).tolist() == [[True, True] + 5 * [False]]
    assert boundary_distance(sample_of(row(0, 0)))[0].tolist() == [math.inf, math.inf]
    assert "occlusion" in boundary_rule(sample_of(truth, valid, occluded)) and "motion" in boundary_rule(
        sample_of(truth)
    )
    assert boundary_rule(sample_of(truth, valid & False)) == ""


def test_distance_is_euclidean():
    edges = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)) > 0.99
    occluded = torch.zeros(30, 40, dtype=torch.bool)
    occluded[edges] = True
    sample = sample_of(torch.zeros(2, 30, 40), occluded=occluded)
    points = boundaries(sample).nonzero().double()
    grid = torch.cartesian_prod(torch.arange(30), torch.arange(40)).double()
    expected = torch.cdist(grid, points).amin(1).reshape(30, 40)
    assert torch.allclose(boundary_distance(sample).double(), expected, atol=1e-5)
    near = boundary_distance(sample, limit=4)
    assert torch.equal(near.isinf(), expected >= 4) and len(pixel_sums(sample.flow, sample)["d0-10"]) == 2


def test_edges_of_motion_whatever_is_occluded():
    """A step of the motion is an edge of motion also where the occlusion is known; EPE beside it is its own number."""
    truth = torch.zeros(2, 9, 40)
    truth[0, :, 20:] = 8.0
    sample = sample_of(truth, occluded=torch.zeros(9, 40, dtype=torch.bool))
    assert motion_edges(sample)[:, 19:21].all() and motion_edges(sample).sum() == 18 and not boundaries(sample).any()
    flow = truth.clone()
    flow[1, :, 15:25] += 3  # distances 4 to 0 on both sides
    sums = pixel_sums(flow, sample)
    assert sums["edge0-5"] == Mean(3.0 * 9 * 10, 9 * 10)


def test_false_motion_is_that_of_still_pixels():
    truth = torch.zeros(2, 1, 10)
    truth[0, 0, 5:] = 20.0
    flow = truth.clone()
    flow[0, 0, 0], flow[0, 0, 1], flow[0, 0, 9] = 2.0, 30.0, 0.0
    valid = torch.ones(1, 10, dtype=torch.bool)
    valid[0, 4] = False
    sample = sample_of(truth, valid)
    sums = pixel_sums(flow, sample)
    assert sums["false1"].value == 50 and sums["false3"].value == 25 and sums["false1"].count == 4
    still = still_histogram(judge(flow, sample), valid)
    assert still.sum() == 4 and quantile(still, 0.999) == pytest.approx(30, rel=0.01)


def test_flicker_by_hand():
    """The surface moves by 2 pixels: errors are compared where its points have gone, among those seen in both."""
    truth = torch.zeros(2, 1, 6)
    truth[0] = 2.0
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[0, 1] = True
    sample = sample_of(truth, occluded=hidden)
    first, second = truth.clone(), truth.clone()
    first[0, 0, 0], second[0, 0, 2] = 5.0, 5.0  # 3 px wrong, both at one point: no change
    first[1, 0, 2] = 4.0  # 4 px wrong, right afterwards
    assert flicker(first, sample, second, sample) == Mean(4.0, 3)  # points 0, 2, 3: 1 is hidden, 4 and 5 leave
    second[0, 0, 5] = math.nan
    assert flicker(first, sample, second, sample).total == math.inf


def test_quantiles_of_pooled_histograms():
    errors = torch.rand(2, 5000, generator=torch.Generator().manual_seed(1)) * 30
    histogram = error_histogram(errors[0]) + error_histogram(errors[1])
    for share in (0.1, 0.5, 0.9, 0.99):
        assert quantile(histogram, share) == pytest.approx(torch.quantile(errors.flatten(), share).item(), rel=0.01)
    assert quantile(error_histogram(torch.zeros(3)), 0.5) == 0
    assert math.isnan(quantile(error_histogram(torch.zeros(0)), 0.5))


def test_speed_profile_by_hand():
    truth, valid = row(0, 0.5, 3, 1000, 7), torch.tensor([[True, True, True, True, False]])
    sums, counts = speed_profile(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), truth[0], valid)
    assert sums.tolist() == [1, 2, 0, 3, 0, 0, 0, 0, 0, 4] and counts.tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0, 1]


def test_sparsification_by_hand():
    error = torch.arange(20.0)
    perfect = sparsification(error, error * 3)
    assert ause(perfect) == 0 and perfect[0, 0] == 1 and perfect[0, 10] == pytest.approx(4.5 / 9.5)
    opposite = sparsification(error, -error)
    assert opposite[0, -1] == pytest.approx(19 / 9.5) and opposite[1, -1] == 0
    assert ause(opposite) == pytest.approx(0.5 * sum(k / 9.5 + k / 9.5 for k in range(20)) / 20)
    assert ause(sparsification(torch.zeros(5), torch.rand(5))) == 0, "no error, nothing to sort"


# ---- KITTI ----


def kitti(folder, found: str, truth: str) -> dict[str, Mean]:
    flow, known = read_flow(folder / found)
    true, valid = read_flow(folder / truth)
    assert known[valid].all(), "these results are dense, so the development kit interpolates nothing"
    flow, true = (torch.from_numpy(array).permute(2, 0, 1) for array in (flow, true))
    return pixel_sums(flow, sample_of(true, torch.from_numpy(valid)))


def test_kitti_2015_demo(shared):
    sums = kitti(shared / "data" / "refs" / "kitti_devkit2015", "flow_est.png", "flow_gt.png")
    assert sums["epe"].value == pytest.approx(12.2007, abs=1e-4)
    assert sums["fl"].value == pytest.approx(20.688, abs=1e-3)
    assert sums["out3"].value == pytest.approx(28.605, abs=1e-3)


def test_kitti_2012_lucas_kanade(shared):
    """Pair 45 with and without occluded pixels. The estimate of pair 157 is not in the reference data."""
    folder = shared / "data" / "kitti2012" / "flow_000045"
    flow, _ = read_flow(shared / "data" / "refs" / "kitti_lk" / "LKflow_000045_10.png")
    true, valid = read_flow(folder / "flow.png")
    visible = torch.from_numpy(np.asarray(Image.open(folder / "noc.png")) > 0)
    flow, true = (torch.from_numpy(array).permute(2, 0, 1) for array in (flow, true))
    sums = pixel_sums(flow, sample_of(true, torch.from_numpy(valid), ~visible))
    assert sums["epe"].value == pytest.approx(11.6311, abs=1e-4) and sums["out3"].value == pytest.approx(
        79.8021, abs=1e-4
    )
    assert sums["out3_visible"].value == pytest.approx(78.560, abs=1e-3)
    # 10.6271 was computed with the file flow_noc, whose vectors differ a little from those of flow_occ used here
    assert sums["epe_visible"].value == pytest.approx(10.6271, abs=2e-3)
