"""The files that a command is to write, looked at before the work begins."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fleetflow.io.atomic import remove_leftovers, writing
from fleetflow.types import FleetflowError

# How a table or report that one of our commands wrote begins, and what is at the beginning of a page or picture.
BEGINS = re.compile(
    rb'\{\n "model": .*,\n "dataset": .*,\n "protocol": \{|set,pair,pixels,.*,model,dataset,protocol\r?\n'
    rb'|\{"network": ".*", "weights": ".*", "(sha256|device)": "|\{"dataset": ".*", "pairs": \d+, "machine": \{'
)
HOLDS = (b'<meta name="generator" content="fleetflow">', b"Software\0fleetflow")


def make_room(*files: Path | None, inputs: Iterable[Path] = (), folders: Iterable[Path | None] = ()) -> None:
    """Makes the folders of files that are to be written, and removes what killed runs left in them.

    Args:
        files: to be written.
        inputs: to be read, which none of them may replace.
        folders: to be read, too; what lies below them is not replaced, unless it is a report of ours.

    Raises:
        FleetflowError: now where a job would at its end.
    """
    given = [file for file in files if file is not None]
    read = {os.path.realpath(path) for path in inputs}
    below = [Path(os.path.realpath(folder)) for folder in folders if folder is not None]
    for file in given:
        place = Path(os.path.realpath(file))
        if place.is_file() and any(folder in place.parents for folder in below) and not is_report(place):
            raise FleetflowError(
                f"{file} lies where this command reads, and is no report of ours; choose another output"
            )
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


def file_of(model: str) -> Path:
    """Returns the file in NETWORK:FILE, or in FILE by itself; of a name alone a path where nothing is."""
    return Path(os.path.expanduser(model.partition(":")[2] or model))


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours, or empty."""
    with path.open("rb") as file:
        begin = file.read(4096)
    return not begin or BEGINS.match(begin) is not None or any(mark in begin for mark in HOLDS)
