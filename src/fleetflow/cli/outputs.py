"""The files that a command is to write, looked at before the work begins."""

import os
from pathlib import Path

from fleetflow.io.atomic import remove_leftovers, writing
from fleetflow.types import FleetflowError


def make_room(*files: Path | None) -> None:
    """Makes the folders of files that are to be written, and removes what killed runs left in them.

    Raises:
        FleetflowError: now where a job would at its end.
    """
    given = [file for file in files if file is not None]
    for file in given:
        if file.is_dir():
            raise FleetflowError(f"{file} is a folder; name a file in it")
        if [os.path.realpath(other) for other in given].count(os.path.realpath(file)) > 1:
            raise FleetflowError(f"{file} is named for two outputs; give each a file of its own")
    for file in given:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent)
