"""The Triton kernels: their checks in the interpreter and on a GPU, their compilation, and the switch to them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fleetflow.ops import kernels
from fleetflow.ops import triton as twins
from fleetflow.ops.all_pairs import all_pairs
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.warp import warp

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install triton")


def run(*command, interpret, **variables):
    """Runs Python in a process of its own: Triton decides at its import whether it interprets or compiles."""
    variables |= {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@needs_triton
def test_in_the_interpreter():
    assert "passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_checks.py", interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    assert "passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_checks.py", interpret=False)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_all_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    lines = run("triton_compile.py", "90", interpret=False, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len({tuple(line.split()[:2]) for line in lines}) == 3 + 2 + 3 + 3


def test_cuda_tensors_take_the_twin(monkeypatch):
    plain = local_correlation.__wrapped__
    monkeypatch.setattr(twins, "usable", lambda: False)
    assert kernels._twin(plain, "cuda") is None
    assert kernels._twin(plain, "cpu").__name__ == "fleetflow.ops.kernels.correlation"
    monkeypatch.setattr(twins, "usable", lambda: True)
    if find_spec("triton"):
        assert kernels._twin(plain, "cuda").__name__ == "fleetflow.ops.triton.correlation"
        assert not hasattr(kernels._twin(all_pairs.__wrapped__, "cuda"), "all_pairs"), "a product has no kernel of ours"


def test_triton_is_not_imported_on_the_cpu():
    code = (
        "import sys, torch; from fleetflow.ops.warp import warp; "
        "warp(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)); print('triton' in sys.modules)"
    )
    assert run("-c", code, interpret=False).strip() == "False"


def test_the_compiler_sees_through_the_switch():
    def network(a, b, flow):
        return local_correlation(a, warp(b, flow), 1, keep=(0, 4))

    tensors = torch.rand(1, 3, 4, 5), torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), network(*tensors))
