"""Photographs that training never sees, so that the data set `footage` can be made of them: a rule on file names.

Of the collection that the networks here are trained with, the rule keeps 80 photographs (.jpg) and 20 cut-outs (.png).
"""

import hashlib
from pathlib import Path
from typing import Literal

# shares of the range of hashes below which a name is kept for tests, and below which for validation
PHOTOGRAPHS, CUTOUTS = (0.059, 0.136), (0.0857, 0.184)

Use = Literal["train", "validation", "test"]


def use_of(name: str) -> Use:
    """Returns what a picture may be used for, by its file name without the folder: in any folder the same."""
    name = Path(name).name
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    test, validation = CUTOUTS if name.lower().endswith(".png") else PHOTOGRAPHS
    return "test" if share < test else "validation" if share < validation else "train"


def held_out(name: str) -> bool:
    """Returns True for a picture that training must not see."""
    return use_of(name) != "train"
