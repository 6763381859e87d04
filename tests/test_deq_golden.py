"""The solvers against the recorded runs of the published ones (deq-flow v1 and v2) on f(x) = tanh(x W^T + b).

Where a run is compared, the mathematics is the same: Picard is v2's naive_solver, Broyden is broyden, and Anderson with
an absolute ridge is anderson. What differs is bookkeeping, and is undone here: the published solvers stop the whole
batch at once (so we run a fixed number of steps), v2's anderson and naive_solver return f of the best point, v1 records
one residual for the batch, and the first residuals of anderson are not recorded.
Not reproduced: `return_final=False` of naive_solver, which returns the start (a slip).
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from fleetflow.deq import Anderson, Broyden, Picard, fixed_point

PUBLISHED = {
    "anderson": Anderson(ridge=1e-4, scaled=False, restart=torch.inf),
    "broyden": Broyden(),
    "naive_solver": Picard(),
}
RUNS = [
    f"{version}_{name}_t{steps}_{mode}"
    for version, names in (("v1", ("anderson", "broyden")), ("v2", tuple(PUBLISHED)))
    for name in names
    for steps in (3, 8, 30)
    for mode in ("abs", "rel")
]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "deq_solvers.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta_json"}
        return arrays, json.loads(str(file["meta_json"]))["runs"]


def the_map(arrays):
    return lambda x: torch.tanh(x @ arrays["W"].T + arrays["b"])


@pytest.mark.parametrize("run", RUNS)
def test_values_and_traces(golden, run):
    arrays, runs = golden
    version, name = run.split("_")[:2]
    name = "naive_solver" if name == "naive" else name
    relative, f = run.endswith("rel"), the_map(arrays)
    steps = int(np.max(runs[run]["nstep"]))  # v2's anderson counts from 1, all others from 0
    steps += (version, name) != ("v2", "anderson")
    solution = fixed_point(f, arrays["x0"], PUBLISHED[name], tolerance=0, max_steps=steps, relative=relative)
    value = f(solution.value) if (version, name) == ("v2", "anderson") else solution.value
    # runs to 1e-6 end in the rounding noise of float32, where the last iterate is one of many
    assert (value - arrays[run]).abs().max() < (1e-5 if run.endswith("t30_rel") else 1e-6)

    trace = arrays[f"{run}_{run[-3:]}_trace"]
    trace = trace if version == "v1" else trace[1:]  # v2 begins with a placeholder
    skipped = {"anderson": 2, "broyden": 1, "naive_solver": 0}[name]
    own = solution.trace[skipped:] if name != "naive_solver" else solution.trace[:-1]
    if version == "v1" and name == "anderson":
        own = own.mean(1)
    elif version == "v1" and not relative:
        own = own.square().sum(1).sqrt()
    elif version == "v1":
        return  # one ratio of two norms over the whole batch: not a mean of ours
    size = min(len(own), len(trace))
    assert size >= 1 and torch.allclose(own[:size], trace[:size], rtol=1e-3, atol=3e-6 if relative else 1e-5)


@pytest.mark.parametrize(
    "run", sorted({f"{run.rsplit('_', 2)[0]}_t{steps}_abs_idx" for run in RUNS for steps in (8, 30)})
)
def test_kept_iterates_are_the_published_trajectory(golden, run):
    """`indexing=(4, 8)` of the published code; they leave out what an early stop did not reach, we return the last."""
    arrays, _ = golden
    version, name = run.split("_")[:2]
    name, f = "naive_solver" if name == "naive" else name, the_map(arrays)
    solution = fixed_point(f, arrays["x0"], PUBLISHED[name], tolerance=0, max_steps=8, relative=False, keep=(4, 8))
    for kept, recorded in zip(solution.kept, arrays[f"{run}_indexing"]):
        kept = f(kept) if version == "v2" and name != "broyden" else kept
        assert (kept - recorded).abs().max() < 1e-6


def test_the_line_search_run_is_plain_broyden(golden):
    """All steps of that run pass the search at full length, which is why we offer none."""
    arrays, _ = golden
    solution = fixed_point(the_map(arrays), arrays["x0"], Broyden(), tolerance=0, max_steps=13, relative=False)
    assert (solution.value - arrays["v2_broyden_ls_t12"]).abs().max() < 1e-6
    assert torch.allclose(solution.trace[1:], arrays["v2_broyden_ls_t12_abs_trace"][1:], rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class UndampedStart:
    """A solver whose first step is a whole one: the published anderson damps only from the second step on."""

    inner: Anderson

    def start(self, z):
        return (self.inner.start(z), True)

    def propose(self, z, fz, memory):
        inner, first = memory
        point, inner = self.inner.propose(z, fz, inner)
        return (fz if first else point), (inner, False)


def test_damped_anderson(golden):
    """Ours damps the first step as well, as Walker and Ni do; with that undone it is the published run."""
    arrays, _ = golden
    f, solver = the_map(arrays), Anderson(history=4, damping=0.7, ridge=1e-3, scaled=False, restart=torch.inf)
    options = {"tolerance": 0, "max_steps": 12, "relative": False}
    solution = fixed_point(f, arrays["x0"], UndampedStart(solver), **options)
    assert (f(solution.value) - arrays["v2_anderson_m4_beta07_lam1e3_t12"]).abs().max() < 1e-6
    assert fixed_point(f, arrays["x0"], solver, **options).residual.max() < 2 * solution.residual.max()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()])
def test_ours_is_no_slower_than_the_published_anderson(golden, solver):
    arrays, _ = golden
    steps = [
        fixed_point(the_map(arrays), arrays["x0"], one, tolerance=1e-6, max_steps=60).steps
        for one in (solver, PUBLISHED["anderson"])
    ]
    assert (2 * steps[0] <= steps[1]).all(), steps
