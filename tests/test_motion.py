"""Warping and occlusion as users call them: arrays or tensors, by hand."""

import numpy as np
import pytest
import torch

import fleetflow
from fleetflow import FleetflowError, occlusion, warp


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_warp_brings_frame2_back(dtype, channels):
    shape = (12, 20) if channels is None else (12, 20, channels)
    frame1 = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    frame2 = np.roll(frame1, (1, 2), (0, 1))
    flow = np.broadcast_to(np.float32([2, 1]), (12, 20, 2))
    back = warp(frame2, flow)
    assert back.dtype == dtype and back.shape == frame1.shape
    np.testing.assert_allclose(back[:11, :18], frame1[:11, :18], rtol=0, atol=1e-3)
    assert (back[-1] == 0).all() and (back[:, -2:] == 0).all(), "outside the picture is 0"
    tensor = torch.from_numpy(frame2.reshape(12, 20, -1)).permute(2, 0, 1)[None]
    same = warp(tensor, torch.from_numpy(flow.copy()).permute(2, 0, 1)[None])
    np.testing.assert_array_equal(same[0].permute(1, 2, 0).numpy().reshape(shape), back)


def test_what_a_square_hides_is_occluded():
    """A square of 8x8 moves 4 px to the right over a still ground; it hides 4 columns and uncovers 4 others."""
    forward, backward = np.zeros((2, 20, 30, 2), np.float32)
    forward[6:14, 10:18, 0] = 4
    backward[6:14, 14:22, 0] = -4
    hidden = occlusion(forward, backward)
    expected = np.zeros((20, 30), bool)
    expected[6:14, 18:22] = True
    assert hidden.dtype == bool and (hidden == expected).all()
    uncovered = occlusion(backward, forward)
    expected = np.zeros((20, 30), bool)
    expected[6:14, 10:14] = True
    assert (uncovered == expected).all()
    tensors = (torch.from_numpy(flow).permute(2, 0, 1)[None] for flow in (forward, backward))
    assert (occlusion(*tensors)[0].numpy() == hidden).all()


def test_what_leaves_the_picture_or_is_no_number_is_occluded():
    forward = np.zeros((6, 8, 2), np.float32)
    forward[..., 0] = 3
    forward[2, 2] = np.nan
    hidden = occlusion(forward, -np.nan_to_num(forward))
    assert hidden[:, 5:].all() and hidden[2, 2] and hidden.sum() == 6 * 3 + 1


def test_wrong_shapes_are_named():
    flow = np.zeros((6, 8, 2), np.float32)
    for call, words in (
        (lambda: warp(np.zeros((6, 9, 3)), flow), "same size"),
        (lambda: warp([[1, 2], [3]], flow), "image is a list .*; expected"),
        (lambda: warp(np.zeros((0, 8, 3)), flow[:0]), r"image is \[0, 8, 3\]; expected"),
        (lambda: warp(np.zeros((6, 8, 3)), flow[..., :1]), r"flow is \[6, 8, 1\]; expected"),
        (lambda: occlusion(flow, flow[:5]), "same size"),
        (lambda: occlusion(flow[0], flow[0]), r"forward is \[8, 2\]"),
    ):
        with pytest.raises(FleetflowError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_public_names_are_stated_for_editors_and_imported_late():
    """What the type checker sees is what the names mean."""
    import ast
    import importlib
    from pathlib import Path

    tree = ast.parse(Path(fleetflow.__file__).read_text())
    stated = {
        alias.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*stated, "__version__"} == set(fleetflow.__all__)
    for name, module in stated.items():
        assert getattr(importlib.import_module(module), name) is getattr(fleetflow, name), name
    assert Path(fleetflow.__file__).with_name("py.typed").is_file()
