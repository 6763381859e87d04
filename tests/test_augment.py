"""Augmentation: the flow of every family is exact, validity and occlusion follow, colors do what they say."""

import colorsys
import math
from functools import partial

import pytest
import torch

from fleetflow.data.augment import color, flownet, geometry, irr, lightflow, liteflownet2, own, raft
from fleetflow.data.augment.dice import Dice
from fleetflow.ops.warp import pixel_grid, warp
from fleetflow.types import FleetflowError, Sample

SIZE = (72, 112)
OLD = (100, 150)
FAMILIES = {
    "crop": geometry.crop,
    "flownet": flownet.flownet,
    "irr": irr.irr,
    "irr_kitti": irr.irr_kitti,
    "liteflownet2": liteflownet2.liteflownet2,
    "liteflownet2_sintel": liteflownet2.liteflownet2_sintel,
    "liteflownet2_kitti": liteflownet2.liteflownet2_kitti,
    "liteflownet2_kitti_mixed": partial(liteflownet2.liteflownet2_kitti, jitter=liteflownet2.JITTER),
    "lightflow": lightflow.lightflow,
    "raft": raft.raft,
    "raft_sparse": partial(raft.raft_sparse, mirror=True),
    "own": own.own,
}
SPARSE = ("irr_kitti", "liteflownet2_kitti", "liteflownet2_kitti_mixed", "raft_sparse")


def dice(count: int = 4, seed: int = 0) -> Dice:
    return Dice(torch.Generator().manual_seed(seed), torch.zeros(count))


def picture(points: torch.Tensor) -> torch.Tensor:
    """A smooth picture [N, 3, H, W] of points [N, 2, H, W]: what resampling does to it is small."""
    x, y = points.unbind(1)
    waves = ((0.08, 0.05, 0), (0.03, -0.09, 1), (-0.06, 0.04, 2))
    return torch.stack([0.5 + 0.4 * torch.sin(a * x + b * y + c) for a, b, c in waves], 1)


def moving(count: int = 4, size: tuple[int, int] = OLD) -> tuple[Sample, torch.Tensor]:
    """A scene under one affine motion, exact, with backward flow and occlusion; and the motion [3, 3]."""
    motion = torch.tensor([[1.03, 0.05, -6.0], [-0.04, 0.97, 5.0], [0, 0, 1]], dtype=torch.float64)
    maps = motion.expand(count, 3, 3)
    grid = pixel_grid(*size, torch.zeros(1)).expand(count, -1, -1, -1)
    flow, backward = geometry.apply(maps, grid) - grid, geometry.apply(maps.inverse(), grid) - grid
    sample = Sample(picture(grid), picture(grid + backward), flow, torch.ones(count, *size, dtype=torch.bool), backward)
    return sample._replace(occluded=geometry.leaving(sample)), motion


def maps_of(count: int = 4, *, seed: int = 0, reach: float = 1.0) -> torch.Tensor:
    """Random maps from new to old that stay near the middle."""
    draw = dice(count, seed)
    turn = geometry.rotation(draw.uniform(-20 * reach, 20 * reach))
    scale = geometry.scaling(draw.uniform(0.6, 1), draw.uniform(0.6, 1))
    shift = geometry.translation(draw.uniform(0, 20 * reach), draw.uniform(0, 15 * reach))
    return shift @ geometry.around(SIZE, turn @ scale)


@pytest.fixture
def plain(monkeypatch):
    """Families without their colors, so that frames can be compared along the flow."""
    for name in ("brightness", "contrast", "gamma", "noise", "jitter"):
        monkeypatch.setattr(color, name, lambda frames, *_, **__: frames.clone())
    monkeypatch.setattr(color, "paint", lambda sample, *_, **options: sample)
    monkeypatch.setattr(raft, "erased", lambda sample, *_: sample)
    monkeypatch.setattr(flownet.torch, "erfinv", torch.zeros_like)


@pytest.mark.parametrize("move", [geometry.resample, geometry.scatter])
def test_the_flow_is_the_composition_of_the_maps(move):
    sample, motion = moving()
    map1, map2 = maps_of(seed=1), maps_of(seed=2)
    new = move(sample, map1, map2, SIZE)
    grid = pixel_grid(*SIZE, torch.zeros(1)).expand(4, -1, -1, -1)
    expected = geometry.apply(map2.inverse() @ motion @ map1, grid) - grid
    backward = geometry.apply(map1.inverse() @ motion.inverse() @ map2, grid) - grid
    assert new.valid.float().mean() > 0.3
    slack = 1e-3 if move is geometry.resample else 0.5  # half a pixel of place times the slope of the flow
    assert (new.flow - expected).abs().amax(1)[new.valid & within(map1)].max() < slack
    assert (new.flow - expected).abs().amax(1)[new.valid].max() < max(slack, 0.1), "on the rim, half a pixel wide"
    assert (new.backward - backward).abs().amax(1)[within(map2)].max() < 1e-3


