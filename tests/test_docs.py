"""The guides are executed, and the site is built without a warning."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import lay_out_example

from fleetflow.cli import main as cli
from fleetflow.registry import models
from fleetflow.training import recipes

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the guides speak of."""
    lay_out_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide(guide, place, monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))  # one page adds to them, and to the networks
    models.names()
    monkeypatch.setattr(models, "_functions", dict(models._functions))
    page, names = guide.read_text(), {"__name__": guide.stem}
    for block in re.finditer(r"```(python|sh)\n(.*?)```", page, flags=re.S):
        if block[1] == "python":
            above = "\n" * page[: block.start(2)].count("\n")  # a traceback names the line of the page
            exec(compile(above + block[2], str(guide), "exec", dont_inherit=True), names)
            continue
        for line in block[2].splitlines():
            if line.startswith("fleetflow "):
                assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line


def test_the_site(tmp_path, capfd):
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="needs the docs extra")
    failed = sphinx.main(["-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)])
    assert not failed, capfd.readouterr().err[-3000:]
    assert (tmp_path / "index.html").exists()
