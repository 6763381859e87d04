"""Checkpoints: ours, published ones, damaged ones, those of other networks, and those with code in them."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLOW
from test_liteflownet2 import as_released

import fleetflow
from fleetflow.evaluation.baselines import method
from fleetflow.evaluation.saved_flows import is_folder
from fleetflow.evaluation.submit import is_finished
from fleetflow.export.write import export, license_of
from fleetflow.inference.exported import is_exported
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.models.lightflow import LightFlow
from fleetflow.models.spec import ModelSpec
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
    checksum = weights.checksum(model.state_dict())
    assert weights.header(path) == {
        "network": "fastflownet",
        "license": "Apache-2.0",
        "samples": "3",
        "sha256": checksum,
    }
    assert [file.name for file in path.parent.glob("*.safetensors")] == ["own.safetensors"], "no temporary file is left"


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


def test_a_module_saved_as_a_whole(model, tmp_path):
    torch.save({"net": torch.nn.DataParallel(model), "epoch": 3}, tmp_path / "whole.pth")
    loaded = fleetflow.load(f"fastflownet:{tmp_path / 'whole.pth'}")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


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


def test_a_checkpoint_is_known_by_its_bytes(model, tmp_path):
    weights.save(model, tmp_path / "ours.safetensors", HEADER)
    (tmp_path / "ours.safetensors").rename(tmp_path / "ours.pth")
    torch.save(model.state_dict(), tmp_path / "torchs.safetensors")
    for name in ("fastflownet:ours.pth", "ours.pth", "fastflownet:torchs.safetensors"):
        network, colon, path = name.rpartition(":")
        assert fleetflow.load(f"{network}{colon}{tmp_path / path}") is not None


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
    (tmp_path / "parts.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "join them" in one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'parts.safetensors.index.json'}"))
    assert "no file" in one_line(lambda: fleetflow.load("fastflownet:~nobody-is-called-so/weights.pth"))
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
    for suffix in ("pth", "pth.tar"):
        bare = tmp_path / f"raft.{suffix}"
        torch.save(model.state_dict(), bare)
        for name in (bare, str(bare)):
            with pytest.warns(UserWarning, match=r"raft\.pth.* is read as fastflownet"):
                assert isinstance(fleetflow.load(name), FastFlowNet)
    torch.save({"a": torch.zeros(3)}, bare)
    message = one_line(lambda: fleetflow.load(bare))
    assert message == f"{bare} does not name its network; call it as NETWORK:{bare}"
    assert isinstance(fleetflow.load(f"fastflownet:{tmp_path / 'raft.pth'}"), FastFlowNet)
    assert isinstance(fleetflow.load(Path("fastflownet")), FastFlowNet)


def test_others_may_read_what_is_saved(model, tmp_path):
    (tmp_path / "plain").touch()
    weights.save(model, tmp_path / "own.safetensors", HEADER)
    assert (tmp_path / "own.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names(tmp_path):
    assert 'did you mean "fastflownet"' in one_line(lambda: fleetflow.load("fastflownett"))
    (tmp_path / "x.pth").touch()
    assert "drop one" in one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'x.pth'}", weights=False))
    with pytest.raises(FleetflowError, match="license"):
        weights.save(FastFlowNet(), tmp_path / "x.safetensors", {"network": "fastflownet"})


@pytest.mark.parametrize(
    "path", sorted(weights.shipped("fastflownet").parent.glob("*.safetensors")), ids=lambda path: path.stem
)
def test_shipped_weights_say_what_they_are(path):
    header = weights.header(path)
    numbers = sum(value.numel() for value in fleetflow.load(path.stem).state_dict().values())
    assert path.stat().st_size <= 2 * numbers + 50_000 and header["network"] == path.stem  # float16
    wanted = {"network", "arguments", "recipe", "commit", "samples", "license", "scores", "sha256"}
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


def in_wrappings(state: dict) -> dict[str, object]:
    """One state dictionary as frameworks store it."""
    module = {f"module.{key}": value for key, value in state.items()}
    lightning = {f"model.{key}": value for key, value in state.items()}
    noise = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}
    return {
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
        "compiled, parallel": {f"module._orig_mod.{key}": value for key, value in state.items()},
        "compiled in part": {key.replace("decoder2.", "decoder2._orig_mod."): value for key, value in state.items()},
        "averaged": {**module, "n_averaged": torch.tensor(7)},
        "fsdp": {f"_fsdp_wrapped_module.{key}": value for key, value in state.items()},
        "fsdp of layers": {key.replace("decoder2.", "decoder2._fsdp_wrapped_module."): v for key, v in state.items()},
        "layers that save memory": {
            key.replace("decoder2.", "decoder2._checkpoint_wrapped_module._orig_mod."): v for key, v in state.items()
        },
        "deepspeed": {"module": module, "ds_config": {"bf16": {"enabled": True}}, "optimizer": None},
        "with its epoch": (state, 5),
        "lightning": {"state_dict": lightning, "epoch": 3, "hyper_parameters": {"folder": Path("x")}},
        "lightning with a loss": {"state_dict": {**lightning, "loss.weight": torch.ones(3)}},
        "lightning, compiled": {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        "nested": {"epoch": 1, "model_state_dict": state},
        "nested twice": {"epoch": 1, "weights": {"net": state}},
        "beside its average": {"model_ema": noise, "model": state},
        "the average alone": {"ema": {"module": state}},
        "beside an optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.rand(5)}}}, "model": state},
        "a path beside": {"state_dict": state, "folder": Path("x")},
        "an unknown class beside": {"state_dict": state, "args": Trap()},
        "a number beside": {**state, "epoch": 5},
        "parameters": {key: torch.nn.Parameter(value, value.is_floating_point()) for key, value in state.items()},
        "half": {key: value.half() for key, value in state.items()},
    }


@pytest.mark.parametrize("old", [False, True])
def test_common_wrappings_are_read_and_nothing_is_executed(model, tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    for name, content in in_wrappings(model.state_dict()).items():
        if old and not SLOW and name not in ("lightning", "nested twice", "parameters", "an unknown class beside"):
            continue
        torch.save(content, "wrapped.pth", _use_new_zipfile_serialization=not old)
        loaded = fleetflow.load("fastflownet:wrapped.pth").state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(loaded[key], value, msg=f"{name}: {key}", rtol=1e-3, atol=1e-3)
    assert not (tmp_path / "trap_was_sprung").exists()


def test_averages_without_names(model, tmp_path):
    """As torch_ema keeps them: their order is that of the parameters, but nothing says of which network."""
    torch.save({"decay": 0.9, "shadow_params": list(model.parameters())}, tmp_path / "ema.pth")
    with pytest.raises(FleetflowError, match="its tensors have an order, but no names"):
        fleetflow.load(f"fastflownet:{tmp_path / 'ema.pth'}")


def test_counters_of_old_files_may_be_missing(tmp_path):
    network = LightFlow(0.5)
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert fleetflow.load(f"lightflow_050:{tmp_path / 'old.pth'}").state_dict().keys() == network.state_dict().keys()


def test_tensors_that_the_file_cannot_hold_are_refused_before_memory_is_taken(tmp_path):
    path, one = tmp_path / "tiny.pth", torch.zeros(1, dtype=torch.half)
    for old in (False, True):
        for content in (
            {"a": one.as_strided((2**32,), (0,))},
            {"a": one.as_strided((2**20, 2**20, 2**20), (0, 0, 0))},
            {f"a{k}": torch.zeros(2**14).as_strided((2**14,), (1,)) for k in range(2)}
            | {f"b{k}": torch.zeros(1).as_strided((2**13,), (0,)) for k in range(200)},
        ):
            torch.save(content, path, _use_new_zipfile_serialization=not old)
            message = one_line(lambda: fleetflow.load(f"fastflownet:{path}"))
            assert "cannot hold" in message
    torch.save({"a": torch.arange(8.0)}, path)
    data = path.read_bytes()
    for shape in (b"K\x08", b"M\xff\xff"):
        path.write_bytes(data.replace(b"K\x08\x85", shape + b"\x85"))
        one_line(lambda: fleetflow.load(f"fastflownet:{path}"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_flipped_bit_is_found(model, tmp_path, suffix):
    path = tmp_path / f"flipped.{suffix}"
    torch.save(model.state_dict(), path) if suffix == "pth" else weights.save(model, path, HEADER)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for place in generator.integers(len(data) // 2, len(data) - 40_000, 5):
        data[place] ^= 4
        path.write_bytes(data)
        one_line(lambda: fleetflow.load(f"fastflownet:{path}"))
        data[place] ^= 4
    path.write_bytes(data)
    assert fleetflow.load(f"fastflownet:{path}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(model, tmp_path, value):
    state = {**model.state_dict(), "decoder2.conv7.bias": torch.tensor([0.0, value])}
    torch.save(state, tmp_path / "nan.pth")
    message = one_line(lambda: fleetflow.load(f"fastflownet:{tmp_path / 'nan.pth'}"))
    assert "decoder2.conv7.bias has values that are not finite" in message


def test_specifications(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a+b.pth", "c.onnx"):
        (tmp_path / name).touch()
    parse = ModelSpec.parse
    assert parse("raft_small") == ModelSpec("raft_small") == parse(Path("raft_small"))
    assert parse("raft_small:~/a+b.pth") == ModelSpec("raft_small", tmp_path / "a+b.pth")
    assert parse("~/a+b.pth") == ModelSpec(path=tmp_path / "a+b.pth")
    assert parse("~/c.onnx").exported and not parse("~/a+b.pth").exported
    assert str(parse("raft_small:~/a+b.pth")) == f"raft_small:{tmp_path / 'a+b.pth'}"
    for text, words in (
        ("raft_smal", 'did you mean "raft_small"'),
        ("raft_smal:~/a+b.pth", 'did you mean "raft_small"'),
        ("raft_small:", "ends with a colon"),
        ("raft_small:nowhere.pth", "there is no file nowhere.pth"),
        ("nowhere.pth", "there is no file nowhere.pth"),
        ("raft_small:~", "is a folder"),
    ):
        assert words in one_line(lambda: parse(text))  # noqa: B023


def test_a_name_that_is_not_utf8_in_the_header(model, tmp_path):
    """As that of the clip that a network was adapted to: its training is not lost in the end."""
    weights.save(model, tmp_path / "a.safetensors", {**HEADER, "license": "of b\udcff.mp4", "start": ["\udcff"]})
    assert weights.header(tmp_path / "a.safetensors")["license"] == "of b\\xff.mp4"


def test_names_that_libraries_cannot_open(model, tmp_path):
    """Bytes that are not UTF-8 reach Python as half a character, which no library for files in C++ takes."""
    odd = tmp_path / "b\udcff"
    weights.save(model, odd / "a.safetensors", {**HEADER, "license": "CC0"})
    for call in (
        lambda: weights.load(odd / "a.safetensors"),
        lambda: export(model, odd / "a.onnx", network="fastflownet"),
        lambda: fleetflow.Session(odd / "a.onnx"),
    ):
        assert "is no name in UTF-8" in one_line(call)


def test_what_has_no_license_says_so_in_one_line(model):
    """A network without weights in the package, and the network itself in place of its name."""
    assert license_of("fastflownet", model) == "Apache-2.0"
    assert "no weights for gma" in one_line(lambda: license_of("gma", model))
    assert "the name is a FastFlowNet" in one_line(lambda: license_of(model, model))


def test_the_home_folder_in_whatever_stands_for_a_network(model, tmp_path, monkeypatch):
    """A shell leaves --model=~/file as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    weights.save(model, tmp_path / "own.safetensors", {**HEADER, "license": "CC0"})
    (tmp_path / "zero.py").write_text("import numpy\ndef predict(a, b):\n    return numpy.zeros((*a.shape[:2], 2))\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "parity.json").touch()
    assert license_of("fastflownet:~/own.safetensors", model) == license_of("~/own.safetensors", model) == "CC0"
    assert weights.header("~/own.safetensors")["license"] == "CC0"
    assert method("~/zero.py").file == tmp_path / "zero.py"
    assert is_folder("~/parts", ()) and is_finished("~/parts", ()) and is_exported("~/parts")
    assert str(tmp_path / "no.onnx") in one_line(lambda: fleetflow.Predictor("~/no.onnx"))
