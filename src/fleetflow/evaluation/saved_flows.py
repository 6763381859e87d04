"""Flow files that were saved before, by us or by another program, in the place of a network."""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from fleetflow.data.dataset import Files, Pair
from fleetflow.io.flow import FORMATS, read_flow
from fleetflow.types import FleetflowError

OTHERS = (
    "_color.png",
    "_side.png",
    "_backward.flo",
    "_occlusion.png",
    "_uncertainty.png",
)  # beside the flows, as `fleetflow predict` names them
Key = tuple[str, ...]  # the end of a path in parts, without suffix


class SavedFlows(NamedTuple):
    """The flow files of a folder that belong to pairs of a data set."""

    folder: Path
    files: Files  # the pairs that have a flow, in their order
    flows: list[Path]  # of each of them
    lacking: list[str]  # pairs without a flow, GROUP/NAME
    unused: int  # flow files that belong to no pair

    def __call__(self, k: int) -> np.ndarray:
        """Returns the flow of pair k of `files`, float32 [H, W, 2]; not-a-number where the file says it is unknown."""
        flow, valid = read_flow(self.flows[k])
        flow[~valid] = np.nan
        return flow

    @property
    def name(self) -> str:
        """What tables and protocols call it."""
        return f"flow files of {self.folder} ({self._share()} pairs)"

    def _share(self) -> str:
        return f"{len(self.flows)} of {len(self.flows) + len(self.lacking)}"

    def summary(self) -> list[str]:
        """Returns in lines which file is taken for which pair, and what is left over on either side."""
        first = self.files.pairs[0]
        lines = [
            f"{self._share()} pairs have a flow in {self.folder}; the first is "
            f"{self.flows[0].relative_to(self.folder)} for {first.group}/{first.name}"
        ]
        if self.lacking:
            more = f" and {len(self.lacking) - 3} more" if len(self.lacking) > 3 else ""
            lines.append(f"warning: not measured, as they have none: {', '.join(self.lacking[:3])}{more}")
        if self.unused:
            lines.append(f"{self.unused} flow files there belong to no pair")
        return lines


def is_folder(model: str, known: Collection[str]) -> bool:
    """Returns True for the path of a folder in the place of a network, or of one of the `known` names.

    Raises:
        FleetflowError: For a zip, and for what can only be a path and does not exist.
    """
    path = Path(os.path.expanduser(model))
    if model in known or path.is_dir():
        return model not in known
    if path.suffix == ".zip":
        raise FleetflowError(f"{model} is no folder; unpack it and give the folder of its flow files")
    if ":" not in model and path.suffix == "" and path.name != model and not path.exists():
        raise FleetflowError(f"{model} does not exist; give a network, or a folder of saved flow files")
    return False


def saved_flows(folder: Path, files: Files) -> SavedFlows:
    """Returns the flows below a folder that belong to the pairs.

    The path of a flow ends as one of these, in any of `io.flow.FORMATS`: GROUP/NAME or NAME of the pair; the path of
    its first frame, or the end of it, as `fleetflow predict` names flows; or the name that `fleetflow submit` gives it.
    One of them is taken for all pairs: that under which the most have a flow. Of one flow in two formats that with
    more digits is taken.

    Raises:
        FleetflowError: no pair has a flow, or one has flows in several folders.
    """
    every = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS and _is_flow(path, folder))
    ends: dict[Key, list[Path]] = {}
    for path in every:
        parts = _key(path.relative_to(folder))
        for start in range(len(parts)):
            ends.setdefault(parts[start:], []).append(path)
    best: dict[int, Key] = {}
    for naming in NAMINGS:
        keys = [naming(pair) for pair in files.pairs]
        found = {k: key for k, key in enumerate(keys) if key in ends}
        if len(set(keys)) == len(keys) and len(found) > len(best):
            best = found
    if not best:
        names = f"{len(every)} flow files" + (f", such as {every[0].relative_to(folder)}," if every else "")
        expected = " or ".join(dict.fromkeys("/".join(naming(files.pairs[0])) for naming in NAMINGS[:3]))
        raise FleetflowError(f"{folder} holds {names} and none for a pair of the data set; expected {expected}.flo ...")
    flows = {k: _only(files.pairs[k], ends[key], key, folder) for k, key in best.items()}
    taken = {path for k, key in best.items() for path in ends[key]}
    pairs = [files.pairs[k] for k in flows]
    lacking = [f"{pair.group}/{pair.name}" for k, pair in enumerate(files.pairs) if k not in flows]
    kept = Files(pairs, files.left_out, files.about)
    return SavedFlows(folder, kept, list(flows.values()), lacking, len(every) - len(taken))


def _is_flow(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and not hidden and not path.name.endswith(OTHERS)


def _key(path: PurePath) -> Key:
    """The parts of a path without its suffix and what programs add to a name: frame_0001_kitti.png -> frame0001."""
    stem = re.sub(r"_(kitti|flow)$", "", path.stem)
    return (*path.parts[:-1], re.sub(r"^frame_(?=\d)", "frame", stem))


def _official(pair: Pair) -> Key:
    """The name of Spring: 0001/flow_FW_left/flow_FW_left_0001, from the frame 0001/frame_left/frame_left_0001."""
    *_, scene, side, first = pair.frame1.with_suffix("").parts[-3:]
    way = "FW" if pair.frame1 < pair.frame2 else "BW"
    return (scene, *(part.replace("frame_", f"flow_{way}_") for part in (side, first)))


def _frame(count: int) -> Callable[[Pair], Key]:
    """The last parts of the path of the first frame."""
    return lambda pair: _key(PurePath(*pair.frame1.parts[-count:]))


# Ways in which a file may be named after its pair, those that say more first.
NAMINGS: tuple[Callable[[Pair], Key], ...] = (
    lambda pair: _key(PurePath(pair.group, f"{pair.name}.x")),
    lambda pair: _key(PurePath(f"{pair.name}.x")),
    lambda pair: _key(PurePath(pair.group.rpartition("/")[2], f"{pair.name}.x")),
    lambda pair: _official(pair) if len(pair.frame1.parts) > 2 else (),
    *(_frame(count) for count in (4, 3, 2, 1)),
)


def _only(pair: Pair, found: list[Path], key: Key, folder: Path) -> Path:
    """The file for a pair among those whose path ends with its key; raises FleetflowError for two in two folders."""
    exact = [path for path in found if _key(path.relative_to(folder)) == key] or found
    if len({path.parent for path in exact}) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in exact[:2])
        raise FleetflowError(f"{folder} holds {names} for {pair.group}/{pair.name}; name the folder of one method")
    order = (".flo", ".flo5", ".npy", ".npz", ".pfm", ".png")  # the last keeps 1/64 pixel
    return min(exact, key=lambda path: order.index(path.suffix.lower()))
