"""docs/deq.md runs, from top to bottom."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import SLOW

import fleetflow.deq

PAGE = (Path(__file__).parents[1] / "docs" / "deq.md").read_text()


@pytest.mark.parametrize("threads", [1, 2] if SLOW else [1])
def test_the_tutorial(tmp_path, monkeypatch, capsys, threads):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(threads)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = PAGE if importlib.util.find_spec("matplotlib") else re.sub(r"(?m)^axes.*$", "", PAGE)
    blocks = list(re.finditer(r"```python\n(.*?)```", page, flags=re.S))
    assert len(blocks) >= 9
    names: dict = {"__name__": "tutorial"}
    with torch.random.fork_rng():
        for block in blocks:
            above = "\n" * page[: block.start(1)].count("\n")  # a traceback names the line of the page
            exec(compile(above + block[1], "docs/deq.md", "exec", dont_inherit=True), names)
    shown = capsys.readouterr().out
    assert re.search(r"Broyden +\[\d+, \d+, \d+, \d+\] evaluations, converged: \[True, True, True, True\]", shown)


def test_the_page_names_everything_public():
    assert [name for name in fleetflow.deq.__all__ if name not in PAGE] == ["Gradient", "Options"]
