"""What runs have written into a folder: a hidden file beside their results, so that nothing else is ever replaced."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fleetflow.io.atomic import remove_leftovers, write_atomically, writing
from fleetflow.types import FleetflowError

NAME = ".fleetflow.jsonl"


class Note:
    """What runs into a folder were asked for and have done, a line of JSON for each addition.

    Files are kept apart by their source: what was written for one video is not replaced by the results of another, and
    a file that no run of ours has written is not replaced at all, unless `overwrite`.

    Attributes:
        facts: what a former run for the same source has noted, if it was for the same request; else nothing.
    """

    def __init__(self, folder: Path, source: str, request: dict, *, overwrite: bool = False):
        """Reads the note of a folder; a damaged line is ignored.

        Args:
            folder: of the results.
            source: what they are made of, such as the path of a video.
            request: all that they depend on; JSON must be able to hold it.
            overwrite: forget what was done, and replace what is in the way.
        """
        self.folder, self.source, self.overwrite = folder, source, overwrite
        self._owners: dict[str, str] = {}  # the source of each file, by its name in the folder
        self._known: dict[str, dict] = {}  # request and facts of each source
        self._rewritten = False
        path = folder / NAME
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # a killed run may have cut the last one
                self._read(json.loads(line))
        known = self._known.get(source, {})
        if overwrite or known.get("request") != request:
            known = self._known[source] = {"request": request, "facts": {}}
        self.facts = known["facts"]

    def _read(self, line: dict) -> None:
        source = line["source"]
        if "request" in line:
            self._known[source] = {"request": line["request"], "facts": {}}
        self._known[source]["facts"].update(line.get("facts", {}))
        inside = [name for name in line.get("files", ()) if not {"..", "/"} & set(PurePosixPath(name).parts)]
        self._owners.update(dict.fromkeys(inside, source))

    def add(self, facts: dict, files: Iterable[str] = ()) -> None:
        """Adds facts, and names of files that are written for this source from now on."""
        files = list(files)
        self.facts.update(facts)
        self._owners.update(dict.fromkeys(files, self.source))
        path = self.folder / NAME
        if not self._rewritten:  # once a run in full, without what has been superseded
            write_atomically(path, lambda temporary: temporary.write_text("".join(self._lines())))
            self._rewritten = True
            return
        with writing(path), path.open("a") as file:
            file.write(json.dumps({"source": self.source, "facts": facts, "files": files}) + "\n")

    def _lines(self) -> Iterable[str]:
        for source, known in self._known.items():
            files = [name for name, owner in self._owners.items() if owner == source]
            yield json.dumps({"source": source, **known, "files": files}) + "\n"

    def claim(self, paths: Iterable[Path]) -> None:
        """Notes that these files are going to be written for this source.

        Raises:
            FleetflowError: one is there and is not ours, or is a result of another source.
        """
        new = self.check(paths)
        if new:
            self.add({}, new)

    def check(self, paths: Iterable[Path]) -> list[str]:
        """Returns the names of those that are not noted for this source yet; raises as `claim` does."""
        new = []
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            owner = self._owners.get(name)
            if owner == self.source:
                continue
            if os.path.lexists(path) and not self.overwrite:
                whose = f"is a result of {owner}" if owner else "was not written by fleetflow"
                raise FleetflowError(
                    f"{path} {whose}, and that of {self.source} would replace it; choose another output, or replace it "
                    "with --overwrite"
                )
            new.append(name)
        return new

    def remove_folder(self, folder: Path) -> None:
        """Removes from a folder below what was written there for this source, and the folder if it is empty then."""
        if folder.is_symlink() or not folder.is_dir():
            return
        remove_leftovers(folder)
        below = f"{folder.name}/"
        ours = [name for name, owner in self._owners.items() if owner == self.source and name.startswith(below)]
        for name in ours:
            with suppress(OSError):
                (self.folder / name).unlink()
            del self._owners[name]
        if ours:
            self._rewritten = False
            self.add({})
        with suppress(OSError):
            folder.rmdir()
