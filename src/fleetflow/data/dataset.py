"""Pairs on disk as samples. A data set is a function of this package that returns `Files`."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fleetflow.io.images import read_image, read_mask
from fleetflow.registry import Registry, unknown
from fleetflow.types import FleetflowError, Sample, size_of

datasets = Registry("data set", "fleetflow.data.datasets")

Truth = Callable[[], tuple[np.ndarray, np.ndarray]]  # flow float32 [H, W, 2] pixels, valid bool [H, W]


class Pair(NamedTuple):
    """Where one example lies and how its truth is read. Nothing is read before it is asked for.

    truth is None where it is kept back (test sets). masks returns bool [H, W] under some of these keys, each over the
    pixels of frame1, as far as the set has them:
        "occluded"    frame2 does not show the pixel
        "noc"         the flow is known and the pixel is not occluded (KITTI)
        "foreground"  on a moving object (KITTI 2015); known pixels elsewhere are background
        "invalid"     the set advises to leave the pixel out of scores (Sintel)
    """

    group: str  # what scores are averaged over: the set, and its version where it has several
    name: str  # scene/frame; pairs of a scene follow each other in time
    frame1: Path
    frame2: Path
    truth: Truth | None
    backward: Truth | None = None  # flow from frame2 to frame1
    masks: Callable[[], dict[str, np.ndarray]] | None = None
    truths: Truth | None = None  # all true vectors, [K, H, W, 2], where a pixel has several; valid where all are known
    made: Callable[[], Sample] | None = None  # the complete sample where a pair is generated, and its paths no files


class Files(Dataset):
    """A list of pairs; item k is the Sample of pair k, read when it is asked for.

    Args:
        left_out: names of pairs it lacks.
        about: how the pairs were made, for protocols, where they were not read.
    """

    def __init__(self, pairs: list[Pair], left_out: tuple[str, ...] = (), about: str = ""):
        self.pairs, self.left_out, self.about = pairs, left_out, about

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Sample:
        """Returns frames, flow and valid, which is False everywhere in a pair without truth.

        Raises:
            FleetflowError: For unreadable files and for frames and truth that differ in size.
        """
        pair = self.pairs[k]
        if pair.made:
            return Sample(*pair.made()[:4])
        frame1, frame2 = (to_frame(read_image(path)) for path in (pair.frame1, pair.frame2))
        height, width = size_of(frame1)
        flow, valid = pair.truth() if pair.truth else _unknown(height, width)
        _same_size(pair, {(height, width), size_of(frame2), flow.shape[:2]})
        return Sample(frame1, frame2, torch.from_numpy(flow).permute(2, 0, 1), torch.from_numpy(valid))

    def complete(self, k: int) -> Sample:
        """Returns the sample with its backward flow (0 where unknown) and its occlusion, where the set has them."""
        pair = self.pairs[k]
        if pair.made:
            return pair.made()
        sample = self[k]
        if pair.backward:
            flow, _ = pair.backward()
            _same_size(pair, {size_of(sample.valid), flow.shape[:2]})
            sample = sample._replace(backward=torch.from_numpy(flow).permute(2, 0, 1))
        occluded = self.masks(k).get("occluded")
        return sample if occluded is None else sample._replace(occluded=torch.from_numpy(occluded))

    def judged(self, k: int) -> Sample:
        """Returns the sample as scores want it: with all true vectors of a pixel where the set has several (Spring)."""
        pair, sample = self.pairs[k], self[k]
        if pair.truths is None:
            return sample
        truths, valid = (torch.from_numpy(array) for array in pair.truths())
        _same_size(pair, {size_of(sample.valid), size_of(valid)})
        flow = torch.where(valid, sample.flow, 0)
        return sample._replace(flow=flow, valid=valid, truths=truths.permute(0, 3, 1, 2))

    def masks(self, k: int) -> dict[str, np.ndarray]:
        """Returns the masks of pair k, bool [H, W]; `Pair` says which there are. Empty where the set has none."""
        reader = self.pairs[k].masks
        return reader() if reader else {}

    def without(self, names: Iterable[str]) -> "Files":
        """Returns the other pairs; raises FleetflowError where a name, NAME or GROUP/NAME, is not among them."""
        known = {name for pair in self.pairs for name in (pair.name, f"{pair.group}/{pair.name}")}
        for name in names:
            if name not in known:
                raise unknown("pair", name, sorted(pair.name for pair in self.pairs)[:9])
        left = dict.fromkeys(names)
        kept = [pair for pair in self.pairs if not left.keys() & {pair.name, f"{pair.group}/{pair.name}"}]
        return Files(kept, (*self.left_out, *left), self.about)


def open_files(
    dataset: str, root: Path | None, *, options: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Files:
    """Returns the pairs of a data set, but those named in `without`.

    Args:
        options: name=value of its reader, such as render=clean.

    Raises:
        FleetflowError: For an unknown data set, option or pair, and for what is missing on disk.
    """
    reader = datasets[dataset]
    if root is None and inspect.signature(reader).parameters["root"].default is inspect.Parameter.empty:
        raise FleetflowError(f"{dataset} is read from disk; give --root DIR, the folder of the data set")
    known = [name for name in inspect.signature(reader).parameters if name not in ("root", "without")]
    given = {name: value for name, _, value in (text.partition("=") for text in options)}
    for name in given:
        if name not in known:
            raise unknown(f"option of {dataset}", name, known)
    return reader(root, **given).without(without)


def to_frame(image: np.ndarray) -> Tensor:
    """Returns [3, H, W] float in [0, 1] of a picture uint8 [H, W, 3]."""
    moved = torch.from_numpy(image).permute(2, 0, 1).contiguous()  # as bytes: five times as fast as floats
    return moved.float().div_(255)


def to_images(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Returns both frames of a sample as pictures uint8 [H, W, 3]."""
    image1, image2 = ((frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for frame in sample[:2])
    return image1, image2


def read_masks(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """Returns masks that are kept as pictures, bool [H, W], under the same keys."""
    return {key: read_mask(path) for key, path in paths.items()}


def chosen(name: str, value: str, options: Any) -> None:
    """Returns nothing; raises FleetflowError unless `value` is one of the words of the Literal `options`."""
    if value not in get_args(options):
        raise unknown(name, value, list(get_args(options)))


def _unknown(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((height, width, 2), np.float32), np.zeros((height, width), bool)


def _same_size(pair: Pair, sizes: set[tuple[int, int]]) -> None:
    if len(sizes) > 1:
        raise FleetflowError(f"{pair.group}/{pair.name}: frames and truth are of sizes {sorted(sizes)}; expected one")
