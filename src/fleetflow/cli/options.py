"""Types of options that several commands share."""

from typing import Literal

import tyro

Positional = tyro.conf.Positional
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal["flo", "kitti", "npy", "npz", "pfm", "flo5", "color", "side"]
