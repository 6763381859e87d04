"""Checkpoints: ours, published ones, damaged ones, those of other networks, and those with code in them."""

import os
import pickle

import pytest
import torch

import fleetflow
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.types import FleetflowError

HEADER = {"network": "fastflownet", "licence": "Apache-2.0", "samples": 3}


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
    assert weights.header(path) == {"network": "fastflownet", "licence": "Apache-2.0", "samples": "3"}
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
    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "no state dictionary" in one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'list.pth'}"))


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


def test_names(tmp_path):
    assert 'did you mean "fastflownet"' in one_line(lambda: fleetflow.load("fastflownett"))
    assert "drop one" in one_line(lambda: fleetflow.load("fastflownet:x.pth", weights=False))
    with pytest.raises(FleetflowError, match="licence"):
        weights.save(FastFlowNet(), tmp_path / "x.safetensors", {"network": "fastflownet"})


def test_shipped_weights_say_what_they_are():
    path = weights.shipped("fastflownet")
    header = weights.header(path)
    assert path.stat().st_size <= 3_000_000
    wanted = {"network", "arguments", "recipe", "commit", "samples", "licence", "scores"}
    assert wanted <= set(header), wanted - set(header)
    assert header["licence"] == "Apache-2.0" and int(header["samples"]) > 0
