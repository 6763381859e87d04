"""Checkpoints: ours, published ones, damaged ones, those of other networks, and those with code in them."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_liteflownet2 import as_released

import fleetflow
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.models.lightflow import LightFlow
from fleetflow.registry import models
from fleetflow.types import FleetflowError

HEADER = {"network": "fastflownet", "license": "Apache-2.0", "samples": 3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return FastFlowNet()


def one_line(call) -> str:
    with pytest.raises(FleetflowError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_our_format_round_trip(model, tmp_path):
    path = tmp_path / "folder" / "own.safetensors"
    weights.save(model, path, HEADER, dtype=torch.float32)
    for name in (str(path), f"fastflownet:{path}"):
        loaded = fleetflow.load(name)
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert weights.header(path) == {"network": "fastflownet", "license": "Apache-2.0", "samples": "3"}
    assert [file.name for file in path.parent.iterdir()] == ["own.safetensors"], "no temporary file is left"


def test_half_precision_is_half_the_size(model, tmp_path):
    weights.save(model, tmp_path / "half.safetensors", HEADER)
    assert (tmp_path / "half.safetensors").stat().st_size < 3_000_000
    weight = fleetflow.load(str(tmp_path / "half.safetensors")).pconv1_1[0].weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, model.pconv1_1[0].weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "step": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_layouts_of_published_files(model, tmp_path, wrap, prefix):
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(wrap(state), tmp_path / "published.pth")
    loaded = fleetflow.load(f"fastflownet:{tmp_path / 'published.pth'}")
    assert torch.equal(loaded.decoder2.conv7.bias, model.decoder2.conv7.bias)


def test_what_a_checkpoint_carries_beside_its_tensors_is_thrown_away(model, tmp_path):
    """numpy's numbers as either generation pickles them, arrays, and the arguments of a command line."""
    beside = {
        "best_EPE": np.float64(1.5), "epochs": np.int32(3), "history": np.arange(3.0), "flag": np.bool_(True),
        "name": np.str_("run"), "args": argparse.Namespace(lr=0.1, stage="chairs"), "div_flow": 20,
    }  # fmt: skip
    path = tmp_path / "published.pth"
    torch.save({"state_dict": model.state_dict(), **beside}, path)
    loaded = fleetflow.load(f"fastflownet:{path}")
    assert torch.equal(loaded.decoder2.conv7.bias, model.decoder2.conv7.bias)
    torch.save({"state_dict": model.state_dict(), **beside}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"numpy._core.") > 0
    path.write_bytes(content.replace(b"numpy._core.", b"numpy.core."))
    assert torch.equal(fleetflow.load(f"fastflownet:{path}").decoder2.conv7.bias, model.decoder2.conv7.bias)
    torch.save({"state_dict": {"a": np.zeros(3)}}, path)
    assert "no state dictionary" in one_line(lambda: fleetflow.load(f"fastflownet:{path}"))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap_was_sprung",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "plain.pth"):
        assert "never runs" in one_line(lambda: fleetflow.load(f"fastflownet:{name}"))  # noqa: B023
    assert not (tmp_path / "trap_was_sprung").exists()


def test_missing_truncated_and_foreign_files(model, tmp_path):
    assert "no file" in one_line(lambda: fleetflow.load("fastflownet:nowhere.pth"))
    assert "no file" in one_line(lambda: fleetflow.load("fastflownet:nowhere.safetensors"))
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    weights.save(model, tmp_path / "whole.safetensors", HEADER)
    for suffix in ("pth", "safetensors"):
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        for length in (0, 7, 100, len(data) // 2, len(data) - 1):
            cut = tmp_path / f"cut.{suffix}"
            cut.write_bytes(data[:length])
            one_line(lambda: fleetflow.load(f"fastflownet:{cut}"))  # noqa: B023
    (tmp_path / "text.pth").write_text("hello")
    one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'text.pth'}"))
    state = model.state_dict()
    key = "pconv1_1.0.weight"
    for content in (
        [1, 2, 3],
        {0: torch.zeros(1)},
        {**state, 1: torch.zeros(1)},
        {**state, key: state[key].to_sparse()},
        {**state, key: state[key].to("meta")},
        {**state, key: state[key].to(torch.complex64)},
    ):
        torch.save(content, tmp_path / "odd.pth")
        assert "no state dictionary" in one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'odd.pth'}"))


def test_a_checkpoint_that_does_not_fit(model, tmp_path):
    path = tmp_path / "other.pth"
    state = dict(model.state_dict())
    state["decoder2.conv1.0.weight"] = torch.zeros(96, 115, 3, 3)
    state["extra"] = state.pop("pconv1_1.0.bias")
    torch.save(state, path)
    message = one_line(lambda: fleetflow.load(f"fastflownet:{path}"))
    assert "3 differences" in message and "pconv1_1.0.bias is missing" in message
    assert "extra is not of this network" in message and "[96, 115, 3, 3], not [96, 87, 3, 3]" in message
    assert "looks like fastflownet, changed" in message


