"""Types of options that several commands share."""

from itertools import chain
from typing import Literal, TypeVar

import tyro

T = TypeVar("T")

Positional = tyro.conf.Positional
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal[
    "flo",
    "flow",
    "kitti",
    "npy",
    "npz",
    "pfm",
    "flo5",
    "color",
    "side",
    "arrows",
    "streamlines",
    "exr",
    "stmap",
    "backward",
    "occlusion",
    "uncertainty",
]

# An option of several values that may also be given several times: `--set a=1 b=2 --set c=3`. `flat` joins them.
Several = tyro.conf.UseAppendAction[tuple[tuple[T, ...], ...]]


def flat(given: tuple[tuple[T, ...], ...]) -> tuple[T, ...]:
    """Returns the values of an option of the type `Several`, in the order in which they were given."""
    return tuple(chain.from_iterable(given))
