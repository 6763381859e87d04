"""Footage: generated clips with exact truth, of what people film and benchmarks lack.

Ten classes, each pair through a camera chain with a real codec. Nothing is read but, if a folder is given, photographs
and cut-outs for the surfaces, of which `held_out` keeps 80 and 20 from training. Choices are made on split=validation,
results reported on split=test.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.generate import dressed
from fleetflow.data.generate.camera import Camera, draw_camera
from fleetflow.data.generate.clip import clip, places, shaken
from fleetflow.data.generate.codec import KINDS
from fleetflow.data.generate.draw import Draw
from fleetflow.data.generate.filmed import (
    darts_world,
    front_world,
    ground_world,
    pan_world,
    plain_world,
    shake_world,
    watch_world,
)
from fleetflow.data.generate.photographs import photographs
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.space import drive_world, hand_world
from fleetflow.data.generate.textures import Textures, procedural
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Sample

Split = Literal["validation", "test"]
SIZES = ((288, 512), (320, 576), (352, 640), (384, 640), (432, 768), (448, 768))  # height, width


class Class(NamedTuple):
    """What the clips of a class show."""

    worlds: tuple[Callable[[Draw, int, int], Scene], ...]  # clip n takes number n of them, in turn
    pairs: int = 4  # of a clip
    moves: bool = True  # False: nothing does
    pace: float = 1.0  # of the motion of the world
    shake: float = 0.0  # pixels a frame
    night: bool = False


CLASSES = {
    "moving": Class((watch_world,)),  # static camera, moving objects
    "still": Class((watch_world, hand_world, drive_world, plain_world), moves=False),  # equal but for the camera
    "ground": Class((ground_world,)),  # dark ground of low contrast
    "plain": Class((plain_world,)),  # walls, skies, water
    "shake": Class((shake_world,), pace=0.3, shake=2.5),  # held by hand
    "pan": Class((pan_world,)),  # pan, zoom, roll
    "drive": Class((drive_world,), pace=0.5, shake=0.5),
    "front": Class((front_world,), pairs=2),  # large, fast, blurred foreground before a slow background
    "small": Class((darts_world,), pairs=2),  # small and thin fast objects
    "night": Class((watch_world, shake_world, plain_world), night=True),
}
PAIRS = 52  # of a class
EDITION = 2  # raised by every change of the generator that changes a pair, so that results are not compared across it


@datasets.register
def footage(
    root: Path | None = None,
    *,
    split: Split = "validation",
    classes: str = "all",
    limit: str | int = PAIRS,
    size: str | None = None,
) -> Files:
    """Returns generated clips with exact truth, grouped by class; no file is needed.

    The pictures are the same on every run of one version of torch and PyAV.

    Args:
        root: a folder of photographs and cut-outs. Those whose names are held out for the split are the surfaces
            (`data/generate/held_out.py`); without a folder these are procedural, other ones for each split.
        split: "validation", on which choices are made, or "test", for reports.
        classes: names joined by "+".
        limit: pairs of each class.
        size: HEIGHTxWIDTH of all frames; None takes sizes from 288x512 to 448x768.

    Raises:
        FleetflowError: For unknown classes and for numbers that are none.
    """
    chosen("split", split, Split)
    names = list(CLASSES) if classes == "all" else classes.split("+")
    for name in names:
        if name not in CLASSES:
            raise unknown("class of footage", name, list(CLASSES))
    fixed = _size(size) if size else None
    count = _number("limit", str(limit))
    where, found = Path(root) if root else None, []
    if where and not where.is_dir():
        raise FleetflowError(f"{root} is no folder; name one of photographs, or leave --root out")
    for name in names:
        step = CLASSES[name].pairs
        for k in range(count):
            number, place = divmod(k, step)
            shot = Shot(where, split, name, number, fixed or SIZES[seed_of(split, name, number) % len(SIZES)])
            frame1, frame2 = (Path("footage", split, name, f"{number:02d}", f"{n}.png") for n in (place, place + 1))
            masks, made = partial(_masks, shot, place), partial(_made, shot, place)
            found.append(Pair(name, f"{number:02d}/{place}", frame1, frame2, None, masks=masks, made=made))
    surfaces = "held-out photographs and cut-outs" if root else "procedural"
    return Files(found, about=f"generated, edition {EDITION}, surfaces: {surfaces}")


class Shot(NamedTuple):
    """What a clip follows from."""

    root: Path | None
    split: str
    name: str  # of the class
    number: int  # in it
    size: tuple[int, int]


@lru_cache(maxsize=2)
def shoot(shot: Shot) -> list[Sample]:
    """Returns the pairs of a clip."""
    about = CLASSES[shot.name]
    generator = torch.Generator().manual_seed(seed_of(shot.split, shot.name, shot.number))
    world = about.worlds[shot.number % len(about.worlds)]
    scene = world(Draw(1, generator), *shot.size)
    still = torch.eye(3).expand_as(scene.motion)
    scene = scene._replace(motion=torch.lerp(still, scene.motion, about.pace) if about.moves else still)
    textures = _surfaces(shot.root, shot.split)
    scene, outlines = dressed(scene, textures, generator)
    where = places(scene, about.pairs + 1)
    if about.shake:
        where = shaken(where, *shot.size, about.shake, generator)
    camera = _camera(about, generator)
    return clip(scene, where, textures, outlines, shot.size, camera, generator)


def _camera(about: Class, generator: torch.Generator) -> Camera:
    """A camera for a clip of the class: always with a codec, every one as often."""
    camera = draw_camera(1, about.pairs + 1, generator, night=float(about.night))
    return camera._replace(codec=torch.randint(len(KINDS), (1,), generator=generator))


@lru_cache(maxsize=2)
def _surfaces(root: Path | None, split: Split) -> Textures:
    return photographs(root, use=split) if root else procedural(seed=1 + ("validation", "test").index(split))


def _made(shot: Shot, place: int) -> Sample:
    return shoot(shot)[place]


def _masks(shot: Shot, place: int) -> dict[str, np.ndarray]:
    occluded = shoot(shot)[place].occluded
    return {} if occluded is None else {"occluded": occluded.numpy()}


def seed_of(*parts: object) -> int:
    """A number that follows from the parts alone, the same on every machine."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:15], 16)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise FleetflowError(f"{name} is {text}; expected a whole number of 1 or more")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _number("the height of size", height), _number("the width of size", width)