def within(maps: torch.Tensor) -> torch.Tensor:
    """The new pixels that lie between centers of old ones, [N, H, W]."""
    x, y = geometry.apply(maps, pixel_grid(*SIZE, torch.zeros(1)).expand(len(maps), -1, -1, -1)).unbind(1)
    return (x >= 0) & (y >= 0) & (x <= OLD[1] - 1) & (y <= OLD[0] - 1)


def test_maps_that_follow_each_other_are_one_map():
    """Moving twice is moving by the product: frames, flow and validity."""
    sample, _ = moving()
    first1, first2, then1, then2 = (maps_of(seed=seed, reach=0.3) for seed in range(4))
    twice = geometry.resample(geometry.resample(sample, first1, first2, SIZE), then1, then2, (50, 60))
    once = geometry.resample(sample, first1 @ then1, first2 @ then2, (50, 60))
    both = twice.valid & once.valid
    assert both.float().mean() > 0.5
    assert (twice.flow - once.flow).abs().amax(1)[both].max() < 1e-3
    assert (twice.frame1 - once.frame1).abs().amax(1)[both].max() < 0.01


def test_the_identity_changes_nothing():
    sample, _ = moving()
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    for move in (geometry.resample, geometry.scatter):
        for new, old in zip(move(sample, eye, eye, OLD), sample):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_frame2_warped_by_the_new_flow_is_frame1(plain, name):
    sample, _ = moving()
    for seed in range(3):
        new = FAMILIES[name](sample, torch.Generator().manual_seed(seed), SIZE)
        assert new.frame1.shape == (4, 3, *SIZE) and new.flow.shape == (4, 2, *SIZE)
        seen = new.valid & ~new.occluded
        assert seen.float().mean() > (0.35 if name in SPARSE else 0.6)
        seen &= warp(torch.ones_like(new.frame1), new.flow)[:, 0] > 0.999  # not on the rim, half a pixel wide
        error = (warp(new.frame2, new.flow) - new.frame1).abs().mean(1)[seen]
        limit = 0.06 if name in SPARSE else 0.012
        assert error.max() < limit and error.mean() < limit / 6
        if name not in SPARSE:
            loop = new.flow + warp(new.backward, new.flow)
            inside = seen & (warp((new.backward != 0).all(1, keepdim=True).float(), new.flow)[:, 0] > 0.99)
            assert inside.any() and loop.abs().amax(1)[inside].max() < 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_gives_the_same_samples(name):
    sample, _ = moving()
    one, two, other = (FAMILIES[name](sample, torch.Generator().manual_seed(seed), SIZE) for seed in (5, 5, 6))
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(one.frame1, other.frame1)
    assert not torch.equal(one.frame1[0], one.frame1[1]), "every sample of a batch in its own way"
    for frame in (one.frame1, one.frame2):
        assert frame.min() >= 0 and frame.max() <= 1 and frame.std() > 0.02
    before, _ = moving()
    for old, kept in zip(sample, before):
        torch.testing.assert_close(old, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_occlusion_and_backward_flow(name):
    sample, _ = moving(1)
    sample = Sample(*sample[:4])
    new = FAMILIES[name](sample, torch.Generator().manual_seed(5), SIZE)
    assert new.backward is None and new.occluded is None
    assert new.valid.dtype == torch.bool and new.flow.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_truth_does_not_spread(name):
    sample, _ = moving()
    valid = torch.ones_like(sample.valid)
    valid[:, 30:60, 40:90] = False
    sparse = sample._replace(flow=torch.where(valid[:, None], sample.flow, 1e4), valid=valid)
    new = FAMILIES[name](sparse, torch.Generator().manual_seed(2), SIZE)
    assert new.flow.isfinite().all() and new.flow.abs().max() < 100
    assert (new.flow[~new.valid[:, None].expand(-1, 2, -1, -1)] == 0).all()
    assert not new.valid.all() and new.valid.any()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("raft", "raft_sparse")])
def test_frames_smaller_than_the_crop_are_refused(name):
    sample, _ = moving()
    with pytest.raises(FleetflowError, match="smaller than the crop 101x112"):
        FAMILIES[name](sample, torch.Generator(), (101, 112))