def test_the_network_is_named_whatever_the_layout_of_the_file(tmp_path, monkeypatch):
    """Released names of deq-flow and of the Caffe release, given to another network."""
    state = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in models["deq_flow_tiny"]().state_dict().items()
    }
    torch.save(state, tmp_path / "v2.pth")
    for other in ("gma", "fastflownet"):
        message = one_line(lambda: fleetflow.load(f"{other}:{tmp_path / 'v2.pth'}"))  # noqa: B023
        assert message.endswith("it looks like deq_flow_tiny")
    caffe = as_released(models["liteflownet2"]().state_dict())
    flat = {f"{layer}.{k}": array for layer, arrays in caffe.items() for k, array in enumerate(arrays)}
    torch.save(flat, tmp_path / "caffe.pth")
    message = one_line(lambda: fleetflow.load(f"gma:{tmp_path / 'caffe.pth'}"))
    assert message.endswith("it looks like liteflownet2")


def test_a_checkpoint_with_another_unit_of_flow(tmp_path):
    """Light Flow takes it over; another network cannot know what it means."""
    torch.manual_seed(0)
    model, frames = LightFlow(0.5).eval(), torch.rand(2, 1, 3, 64, 128)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.bias)
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": model.state_dict(), "div_flow": 5.0}, path)
    with torch.no_grad():
        expected, found = (network(*frames).flow for network in (model, fleetflow.load(f"lightflow_050:{path}")))
    torch.testing.assert_close(found, expected / 4)
    for name, network, unit in (("fastflownet", FastFlowNet(), 5), ("lightflow_050", model, 0)):
        torch.save({"state_dict": network.state_dict(), "div_flow": unit}, path)
        message = one_line(lambda: fleetflow.load(f"{name}:{path}"))  # noqa: B023
        assert "(1 differences: div_flow is not of this network)" in message


def test_a_path_is_a_name_too(model, tmp_path):
    path = tmp_path / "a:b.safetensors"
    weights.save(model, path, HEADER)
    for name in (path, str(path), f"fastflownet:{path}"):
        assert isinstance(fleetflow.load(name), FastFlowNet)
    for suffix in ("pth", "pth.tar", "caffemodel"):
        bare = tmp_path / f"raft.{suffix}"
        torch.save(model.state_dict(), bare)
        for name in (bare, str(bare)):
            message = one_line(lambda: fleetflow.load(name))  # noqa: B023
            assert message == f"{bare} does not name its network; call it as NETWORK:{bare}"
    assert isinstance(fleetflow.load(f"fastflownet:{tmp_path / 'raft.pth'}"), FastFlowNet)
    assert isinstance(fleetflow.load(Path("fastflownet")), FastFlowNet)


def test_others_may_read_what_is_saved(model, tmp_path):
    (tmp_path / "plain").touch()
    weights.save(model, tmp_path / "own.safetensors", HEADER)
    assert (tmp_path / "own.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names(tmp_path):
    assert 'did you mean "fastflownet"' in one_line(lambda: fleetflow.load("fastflownett"))
    assert "drop one" in one_line(lambda: fleetflow.load("fastflownet:x.pth", weights=False))
    with pytest.raises(FleetflowError, match="license"):
        weights.save(FastFlowNet(), tmp_path / "x.safetensors", {"network": "fastflownet"})


@pytest.mark.parametrize("path", sorted(weights.shipped("fastflownet").parent.iterdir()), ids=lambda path: path.stem)
def test_shipped_weights_say_what_they_are(path):
    header = weights.header(path)
    numbers = sum(value.numel() for value in fleetflow.load(path.stem).state_dict().values())
    assert path.stat().st_size <= 2 * numbers + 50_000 and header["network"] == path.stem  # float16
    wanted = {"network", "arguments", "recipe", "commit", "samples", "license", "scores"}
    assert wanted <= set(header), wanted - set(header)
    assert header["license"] == "Apache-2.0" and int(header["samples"]) > 0


def test_several_networks_in_one_name_are_refused():
    for name in ("fastflownet+deq_flow_tiny", "fastflownet:a.pth+raft_small"):
        with pytest.raises(FleetflowError, match="name one") as caught:
            fleetflow.load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FleetflowError, match=r"there is no file runs/a\+b.pth"):
        fleetflow.load("fastflownet:runs/a+b.pth")


def test_a_network_without_weights_of_ours_says_how_to_get_some():
    with pytest.raises(
        FleetflowError, match="no weights for lightflow; give a checkpoint as lightflow:PATH, train some"
    ):
        fleetflow.load("lightflow")
