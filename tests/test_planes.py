"""Planes in plain regions: which pixels hang together, what is fitted, where it is taken and where not."""

import pytest
import torch

from fleetflow.layers import planes
from fleetflow.layers.planes import _fitted, _terms, components, plain_regions, with_planes
from fleetflow.layers.warm_start import reduced
from fleetflow.ops.warp import inside, pixel_grid, warp


def flooded(mask):
    """The plain definition of `components`, one mask [H, W]: a set of pixels for each part."""
    left, parts = {tuple(at) for at in mask.nonzero().tolist()}, set()
    while left:
        part, todo = set(), [left.pop()]
        while todo:
            y, x = todo.pop()
            part.add((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            todo += near
        parts.add(frozenset(part))
    return parts


def test_components_are_those_of_a_flood():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(3, 17, 23, generator=generator) < share for share in (0.0, 0.3, 0.55, 0.6, 0.7, 1.0)]
    snake = torch.ones(1, 15, 16, dtype=torch.bool)
    snake[:, 1::4, :-1], snake[:, 3::4, 1:] = False, False
    for mask in (*masks, snake, torch.ones(1, 1, 1, dtype=torch.bool)):
        label = components(mask)
        assert torch.equal(label > 0, mask)
        for one, numbers in zip(mask, label):
            parts = {frozenset(map(tuple, (numbers == k).nonzero().tolist())) for k in numbers.unique() if k}
            assert parts == flooded(one)
        alone = [set(numbers[one].tolist()) for one, numbers in zip(mask, label)]
        assert sum(map(len, alone)) == len(set().union(*alone)), "pictures of a batch share no part"


def test_the_eight_numbers_of_a_plane_are_found_among_outliers():
    generator = torch.Generator().manual_seed(1)
    at = torch.rand(2, 400, 2, generator=generator) * 4 - 2
    true = torch.randn(2, 8, generator=generator)
    x, y = at.unbind(-1)
    a0, a1, a2, b0, b1, b2, g, h = true[:, :, None].unbind(1)
    flow = torch.stack((a0 + a1 * x + a2 * y + (g * x + h * y) * x, b0 + b1 * x + b2 * y + (g * x + h * y) * y), -1)
    flow[:, ::3] += 5 + 20 * torch.rand(2, 134, 2, generator=generator)
    found = _fitted(_terms(at), flow, torch.ones(2, 400))
    torch.testing.assert_close(found, true, atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def wall():
    """Frames of a wall of one color with a texture around it, all of it one moving plane, and its flow."""
    height, width = 160, 220
    grid = pixel_grid(height, width, torch.zeros(1))
    x, y = (grid - torch.tensor([110.0, 80.0])[:, None, None]) / 100
    flow = torch.stack((6 + 4 * x - 2 * y + 3 * x * x, -3 + x + 3 * y + 3 * x * y))[None]
    rough = torch.rand(1, 3, 40, 55, generator=torch.Generator().manual_seed(2))
    frame2 = torch.nn.functional.interpolate(rough, (height, width), mode="bicubic").clamp(0, 1)
    frame2[..., 45:125, 50:180] = 0.5
    beyond = torch.rand(frame2.shape, generator=torch.Generator().manual_seed(4))
    return torch.where(inside(flow)[:, None], warp(frame2, flow), beyond), frame2, flow


def test_a_wall_takes_the_flow_that_its_border_tells(wall):
    frame1, frame2, flow = wall
    region, texture = plain_regions(planes.halved(frame1))
    inner = (slice(65, 105), slice(70, 150))
    assert region.max() == 1 and (region[0, 32:52, 35:75] == 1).all()
    assert texture.max() <= 1 and texture[0, 42, 55] < 0.03 and texture[0, :15].mean() > 0.9
    wrong = flow.clone()
    wrong[:, :, *inner] += torch.tensor([7.0, -4.0])[:, None, None]
    found = with_planes(frame1, frame2, wrong)
    assert (found - flow)[:, :, *inner].norm(dim=1).max() < 0.3
    beyond = torch.nn.functional.interpolate((region == 0)[:, None].float(), flow.shape[-2:])[0, 0] > 0
    assert torch.equal(found[..., beyond], wrong[..., beyond])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(with_planes(frame1, frame2, wrong), found)
    twice = with_planes(*(torch.cat((part, part)) for part in (frame1, frame2, wrong)))
    assert (twice - flow)[:, :, *inner].norm(dim=1).max() < 0.3
    assert torch.equal(twice[..., beyond], torch.cat((wrong, wrong))[..., beyond])


@pytest.mark.parametrize(("dearer", "taken"), [(-0.2, True), (0.9, True), (1.1, False)])
def test_a_plane_that_explains_the_frames_less_well_is_not_taken(wall, monkeypatch, dearer, taken):
    frame1, frame2, flow = wall
    wrong = flow.clone()
    wrong[..., 65:105, 70:150] += 7
    shown = []  # flows whose cost was asked for: that of the flow as it was, the plane's

    def cost(half1, half2, given):
        shown.append(given)
        return torch.full(given[:, 0].shape, 0.1 + dearer * planes.WORTH * (len(shown) == 2))

    monkeypatch.setattr(planes, "matching_cost", cost)
    assert torch.equal(with_planes(frame1, frame2, wrong), wrong) is not taken
    assert torch.equal(shown[0], reduced(wrong, (80, 110))) and not torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_the_planes_of_several_flows_the_frames_choose(wall, order):
    frame1, frame2, flow = wall
    inner = (slice(65, 105), slice(70, 150))
    lost = flow + 9  # its plane would move the border too
    wrong = flow.clone()
    wrong[:, :, *inner] += 7
    found = with_planes(frame1, frame2, lost, [(lost, wrong)[k] for k in order])
    assert (found - flow)[:, :, *inner].norm(dim=1).max() < 0.3
    assert (with_planes(frame1, frame2, lost) - lost)[:, :, *inner].norm(dim=1).max() < 0.5


def test_frames_with_texture_everywhere_are_left_alone():
    frames = torch.rand(2, 1, 3, 60, 90, generator=torch.Generator().manual_seed(3))
    flow = torch.randn(1, 2, 60, 90)
    assert with_planes(*frames, flow) is flow


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 1), (33, 50)])
def test_any_size_and_one_color(size):
    frame = torch.full((2, 3, *size), 0.5)
    flow = torch.randn(2, 2, *size)
    found = with_planes(frame, frame, flow)
    assert found.shape == flow.shape and found.isfinite().all()
