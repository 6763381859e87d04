"""Every family gives the flows of its official implementation, in a fresh clone: no reference data is needed."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from fleetflow.models.deq_flow import own_names
from fleetflow.registry import models

sys.path.insert(0, str(GOLDEN))

from collect import CASES, STEP  # noqa: E402
from fill import fill_module, make_pair, make_state  # noqa: E402

FLOWS = np.load(GOLDEN / "flows.npz")
NAMES = json.loads((GOLDEN / "names.json").read_text())
BAR = 1e-3  # pixels; the official float32 is up to 6e-5 from its own float64


def filled(network: str, rule: str) -> torch.nn.Module:
    """The network with the weights that the rule of fill.py gives it."""
    model = models[network]()
    if rule not in NAMES:
        return fill_module(model, rule).eval()
    state = own_names({name: torch.from_numpy(value) for name, value in make_state(NAMES[rule], rule).items()})
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(counters | state)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_the_official_flow(case):
    network, rule, iterations = CASES[case]
    images = make_pair(131, 187, seed=2) if case.endswith("odd") else make_pair(128, 192)
    frames = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in images[:2]]
    with torch.no_grad():
        flow = filled(network, rule)(*frames, iterations=iterations).flow
    found = flow[0].permute(1, 2, 0)[::STEP, ::STEP].numpy()
    assert found.shape == FLOWS[case].shape
    assert np.abs(found - FLOWS[case]).max() < BAR


def test_every_family_has_a_case():
    families = {models[network].__module__.rpartition(".")[2] for network, *_ in CASES.values()}
    every = {models[name].__module__.rpartition(".")[2] for name in models}
    missing = every - OURS - families
    assert not missing, "add a case to golden/collect.py, or to OURS what has no official implementation"
    assert families <= every


OURS = {"fastflownet_refine"}  # families without an official implementation: ours
