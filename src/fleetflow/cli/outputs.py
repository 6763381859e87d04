"""The files that a command is to write, looked at before the work begins."""

import os
from collections.abc import Iterable
from pathlib import Path

from fleetflow.io.atomic import remove_leftovers, writing
from fleetflow.types import FleetflowError


def make_room(*files: Path | None, inputs: Iterable[Path] = ()) -> None:
    """Makes the folders of files that are to be written, and removes what killed runs left in them.

    Args:
        files: to be written.
        inputs: to be read, which none of them may replace.

    Raises:
        FleetflowError: now where a job would at its end.
    """
    given = [file for file in files if file is not None]
    read = {os.path.realpath(path) for path in inputs}
    for file in given:
        if os.path.realpath(file) in read:
            raise FleetflowError(f"{file} is read by this command, which would replace it; choose another output")
        if file.is_dir():
            raise FleetflowError(f"{file} is a folder; name a file in it")
        if [os.path.realpath(other) for other in given].count(os.path.realpath(file)) > 1:
            raise FleetflowError(f"{file} is named for two outputs; give each a file of its own")
    for file in given:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent)
