"""A pair that is learned from twice: what its second use is, and that it follows from the number of the batch."""

import pytest
import torch

from fleetflow.ops.warp import warp
from fleetflow.training.dataloader import Feed
from fleetflow.training.echo import APART, Echo
from fleetflow.training.recipe import Batches, Stage, changed
from fleetflow.training.recipes.generated import GENERATED
from fleetflow.types import FleetflowError, Sample


def make(count, height, width, place):
    """Noise that moves by (3, -2) px, another for each place."""
    frame1 = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(place % 2**63))
    flow = torch.tensor([3.0, -2.0])[:, None, None].expand(count, 2, height, width)
    valid = torch.zeros(count, height, width, dtype=torch.bool)
    valid[:, 2:, : width - 3] = True
    return Sample(frame1, frame1.roll((-2, 3), (-2, -1)), flow, valid)


def test_batch_is_new_pairs_and_mirror_images_of_earlier_ones():
    echo = Echo(make, 2)
    early = echo.batch(4, 32, 48, 3)
    late = echo.batch(4, 32, 48, 3 + APART)
    for tensor, own in zip(late[:4], make(2, 32, 48, 3 + APART)):
        assert torch.equal(tensor[:2], own)
    sign = torch.tensor([-1.0, 1.0])[:, None, None]
    assert torch.equal(late.flow[2:], early.flow[:2].flip(-1) * sign)
    assert torch.equal(late.valid[2:], early.valid[:2].flip(-1))
    assert not torch.equal(late.frame1[2:], early.frame1[:2].flip(-1))  # other colors


@pytest.mark.parametrize("k", range(1, 4))
def test_mirrored_frames_agree_along_the_mirrored_flow(k):
    known = Echo(make, 4).batch(4, 64, 96, 1)
    frame1, frame2, flow, valid = (tensor[k : k + 1] for tensor in known[:4])
    moved = (warp(frame2, flow) - frame1).abs().mean(1)[valid]
    assert moved.max() < 1e-5  # both frames are changed in color by the same amounts


def test_batch_follows_from_its_number_alone():
    used = Echo(make, 3)
    for place in range(2 * APART + 1):
        last = used.batch(3, 16, 24, place)
    for one, other in zip(last[:4], Echo(make, 3).batch(3, 16, 24, 2 * APART)[:4]):
        assert torch.equal(one, other)
    assert len(used.kept) == 2 * APART  # what later batches use, no more


def test_uses_must_divide_the_batch():
    plan = changed(GENERATED["fastflownet_wide"], {"echo": "2", "batch": "3"})
    with pytest.raises(FleetflowError, match="echo is 2, of batches .* of 3 pairs"):
        Feed(plan.stages[0], 0, 1, None, None)
    with pytest.raises(FleetflowError, match="expected 1 to 4"):
        Feed(Stage("one", (Batches(1, 8, 32, 32),), 1e-3, lambda step, steps: 1.0, echo=8), 0, 1, None, None)
