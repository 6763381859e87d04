"""A scene as a clip: its sheets move on evenly, the camera may shake, and every pair of frames has exact flow."""

import torch
from torch import Tensor

from fleetflow.data.generate.camera import Camera, film
from fleetflow.data.generate.draw import Draw, shift, turn
from fleetflow.data.generate.motion_blur import motion_blurred
from fleetflow.data.generate.own_texture import FOOTAGE, faint
from fleetflow.data.generate.render import front_at, project, render
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import Textures
from fleetflow.types import Sample

WORK = 16.0  # sub-frames of whole frames for motion blur


def places(scene: Scene, count: int, times: Tensor | None = None) -> Tensor:
    """Returns [T, 1, L, 3, 3] sheets -> frame k of a clip of `count` frames of one scene.

    By its motion a sheet moves from one frame to the next; in the middle of the clip it lies where the scene has it.

    Args:
        times: [T] how many motions each frame is away from there; None: one by one.
    """
    times = torch.arange(count, dtype=torch.float32) - (count - 1) // 2 if times is None else times
    still = torch.eye(3).expand_as(scene.motion)
    return torch.stack([torch.lerp(still, scene.motion, float(time)) for time in times])


def shaken(where: Tensor, height: int, width: int, pixels: float, generator: torch.Generator) -> Tensor:
    """Returns the places [T, 1, L, 3, 3] seen by a camera whose view jumps by about so many pixels a frame."""
    draw = Draw(1, generator)
    total, steps = torch.eye(3).expand(1, 1, 3, 3), []
    for place in where:
        x, y = torch.full((1, 1), width / 2), torch.full((1, 1), height / 2)
        jump = shift(x + draw.normal(pixels, 1), y + draw.normal(pixels, 1))
        total = jump @ turn(draw.normal(0.0004 * pixels, 1)) @ shift(-x, -y) @ total
        steps.append(total @ place)
    return torch.stack(steps)


@torch.no_grad()
def tracks(
    scene: Scene, where: Tensor, outlines: Tensor, points: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Returns where points of frame 0 are in every frame [N, T, 2], and whether they are seen there, bool [N, T].

    A point belongs to the foremost sheet that it lies on, and is seen where that is in front and within the picture.

    Args:
        scene: of one clip, its bend left out, as `clip` does.
        where: [T, 1, L, 3, 3] sheets -> frames.
        outlines: what `dressed` numbered the scene for.
        points: [N, 2] x and y in pixels.
        size: height and width of the frames.
    """
    height, width = size

    def front(at: Tensor, back: Tensor) -> Tensor:
        return front_at(scene, outlines, scene.outline @ back, at.T[None, :, None])[0, 0]

    back = torch.linalg.inv_ex(where[0]).inverse
    own = front(points, back)
    on_sheet = project(back[0, own], points[..., None, None])[:, :2]
    found, seen = [], []
    for place in where:
        x, y, depth = project(place[0, own], on_sheet)[..., 0, 0].unbind(1)
        at = torch.stack((x, y), 1)
        within = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5) & (depth > 1e-6)
        found.append(at)
        seen.append(within & (front(at, torch.linalg.inv_ex(place).inverse) == own))
    return torch.stack(found, 1), torch.stack(seen, 1)


@torch.no_grad()
def clip(
    scene: Scene,
    where: Tensor,
    textures: Textures,
    outlines: Tensor,
    size: tuple[int, int],
    camera: Camera,
    generator: torch.Generator,
) -> list[Sample]:
    """Returns the T - 1 pairs of a clip of one scene, with frames in eight bits, flow, validity and occlusion.

    Args:
        where: [T, 1, L, 3, 3] sheets -> frames.
        textures, outlines: what `dressed` numbered the scene for.
        camera: of one camera and T frames.
    """
    height, width = size
    pairs, frames = [], []
    for now, later in zip(where, where[1:]):
        back = torch.linalg.inv_ex(now).inverse
        moved = scene._replace(
            motion=later @ back,
            outline=scene.outline @ back,
            surface=scene.surface @ back,
            wobble=torch.zeros_like(scene.wobble),
        )
        pair = render(moved, textures, outlines, height, width)
        pairs.append(pair)
        frames.append(motion_blurred(pair.frame1, pair.front1, moved, textures, outlines, 0, WORK))
    frames.append(motion_blurred(pair.frame2, pair.front2, moved, textures, outlines, 1, WORK))
    frames = film(faint(frames, pairs[0].flow, generator, FOOTAGE), camera, generator)
    return [
        Sample(frames[k][0], frames[k + 1][0], pair.flow[0], pair.valid[0], pair.backward[0], pair.occluded[0])
        for k, pair in enumerate(pairs)
    ]
