"""Motion blur along the motion: a frame as the mean of what its sheets show while the shutter is open.

At time t sheets lie where (1 - t) I + t motion puts them (bent ones with their bend): at t = 0 as in frame1, at t = 1
as in frame2. For planes seen by a camera that does not turn this is exactly their path. An exposure lies evenly about
its frame's time, so the flow of the middle is the flow of the pair.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.generate import render as renderer
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import Textures

LEAST = 0.8  # pixels; less blur is left out
GAP = 3.0  # pixels that a sheet moves between two sub-frames, as long as `work` allows; textures are read as coarsely
MOST = 24  # sub-frames
CHUNK = 4  # sub-frames at a time, for memory
SMALL = 10.0  # pixels; outlines of half this size are evaluated more finely


def motion_blurred(
    frame: Tensor, front: Tensor, scene: Scene, textures: Textures, shapes: Tensor, when: int, work: float = 5.0
) -> Tensor:
    """Returns the frame [B, 3, H, W] with the motion blur of the scenes that have one (`Scene.shutter`).

    Args:
        front: [B, H, W] number of the foremost sheet in the frame.
        when: 0 for frame1, 1 for frame2.
        work: sub-frames of whole frames that may be made; of parts there may be more, up to MOST.
    """
    rows = (scene.shutter > 0).nonzero()[:, 0].tolist()
    frame = frame.clone() if rows else frame
    for row in rows:
        one = Scene(*(part[row : row + 1] for part in scene))
        frame[row] = _exposed(frame[row], front[row : row + 1], one, textures, shapes, when, work)
    return frame


def _at(motion: Tensor, time: Tensor | float) -> Tensor:
    """[..., L, 3, 3] sheets -> picture at a time; a tensor of times [n] gives [n, L, 3, 3]."""
    time = time[:, None, None, None] if isinstance(time, Tensor) else time
    return torch.lerp(torch.eye(3, device=motion.device).expand_as(motion), motion, time)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv_ex(matrix).inverse.nan_to_num(0.0, 0.0, 0.0)


def _exposed(frame: Tensor, front: Tensor, scene: Scene, textures, shapes: Tensor, when: int, work: float) -> Tensor:
    """The frame [3, H, W] of one scene, exposed for its shutter's time."""
    height, width = frame.shape[-2:]
    shutter = float(scene.shutter)
    grid = renderer.pixel_places(height, width, frame.device)[None]
    bend = renderer.bend_of(scene, height, width) if when == 0 and bool(scene.wobble.any()) else None
    place = grid if bend is None else grid + renderer.chosen(scene.wobble, front)[:, None] * bend
    during = _at(scene.motion, when + shutter) @ _inverse(_at(scene.motion, float(when)))
    moved = renderer.project(renderer.chosen_matrix(during, front), place)[:, :2] - place
    length = moved.square().sum(1).sqrt().clamp(max=max(height, width))
    where = _swept(length).flatten().nonzero()[:, 0]
    if not len(where):
        return frame
    speed = _mean_by_sheet(length, front, scene.present.shape[1])
    most = min(MOST, max(4, int(work * length.numel() / len(where))))
    count = min(most, max(3, math.ceil(float(speed.max()) / GAP)))
    softness = (speed / count).clamp(min=1).log2()
    times = when + shutter * ((torch.arange(count, device=frame.device) + 0.5) / count - 0.5)
    first, changed = front.flatten(1)[:, where], torch.zeros(len(where), dtype=torch.bool, device=frame.device)
    total = torch.zeros(3, len(where), device=frame.device)
    for some in times.split(CHUNK):
        many = Scene(*(part.expand(len(some), *part.shape[1:]) for part in scene))
        inverse = _inverse(_at(scene.motion, some))
        step = 2 if _has_small(scene) else 4
        bends = None if bend is None else bend.expand(len(some), -1, -1, -1)
        fronts = renderer.front_of(many, shapes, scene.outline @ inverse, bends, (height, width), step)
        fronts = fronts.flatten(1)[:, where]
        changed |= (fronts != first).any(0)
        points = grid.flatten(2)[..., where].expand(len(some), -1, -1)
        if bend is not None:
            points = points + renderer.chosen(many.wobble, fronts)[:, None] * bend.flatten(2)[..., where]
        colors = renderer.shade(many, textures, scene.surface @ inverse, fronts[:, None], points[:, :, None], softness)
        total += colors[:, :, 0].sum(0)
    taken = changed | (length.flatten()[where] > LEAST)
    return frame.flatten(1).index_copy(1, where[taken], total[:, taken] / count).view_as(frame)


def _swept(length: Tensor) -> Tensor:
    """[1, H, W] bool: the pixels that something blurred reaches, given the length of the blur in pixels."""
    height, width = length.shape[-2:]
    coarse = F.max_pool2d(length[:, None], 8, ceil_mode=True)
    reached = coarse > LEAST
    for reach in (8, 16, 32, 64, 128, 256):
        cells = reach // 8 + 1
        if bool((coarse > reach).any()):
            far = F.max_pool2d((coarse > reach).float(), 2 * cells + 1, 1, cells)
            reached = reached | (far > 0)
    reached = F.max_pool2d(reached.float(), 3, 1, 1)
    return F.interpolate(reached, scale_factor=8)[:, 0, :height, :width] > 0


def _mean_by_sheet(values: Tensor, front: Tensor, sheets: int) -> Tensor:
    """[1, H, W] -> [L], the mean over the pixels that show each sheet; 0 where none does."""
    total, number = torch.zeros(2, sheets, device=values.device).unbind()
    total = total.index_add(0, front.flatten(), values.flatten())
    number = number.index_add(0, front.flatten(), torch.ones_like(values).flatten())
    return total / number.clamp(min=1)


def _has_small(scene: Scene) -> bool:
    """True where an object is so small or thin that a coarse outline would lose it."""
    axes = torch.linalg.svdvals(scene.outline[..., :2, :2])[..., 0]  # the reciprocal of the smaller half-axis
    return bool((axes.mul(SMALL) > 1)[scene.present & (scene.shape >= 0)].any())