@pytest.mark.parametrize("name", ["raft", "raft_sparse"])
def test_raft_enlarges_small_frames(plain, name):
    sample, _ = moving()
    new = FAMILIES[name](sample, torch.Generator().manual_seed(0), (128, 160))
    assert new.flow.shape[-2:] == (128, 160)
    seen = new.valid & ~new.occluded
    assert (warp(new.frame2, new.flow) - new.frame1).abs().mean(1)[seen].mean() < 0.01


def recovered(name: str, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps from new to old of both frames, [N, 2, 3], found from frames that show their own coordinates."""
    grid = pixel_grid(*OLD, torch.zeros(1)).expand(count, -1, -1, -1)
    frame = torch.cat((grid / 200, torch.zeros(count, 1, *OLD)), 1)
    sample = Sample(frame, frame, torch.zeros_like(grid), torch.ones(count, *OLD, dtype=torch.bool))
    new = FAMILIES[name](sample, torch.Generator().manual_seed(1), SIZE)
    rows, columns = slice(20, 50), slice(30, 80)
    points = pixel_grid(*SIZE, torch.zeros(1))[:, rows, columns].flatten(1).T.double()
    points = torch.cat((points, torch.ones(len(points), 1)), 1)
    found = []
    for shown in (new.frame1, new.frame2):
        seen = 200 * shown[:, :2, rows, columns].flatten(2).mT.double()
        found.append(torch.linalg.lstsq(points.expand(count, -1, -1), seen).solution.mT)
    return found[0], found[1]


RANGES = {  # largest zoom, smallest zoom, turn in degrees; the same of frame2 alone and its shift in px
    "irr": (1.5, 1.0, 11.5, 1.015, 0.985, 0.87, 1.5),
    "liteflownet2": (1.5, 1.0, 10, 1.015, 0.985, 1, 1.5),
    "liteflownet2_sintel": (1.2, 1.0, 5, 1.015, 0.985, 1, 1.5),
    "liteflownet2_kitti": (1.02, 0.98, 0.5, 1.01, 0.99, 0.5, 1.0),
    "irr_kitti": (1.02, 0.98, 0.58, 1.01, 0.99, 0.58, 0.5),
    "flownet": (2.0, 0.9, 17, 1.015, 0.985, 0.87, 1.5),
    "lightflow": (1.0, 1.0, 10, 1.0, 1.0, 5, 15),
}


@pytest.mark.parametrize("name", RANGES)
def test_transforms_keep_to_the_published_ranges(plain, name):
    high, low, turn, high2, low2, turn2, shift2 = RANGES[name]
    one, two = recovered(name)
    last = torch.tensor([0.0, 0, 1], dtype=torch.float64).expand(len(one), 1, 3)
    center = torch.tensor([(OLD[1] - 1) / 2, (OLD[0] - 1) / 2, 1], dtype=torch.float64)

    def parts(linear):
        u, s, v = torch.linalg.svd(linear)
        turned = u @ v
        angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
        mirrored = torch.linalg.det(linear) < 0
        return s.prod(-1).rsqrt(), torch.where(mirrored, 0, (angle + 90) % 180 - 90)

    zoom, angle = parts(one[:, :, :2])
    assert zoom.max() < high + 0.01 and zoom.min() > low - 0.01
    assert angle.abs().max() < turn + 0.3 and angle.abs().max() > 0.4 * turn
    # What frame2 alone went through, old to old: A1 A2^-1.
    change = torch.cat((one, last), 1) @ torch.cat((two, last), 1).inverse()
    zoom, angle = parts(change[:, :2, :2].inverse())
    assert zoom.max() < high2 + 0.01 and zoom.min() > low2 - 0.01 and angle.abs().max() < turn2 + 0.2
    moved = (change @ center - center)[:, :2].abs().amax()
    assert 0.3 * shift2 < moved < shift2 * high + 0.3


NOISY = {"irr", "irr_kitti", "liteflownet2", "liteflownet2_kitti", "liteflownet2_kitti_mixed"}


@pytest.mark.parametrize("name", sorted(NOISY | {"liteflownet2_sintel"}))
def test_noise_is_where_it_is_published(name):
    """Frames of one color stay so without noise; mmflow fine-tunes LiteFlowNet2 on Sintel without any."""
    frame = torch.full((4, 3, *OLD), 0.5)
    sample = Sample(frame, frame, torch.zeros(4, 2, *OLD), torch.ones(4, *OLD, dtype=torch.bool))
    new = FAMILIES[name](sample, torch.Generator().manual_seed(0), SIZE)
    spread = torch.stack((new.frame1, new.frame2)).flatten(3).std(-1).max()
    assert spread > 0.01 if name in NOISY else spread < 1e-5


def test_raft_scales_and_mirrors_as_published(plain):
    one, two = recovered("raft", 256)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
    scales = 1 / torch.stack((one[:, 0, 0], one[:, 1, 1]), 1)
    least = torch.tensor([(SIZE[1] + 8) / OLD[1], (SIZE[0] + 8) / OLD[0]])
    assert one[:, 0, 1].abs().max() < 1e-3, "no turns"
    assert (scales.abs() > least - 0.01).all() and scales.abs().max() < 2 ** (0.6 + 0.2) + 0.01
    assert 0.4 < (scales[:, 0] < 0).float().mean() < 0.6 and 0.03 < (scales[:, 1] < 0).float().mean() < 0.2
    assert 0.1 < ((scales.abs() - 1).abs() < 1e-3).all(1).float().mean() < 0.35, "one in five stays as it is"
    alike = (scales[:, 0].abs() - scales[:, 1].abs()).abs() < 1e-3
    assert 0.2 < alike.float().mean() < 0.6, "stretched with probability 0.8 of 0.8"


def test_no_flow_appears_that_nothing_has():
    """Enlarged, a square of 9 px over a ground of -5 px has these two flows, not what lies between."""
    flow = torch.full((1, 2, 40, 50), -5.0)
    flow[:, :, 10:30, 15:35] = 9
    sample = Sample(torch.rand(1, 3, 40, 50), torch.rand(1, 3, 40, 50), flow, torch.ones(1, 40, 50, dtype=torch.bool))
    half = torch.tensor(0.61, dtype=torch.float64)
    map_ = geometry.around((40, 50), geometry.rotation(torch.tensor(20.0).double()) @ geometry.scaling(half, half))[
        None
    ]
    new = geometry.resample(sample, map_, map_, (40, 50))
    expected = geometry.apply(map_.inverse(), torch.tensor([[-5.0, 9], [-5, 9]])[None, :, None])
    expected = expected - geometry.apply(map_.inverse(), torch.zeros(1, 2, 1, 1))
    far = (new.flow[0, 0, :, :, None] - expected[0, 0, 0]).abs().amin(-1)
    assert far[new.valid[0]].max() < 0.02 and far[new.valid[0]].median() < 1e-5


def test_lone_pixels_of_sparse_truth_survive():
    """Enlarged by 2, every known pixel has exactly one place, with twice its flow; a bilinear flow would have none."""
    known = torch.zeros(2, 20, 30, dtype=torch.bool)
    known[:, ::5, 1::4] = True
    flow = torch.where(known[:, None], torch.randn(2, 2, 20, 30, generator=torch.Generator().manual_seed(0)), math.nan)
    sample = Sample(torch.rand(2, 3, 20, 30), torch.rand(2, 3, 20, 30), flow, known)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    map_ = geometry.scaling(half, half)
    new = geometry.scatter(sample, map_, map_, (40, 60))
    assert new.valid.sum() == known.sum() and new.valid[:, ::10, 2::8].all()
    torch.testing.assert_close(new.flow[:, :, ::10, 2::8], 2 * flow[:, :, ::5, 1::4])
    assert not geometry.resample(sample, map_, map_, (40, 60)).valid[:, 1::2].any()
    shrunk = geometry.scatter(sample, map_.inverse(), map_.inverse(), (10, 15))
    assert shrunk.flow.isfinite().all() and shrunk.valid.any()


def test_where_two_pixels_meet_the_later_stays():
    flow = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 2, 4, 4).contiguous()
    sample = Sample(*torch.rand(2, 1, 3, 4, 4), flow, torch.ones(1, 4, 4, dtype=torch.bool))
    double = torch.full((1,), 4.0, dtype=torch.float64)
    map_ = geometry.scaling(double, double)  # four pixels become one; columns 0, 1, 2 round to 0, of rows 0, 1, 2
    new = geometry.scatter(sample, map_, map_, (1, 1))
    assert new.flow[0, 0, 0, 0] == flow[0, 0, 2, 2] / 4


def test_leaving_the_window_is_being_occluded():
    sample, _ = moving()
    still = sample._replace(flow=torch.full_like(sample.flow, 7.0), occluded=torch.zeros_like(sample.valid))
    new = geometry.crop(still, torch.Generator().manual_seed(0), SIZE)
    expected = torch.zeros(4, *SIZE, dtype=torch.bool)
    expected[:, -7:], expected[:, :, -7:] = True, True
    assert torch.equal(new.occluded, expected)


def test_a_window_that_must_stick_out_says_so():
    """A frame as large as the crop cannot be turned inside: the corners are invalid, and finite."""
    sample, _ = moving(size=SIZE)
    new = lightflow.lightflow(sample, torch.Generator().manual_seed(0), SIZE)
    assert 0.5 < new.valid.float().mean() < 1 and new.flow.isfinite().all()


def test_boxes_are_erased():
    sample, _ = moving(64, (120, 160))
    flat = sample._replace(flow=torch.zeros_like(sample.flow), occluded=torch.zeros_like(sample.valid))
    new = raft.erased(flat, dice(64))
    changed = (new.frame2 != flat.frame2).any(1)
    share = changed.flatten(1).any(1).float().mean()
    assert 0.35 < share < 0.65
    assert torch.equal(new.occluded, changed | new.occluded) and (new.occluded & ~changed).float().mean() < 1e-3
    k = int(changed.flatten(1).any(1).nonzero()[0])
    inside = new.frame2[k][:, changed[k]]
    torch.testing.assert_close(inside, flat.frame2[k].mean((1, 2))[:, None].expand_as(inside))
    rows = changed.any(2).sum(1)
    assert rows.max() <= 120 and (rows[rows > 0] >= 1).all()


def frames_of(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def test_hue_is_that_of_colorsys():
    frames = frames_of(1)
    frames[0, 0, :, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 0.5]).expand(3, 4)  # gray has no hue
    turned = color.hue(frames, torch.tensor([0.2, -0.4]).view(1, 2, 1, 1, 1))
    for k, turn in enumerate((0.2, -0.4)):
        for x, y in ((0, 0), (3, 0), (5, 7), (20, 15), (11, 3)):
            h, s, v = colorsys.rgb_to_hsv(*frames[0, k, :, y, x].tolist())
            assert turned[0, k, :, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), abs=1e-5)
    third = color.hue(frames, torch.full((1, 1, 1, 1, 1), 1 / 3))
    torch.testing.assert_close(third, frames[:, :, [2, 0, 1]], rtol=0, atol=1e-5)


def test_colors_by_hand():
    frames = frames_of()
    gray = (frames * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(2, keepdim=True)
    half = torch.full((3, 1, 1, 1, 1), 0.5)
    torch.testing.assert_close(color.brightness(frames, half), frames / 2)
    torch.testing.assert_close(color.saturation(frames, half), (frames + gray) / 2)
    mean = gray.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(color.contrast(frames, half), (frames + mean) / 2)
    both = color.contrast(frames, half, torch.ones(3, 1, 1, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(both, (frames + mean.mean(1, keepdim=True)) / 2)
    torch.testing.assert_close(color.gamma(frames, half), frames.clamp(min=1e-6).sqrt())
    noisy = color.noise(torch.full((2, 2, 3, 64, 64), 0.5), torch.tensor([0.0, 0.1]).view(2, 1, 1, 1, 1), dice(2))
    assert (noisy[0] == 0.5).all() and noisy[1].std().item() == pytest.approx(0.1, rel=0.05)


def test_jitter_keeps_frames_together_or_apart():
    frames = frames_of(32)
    frames[:, 1] = frames[:, 0]
    for apart, expected in ((0.0, 0), (1.0, 32), (0.2, 6)):
        changed = color.jitter(frames, dice(32), (0.4, 0.4, 0.4, 0.16), apart=apart)
        differ = (changed[:, 0] - changed[:, 1]).abs().flatten(1).amax(1) > 1e-3
        assert abs(int(differ.sum()) - expected) <= (6 if apart == 0.2 else 0)
        assert (changed - frames).abs().flatten(1).amax(1).min() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_gives_the_same_geometry(plain, name):
    sample, _ = moving()
    here = FAMILIES[name](sample, torch.Generator().manual_seed(3), SIZE)
    there = FAMILIES[name](Sample(*(t.cuda() for t in sample)), torch.Generator().manual_seed(3), SIZE)
    assert all(tensor.is_cuda for tensor in there)
    assert (here.valid != there.valid.cpu()).float().mean() < 1e-3
    both = here.valid & there.valid.cpu()
    assert (here.flow - there.flow.cpu()).abs().amax(1)[both].quantile(0.999) < 1e-2
    assert (here.frame1 - there.frame1.cpu()).abs().mean() < 1e-3
