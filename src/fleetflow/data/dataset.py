"""Pairs on disk as samples. A data set is a function of this package that returns `Files`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fleetflow.io import read_image
from fleetflow.registry import Registry
from fleetflow.types import FleetflowError, Sample

datasets = Registry("data set", "fleetflow.data")


class Pair(NamedTuple):
    """Where one example lies and how its truth is read."""

    group: str  # the part of the data set it belongs to: a set, a scene
    name: str
    frame1: Path
    frame2: Path
    truth: Callable[[], tuple[np.ndarray, np.ndarray]]  # flow float32 [H, W, 2] pixels, valid bool [H, W]


class Files(Dataset):
    """A list of pairs; item k is the Sample of pair k, read when it is asked for."""

    def __init__(self, pairs: list[Pair]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> Sample:
        """Returns the sample; raises FleetflowError for unreadable files and frames that differ in size."""
        pair = self.pairs[k]
        frames = [to_frame(read_image(path)) for path in (pair.frame1, pair.frame2)]
        flow, valid = pair.truth()
        sizes = {tuple(frame.shape[1:]) for frame in frames} | {flow.shape[:2]}
        if len(sizes) > 1:
            raise FleetflowError(
                f"{pair.group}/{pair.name}: frames and truth are of sizes {sorted(sizes)}; expected one"
            )
        return Sample(*frames, torch.from_numpy(flow).permute(2, 0, 1), torch.from_numpy(valid))


def to_frame(image: np.ndarray) -> Tensor:
    """Returns [3, H, W] float in [0, 1] of a picture uint8 [H, W, 3]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255
