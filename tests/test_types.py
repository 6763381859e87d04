"""The types of the package, as a type checker in basic mode sees them (`[tool.pyright]` in pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_type_checker_finds_nothing():
    """basedpyright is pyright with its Node.js in the wheel: nothing is fetched when it runs."""
    pytest.importorskip("basedpyright", reason="basedpyright, the type checker, is not installed")
    command = [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable]
    run = subprocess.run([*command, "--project", str(ROOT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
