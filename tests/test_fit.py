"""How frames of any size get to a network and the flow back: every way of `FlowModel.fit`."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fleetflow.models.base import FITS, FlowModel
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction


class Rows(FlowModel):
    """Its flow is what it sees: the red and the green of frame1; on a coarser grid if asked."""

    stride = 8
    fit = "pad"

    def __init__(self, coarser: int = 1):
        super().__init__()
        self.coarser = coarser

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        self.seen = frame1
        return Prediction(F.avg_pool2d(frame1[:, :2], self.coarser), residual=frame1[:, 2])


@pytest.mark.parametrize("size,sides", [((11, 20), (2, 2, 0, 5)), ((8, 19), (2, 3, 0, 0)), ((1, 8), (0, 0, 0, 7))])
def test_pad_bottom_leaves_the_first_row_where_it_is(size, sides):
    frame = torch.rand(2, 3, *size)
    model = Rows().eval()
    model.fit = "pad_bottom"
    prediction = model(frame, frame.flip(-1) / 2)
    torch.testing.assert_close(model.seen, F.pad(frame, sides, mode="replicate"))
    torch.testing.assert_close(prediction.flow, frame[:, :2])
    torch.testing.assert_close(prediction.residual, frame[:, 2])


def test_pad_shares_the_rows_between_both_sides():
    frame = torch.rand(1, 3, 11, 20)
    model = Rows().eval()
    torch.testing.assert_close(model(frame, frame.flip(-1) / 2).flow, frame[:, :2])
    torch.testing.assert_close(model.seen, F.pad(frame, (2, 2, 2, 3), mode="replicate"))


@pytest.mark.parametrize("size", [(16, 24), (11, 20), (4, 4)])
def test_a_coarser_flow_is_resized_in_one_go(size):
    """Also where the coarse grid happens to have the size of the frames (4x4: fitted to 8x8, halved)."""
    frame = torch.rand(1, 3, *size)
    model = Rows(coarser=2).eval()
    model.fit = "scale"
    prediction = model(frame, frame.flip(-1) / 2)
    height, width = model.seen.shape[2:]
    expected = F.interpolate(F.avg_pool2d(model.seen[:, :2], 2), size=size, mode="bilinear")
    factors = torch.tensor([size[1] / width, size[0] / height])[:, None, None]
    torch.testing.assert_close(prediction.flow, expected * factors)
    assert prediction.residual.shape == (1, *size)


def test_a_fit_that_does_not_exist_is_refused():
    model = Rows().eval()
    model.fit = "kitti"
    with pytest.raises(FleetflowError, match=f'fit is "kitti"; expected .*{FITS[-1]}'):
        model(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_raft_on_kitti_is_the_official_one(shared, fill):
    golden = np.load(shared / "golden" / "raft_basic_odd_kitti.npz")
    meta = json.loads(str(golden["meta_json"]))
    assert meta["pad_mode"] == "kitti"
    frames = [torch.from_numpy(golden[key]).permute(2, 0, 1)[None].float() / 255 for key in ("img1", "img2")]
    model = fill.fill_module(models["raft"](), "raft_basic").eval()
    model.fit = "pad_bottom"
    with torch.no_grad():
        prediction = model(*frames, iterations=meta["iters"])
    assert np.abs(prediction.state[1].numpy() - golden["flow_low"]).max() < 1e-3
    assert np.abs(prediction.flow.numpy() - golden["flow"]).max() < 1e-3
    model.fit = "pad"
    with torch.no_grad():
        other = model(*frames, iterations=meta["iters"])
    assert np.abs(other.flow.numpy() - golden["flow"]).max() > 0.1, "the two ways of padding differ"
