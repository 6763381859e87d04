"""Names of devices: those torch has here work, others say in one line what they need."""

import sys
import types

import pytest
import torch

from fleetflow.inference import device as job
from fleetflow.types import FleetflowError


def without(name: str) -> bool:
    return not job._has(name)


@pytest.mark.parametrize("name", job.NEEDS)
def test_an_accelerator_that_is_not_here_says_what_it_needs(name):
    if not without(name):
        pytest.skip(f"this machine has {name}")
    for place in (name, f"{name}:1"):
        with pytest.raises(FleetflowError, match=f'device "{place}" cannot be used .it needs') as caught:
            job.choose_device(place)
        assert job.NEEDS[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "meta", "npu0", "cpu:x", "", "vulkan"])
def test_a_name_that_is_none(name):
    with pytest.raises(FleetflowError, match='use "auto" or "cpu"') as caught:
        job.choose_device(name)
    assert "\n" not in str(caught.value)


def test_auto_takes_what_torch_has(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    assert job.choose_device() == torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert job.choose_device("auto") == torch.device("cpu") == job.choose_device("cpu")


def test_an_older_plugin_is_imported(monkeypatch):
    """torch_npu is what names the device "npu": its import comes before the name is looked at."""
    asked = []
    plugin = types.ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", plugin)
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(is_available=lambda: True), raising=False)
    monkeypatch.setattr(job.importlib, "import_module", lambda name: asked.append(name) or plugin)
    with pytest.raises(FleetflowError) as caught:
        job.choose_device("npu")
    assert asked == ["torch_npu"] and "it needs" not in str(caught.value), "it is here, so something else is wrong"


@pytest.mark.parametrize("count", [-1, 1025, 2**31, 10**30])
def test_numbers_of_threads_that_cannot_be(count):
    with pytest.raises(FleetflowError, match="from 1 to 1024"):
        job.use_threads(count)


@pytest.mark.parametrize(
    "amx, avx512_bf16, vendor, expected",
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(monkeypatch, amx, avx512_bf16, vendor, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(job, "_processor", lambda: f"processor: 0\nvendor_id: {vendor}")
    assert job.choose_dtype("auto", torch.device("cpu")) == expected
