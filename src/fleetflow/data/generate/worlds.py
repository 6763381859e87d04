"""All worlds that generated scenes are drawn from, and how often each: what a training batch is mixed of.

Figures on published generators (FlyingChairs, AutoFlow, Kubric, TartanAir) guided the ranges.
"""

from collections.abc import Callable

import torch

from fleetflow.data.generate.draw import SHEETS, Draw
from fleetflow.data.generate.filmed import (
    darts_world,
    front_world,
    ground_world,
    pan_world,
    plain_world,
    shake_world,
    watch_world,
)
from fleetflow.data.generate.flat import (
    CROWD,
    bare_world,
    blank_world,
    crowd_world,
    large_world,
    shapes_world,
    small_world,
    still_world,
)
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.space import drive_world, hand_world, stereo_world

__all__ = ["CROWD", "MIXTURE", "SHEETS", "Draw", "World", "draw_scene"]

World = Callable[[Draw, int, int], Scene]
MIXTURE: dict[World, float] = {
    shapes_world: 0.10,
    large_world: 0.11,
    bare_world: 0.09,
    small_world: 0.04,
    still_world: 0.05,
    blank_world: 0.02,
    crowd_world: 0.05,
    watch_world: 0.11,
    ground_world: 0.06,
    plain_world: 0.04,
    shake_world: 0.04,
    pan_world: 0.04,
    front_world: 0.07,
    darts_world: 0.04,
    drive_world: 0.09,
    stereo_world: 0.05,
    hand_world: 0.03,
}


def _padded(scene: Scene, sheets: int) -> Scene:
    """The scene with sheets that are not present after its own, so many in all."""
    count, own = scene.present.shape
    none = torch.zeros(count, sheets - own)
    still = torch.eye(3).expand(count, sheets - own, 3, 3)
    new = Scene(still, still, still, none.long(), none.long(), none.bool(), none, scene.field, scene.shutter)
    joined = [torch.cat(both, 1) for both in zip(scene[:-2], new[:-2])]
    return Scene._make((*joined, scene.field, scene.shutter))


def draw_scene(count: int, height: int, width: int, generator: torch.Generator, mixture: dict[World, float]) -> Scene:
    """Returns `count` scenes, the world of each drawn with the probabilities of `mixture`."""
    weights = torch.tensor(list(mixture.values()), dtype=torch.float64)
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    order = which.argsort(stable=True)
    scenes = []
    for number, world in enumerate(mixture):
        own = int((which == number).sum())
        if own:
            scenes.append(world(Draw(own, generator), height, width))
    sheets = max(scene.present.shape[1] for scene in scenes)
    scenes = [_padded(scene, sheets) for scene in scenes]
    place = order.argsort()
    return Scene(*(torch.cat(fields)[place] for fields in zip(*scenes)))
