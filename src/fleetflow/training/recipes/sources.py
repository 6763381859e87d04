"""The data sets that recipes train on and are measured on, in the folders below --root that they are expected in.

SINTEL_TEST and KITTI_TEST are all pairs with truth, the final render of Sintel. A stage on Chairs or Things sees none
of them; fine-tuning as published trains on all of them, so that its validation there is the error on training pairs.
"""

import math
from functools import partial

from fleetflow.data.datasets.flyingchairs import flyingchairs
from fleetflow.data.datasets.flyingthings import flyingthings3d, flyingthings3d_subset
from fleetflow.data.datasets.kitti import kitti2012, kitti2015
from fleetflow.data.datasets.sintel import sintel
from fleetflow.training.recipe import Augment, Source

NO_CLIP = math.inf


def chairs(augment: Augment, split: str = "train") -> Source:
    return Source(partial(flyingchairs, split=split), "FlyingChairs_release", augment=augment)


def things(augment: Augment, *renders: str) -> tuple[Source, ...]:
    return tuple(Source(partial(flyingthings3d, render=name), "FlyingThings3D", augment=augment) for name in renders)


def subset(augment: Augment) -> tuple[Source, ...]:
    return (Source(flyingthings3d_subset, "FlyingThings3D_subset", augment=augment),)


def sintel_both(augment: Augment, repeat: int = 1) -> tuple[Source, ...]:
    return tuple(Source(partial(sintel, render=name), "Sintel", repeat, augment) for name in ("clean", "final"))


def kitti_both(augment: Augment) -> tuple[Source, ...]:
    return (
        Source(kitti2012, "KITTI2012", augment=augment),
        Source(kitti2015, "KITTI2015", augment=augment),
    )


CHAIRS_TEST = (Source(partial(flyingchairs, split="val"), "FlyingChairs_release"),)
SINTEL_TEST = (Source(partial(sintel, render="final"), "Sintel"),)
KITTI_TEST = (Source(kitti2015, "KITTI2015"),)
