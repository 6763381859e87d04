"""The examples behind the help of each command: two of each, their options exist, and those that are quick are run."""

import inspect
import shlex
import shutil
from importlib import resources
from pathlib import Path

import pytest
import tyro

from fleetflow.cli import main as cli
from fleetflow.io.images import read_image, write_image
from fleetflow.io.video import VideoWriter

QUICK = ("predict", "demo", "recipes")  # what the tests of the other commands run is not run here once more


def leaves(commands, words=()):
    for name, command in commands.items():
        if isinstance(command, cli.Group):
            for own, each in command.commands.items():  # the default one need not be named
                yield (*words, name) if own == command.default else (*words, name, own), each
        else:
            yield (*words, name), command


COMMANDS = dict(leaves(cli.COMMANDS))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_two_examples_that_the_parser_takes(words):
    lines = cli.examples(COMMANDS[words])
    assert len(lines) == 2
    command = COMMANDS[words]

    def parsed(*arguments, **named): ...

    parsed.__signature__ = inspect.signature(command)
    parsed.__annotations__ = command.__annotations__
    parsed.__doc__ = command.__doc__
    for line in lines:
        given = shlex.split(line.partition("|")[0])
        assert tuple(given[: len(words) + 1]) == ("fleetflow", *words)
        tyro.cli(parsed, args=given[len(words) + 1 :])


@pytest.mark.parametrize("name", QUICK)
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    example = Path(str(resources.files("fleetflow") / "example"))
    for k in (1, 2):
        shutil.copy(example / f"frame{k}.png", tmp_path)
    small = read_image(example / "frame1.png")[:96, :128]
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for k in range(3):
            writer.write(small[:, k : k + 120])
    write_image(tmp_path / "frames" / "1.png", small)
    monkeypatch.chdir(tmp_path)
    for line in cli.examples(COMMANDS[(name,)]):
        assert cli.main(shlex.split(line.partition("|")[0])[1:]) == 0, (line, capsys.readouterr().err)
