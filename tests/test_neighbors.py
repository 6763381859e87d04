"""Threads that wait do not spin for long: set before torch starts, unless the user has decided."""

import os
import subprocess
import sys

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHOW = "import os; print(*[os.environ.get(name) for name in {names}])"


def seen(code, **environment):
    own = {name: value for name, value in os.environ.items() if name not in NAMES} | environment
    code = f"{code}; {SHOW.format(names=NAMES)}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=own, check=True
    ).stdout.split()


def test_it_is_set_before_torch():
    assert seen("import fleetflow, sys; assert 'torch' not in sys.modules") == ["None", "3000", "1"]
    assert seen("import fleetflow.cli.main, sys; assert 'torch' not in sys.modules") == ["None", "3000", "1"]


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_the_user_decides(name, value):
    expected = [value if other == name else "None" for other in NAMES]
    assert seen("import fleetflow", **{name: value}) == expected


def test_after_torch_it_is_too_late():
    assert seen("import sys; sys.modules['torch'] = sys; import fleetflow") == ["None"] * 3
