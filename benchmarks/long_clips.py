"""Longer generated clips with true tracks and true motion, for benchmarks/tracks.py and benchmarks/motion_score.py."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import to_images
from fleetflow.data.datasets.footage import CLASSES, seed_of
from fleetflow.data.generate import dressed
from fleetflow.data.generate.camera import Camera, draw_camera
from fleetflow.data.generate.clip import clip, places, shaken, tracks
from fleetflow.data.generate.draw import Draw
from fleetflow.data.generate.render import pixel_places, project
from fleetflow.data.generate.textures import Textures, procedural
from fleetflow.motion.camera import affine_flows, fit_similarity
from fleetflow.types import Sample

DRAWN = (288, 512)  # height and width that the worlds are drawn for


class LongClip(NamedTuple):
    """A generated clip and what is true of it."""

    frames: list[np.ndarray]  # T times uint8 [H, W, 3]
    samples: list[Sample]  # T - 1 pairs
    tracks: np.ndarray  # [N, T, 2] pixels, of the points asked for
    visible: np.ndarray  # bool [N, T]
    camera: np.ndarray  # [T - 1] mean pixels by which what lies behind moves, from frame to frame; of a street, which
    # has no one thing behind, what pan, zoom and roll explain of the motion
    objects: np.ndarray  # [T - 1] mean pixels by which the frame moves beside that; not a number where nothing is known
    behind: list[Tensor]  # T - 1 times [2, H, W] pixels, how that moves, also where it is hidden


def long_clip(
    name: str,
    number: int,
    *,
    split: str = "validation",
    count: int = 48,
    pace: float = 0.15,
    swing: float = 0.0,
    shake: float = 0.0,
    scale: float = 0.5,
    points: Tensor | None = None,
) -> LongClip:
    """Returns a clip of a class of footage, longer and slower.

    Args:
        name: of the class.
        number: of the clip.
        split: "validation" or "test"; other clips and other surfaces.
        count: frames.
        pace: share of the motion of the world from frame to frame.
        swing: frames of one period of a motion there and back; 0: it goes on evenly.
        shake: pixels by which the view jumps from frame to frame, on the scale of DRAWN.
        scale: size of the frames, of DRAWN.
        points: [N, 2] x and y in frame 0, for the tracks.
    """
    generator = torch.Generator().manual_seed(seed_of("long", split, name, number))
    about = CLASSES[name]
    world = about.worlds[number % len(about.worlds)]
    scene = world(Draw(1, generator), *DRAWN)
    if not about.moves:
        scene = scene._replace(motion=torch.eye(3).expand_as(scene.motion))
    textures = _surfaces(split)
    scene, outlines = dressed(scene, textures, generator)
    times = pace * (torch.arange(count, dtype=torch.float32) - (count - 1) // 2)
    if swing:
        times = pace * swing / (2 * math.pi) * torch.sin(2 * math.pi / swing * torch.arange(count))
    where = places(scene, count, times)
    if shake:
        where = shaken(where, *DRAWN, shake, generator)
    where = torch.diag(torch.tensor((scale, scale, 1.0))) @ where
    size = (round(scale * DRAWN[0]), round(scale * DRAWN[1]))
    camera = _steady(draw_camera(1, count, generator, night=float(about.night)))
    samples = clip(scene, where, textures, outlines, size, camera, generator)
    points = torch.zeros(0, 2) if points is None else points
    paths, seen = tracks(scene, where, outlines, points, size)
    frames = [to_images(pair)[0] for pair in samples] + [to_images(samples[-1])[1]]
    behind = [_flow(later[:, 0] @ torch.linalg.inv(now[:, 0]), size) for now, later in zip(where, where[1:])]
    if name == "drive":
        fits = [
            fit_similarity(pair.flow.permute(1, 2, 0).numpy(), pair.valid.numpy())
            if pair.valid.any()
            else np.full((3, 3), np.nan)
            for pair in samples
        ]
        behind = list(affine_flows(fits, size))
    objects = [float((pair.flow - flow).norm(dim=0)[pair.valid].mean()) for pair, flow in zip(samples, behind)]
    follows = [float(flow.norm(dim=0).mean()) for flow in behind]
    return LongClip(frames, samples, paths.numpy(), seen.numpy(), np.array(follows), np.array(objects), behind)


def drawn_clip(
    name: str,
    *,
    split: str = "validation",
    count: int = 48,
    slower: float = 1.0,
    scale: float = 0.5,
    points: Tensor | None = None,
) -> LongClip:
    """Returns a clip CLASS/NUMBER whose pace, swing and shake are drawn, too.

    Args:
        name: class and number.
        slower: frames a second over 24; everything else as of `long_clip`.
    """
    kind, _, number = name.partition("/")
    generator = np.random.default_rng(seed_of("drawn", split, name))
    pace = float(np.exp(generator.uniform(np.log(0.04), np.log(0.3)))) * (0.5 if kind == "front" else 1)
    swing = float(generator.choice([0, 0, 24, 32, 60]))
    shake = float(generator.uniform(0.5, 4)) if kind == "shake" else float(generator.choice([0, 0, 1.5]))
    motion = {"pace": pace / slower, "swing": swing * slower, "shake": shake / slower}
    return long_clip(kind, int(number), split=split, count=count, scale=scale, points=points, **motion)


def _steady(camera: Camera) -> Camera:
    """The camera with an exposure and white balance that drift evenly along the clip, from one drawn value to the next.

    As drawn they are a random walk and the light of each frame its own, which is for pairs: over 48 frames it is no film.
    """
    share = torch.linspace(0, 1, camera.exposure.shape[1])[None]
    drift = {
        name: torch.lerp(values[:, :1], values[:, 1:2], share.view(1, -1, *[1] * (values.ndim - 2)))
        for name, values in (("exposure", camera.exposure), ("response", camera.response), ("balance", camera.balance))
    }
    return camera._replace(light=torch.zeros_like(camera.light), **drift)


@lru_cache(maxsize=2)
def _surfaces(split: str) -> Textures:
    return procedural(seed=1 + ("validation", "test").index(split))


def _flow(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """[2, H, W] pixels by which a homography [1, 3, 3] moves the picture."""
    grid = pixel_places(*size, matrix.device)
    return (project(matrix, grid[None])[:, :2] - grid)[0]
