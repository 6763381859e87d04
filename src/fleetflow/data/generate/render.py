"""Scene -> frames, flows and occlusion: which sheet is in front at each pixel, then one texture look-up per pixel."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import LEVELS, SIDE, Textures, level_start

LARGEST = 1000.0  # pixels; what moves farther counts as unknown
COARSE = 2  # outlines are evaluated at every second pixel and interpolated: they are smooth fields


class Rendered(NamedTuple):
    """Both frames and what is known of them, for B scenes."""

    frame1: Tensor  # [B, 3, H, W] in [0, 1]
    frame2: Tensor
    flow: Tensor  # [B, 2, H, W] pixels
    valid: Tensor  # [B, H, W] bool; False where the point of frame1 lies behind the camera in frame2 (flow is 0)
    backward: Tensor | None  # [B, 2, H, W] pixels
    occluded: Tensor | None  # [B, H, W] bool
    front1: Tensor  # [B, H, W] number of the foremost sheet in frame1
    front2: Tensor


def render(scene: Scene, textures: Textures, shapes: Tensor, height: int, width: int, full: bool = True) -> Rendered:
    """Returns the frames and the forward flow; with `full` also the backward flow and the occlusion.

    Args:
        shapes: [S, GRID, GRID], the bank that `scene.shape` counts in.
    """
    pixels = pixel_places(height, width, scene.motion.device)
    inverse = torch.linalg.inv(scene.motion)
    bend = bend_of(scene, height, width) if bool(scene.wobble.any()) else None

    front1 = front_of(scene, shapes, scene.outline, bend, (height, width))
    front2 = front_of(scene, shapes, scene.outline @ inverse, None, (height, width))
    sheet1 = pixels.expand(len(front1), -1, -1, -1)
    if bend is not None:
        sheet1 = sheet1 + chosen(scene.wobble, front1)[:, None] * bend
    frame1 = _soft_edges(shade(scene, textures, scene.surface, front1, sheet1), front1)
    frame2 = _soft_edges(shade(scene, textures, scene.surface @ inverse, front2, pixels.expand_as(sheet1)), front2)
    projected = project(chosen_matrix(scene.motion, front1), sheet1)
    target, ahead = projected[:, :2], projected[:, 2] > 1e-6
    flow = target - pixels
    valid = ahead & (flow.abs().amax(1) < LARGEST)
    flow = flow * valid[:, None]
    if not full:
        return Rendered(frame1, frame2, flow, valid, None, None, front1, front2)

    sheet2 = project(chosen_matrix(inverse, front2), pixels.expand(len(front2), -1, -1, -1))[:, :2]
    backward = _unbend(scene, sheet2, chosen(scene.wobble, front2)) - pixels
    hidden = front_at(scene, shapes, scene.outline @ inverse, target) != front1
    outside = (
        (target[:, 0] < -0.5) | (target[:, 0] > width - 0.5) | (target[:, 1] < -0.5) | (target[:, 1] > height - 0.5)
    )
    return Rendered(frame1, frame2, flow, valid, backward, hidden | outside | ~ahead, front1, front2)


def pixel_places(height: int, width: int, device, step: int = 1) -> Tensor:
    """[2, h, w] x and y of every `step`-th pixel, with one more than needed so that interpolation covers the last."""
    x, y = (torch.arange(0, size + step - 1, step, device=device, dtype=torch.float32) for size in (width, height))
    return torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))))


def bend_of(scene: Scene, height: int, width: int) -> Tensor:
    """[B, 2, H, W] pixels, 0 in scenes without a bent sheet."""
    bent = scene.wobble.any(1).nonzero()[:, 0]
    bend = torch.zeros(len(scene.field), 2, height, width, device=scene.field.device)
    bend[bent] = F.interpolate(scene.field[bent], size=(height, width), mode="bicubic", align_corners=True)
    return bend


def project(matrix: Tensor, points: Tensor) -> Tensor:
    """[B, 9 or (3, 3), ...] homographies on [B, 2, h, w] points: [B, 3, h, w] x, y and the third coordinate."""
    x, y = points[:, 0], points[:, 1]
    if matrix.ndim == 3:  # one matrix for the whole picture
        matrix = matrix.flatten(1)[:, :, None, None]
    m = matrix.unbind(1)
    depth = m[6] * x + m[7] * y + m[8]
    scale = 1 / torch.where(depth.abs() < 1e-6, 1e-6, depth)
    return torch.stack(((m[0] * x + m[1] * y + m[2]) * scale, (m[3] * x + m[4] * y + m[5]) * scale, depth), 1)


def _covers(scene: Scene, shapes: Tensor, k: int, matrix: Tensor, points: Tensor) -> Tensor:
    """[B, h, w] field of sheet k at the points: positive where it covers them, should it be present."""
    projected = project(matrix[:, k], points)
    whole = (scene.shape[:, k] < 0)[:, None, None]
    outlines = shapes[scene.shape[:, k].clamp(min=0)][:, None]
    grid = projected[:, :2].clamp(-2, 2).permute(0, 2, 3, 1)
    field = F.grid_sample(outlines, grid, padding_mode="border", align_corners=True)[:, 0]
    beyond = projected[:, :2].abs().amax(1) - 1
    field = torch.minimum(field, -beyond).masked_fill(whole, 1.0)
    return field.masked_fill(projected[:, 2] <= 1e-6, -1.0)


def _sheets(scene: Scene) -> Iterator[tuple[int, Tensor, Scene]]:
    """Yields each sheet but the first, from back to front, with the numbers of the scenes that have it, and those."""
    present = scene.present.cpu()
    for k in range(1, present.shape[1]):
        rows = present[:, k].nonzero()[:, 0]
        if len(rows):
            rows = rows.to(scene.present.device)
            yield k, rows, Scene(*(part[rows] for part in scene))


def front_of(
    scene: Scene, shapes: Tensor, matrix: Tensor, bend: Tensor | None, size: tuple[int, int], step: int = COARSE
) -> Tensor:
    """[B, H, W] number of the foremost sheet at every pixel; outlines are evaluated at every `step`-th."""
    (height, width), device = size, matrix.device
    count = len(scene.shape)
    coarse = pixel_places(height, width, device, step).expand(count, -1, -1, -1)
    if bend is not None:
        bend = F.interpolate(bend, size=coarse.shape[-2:], mode="bilinear", align_corners=True)
    front = torch.zeros(count, height, width, dtype=torch.uint8, device=device)
    full = ((coarse.shape[-2] - 1) * step + 1, (coarse.shape[-1] - 1) * step + 1)
    for k, rows, some in _sheets(scene):
        points = coarse[rows] if bend is None else coarse[rows] + some.wobble[:, k, None, None, None] * bend[rows]
        field = _covers(some, shapes, k, matrix[rows], points)[:, None]
        field = F.interpolate(field, size=full, mode="bilinear", align_corners=True)[:, 0, :height, :width]
        front[rows] = front[rows].masked_fill(field > 0, k)
    return front.long()


def front_at(scene: Scene, shapes: Tensor, matrix: Tensor, points: Tensor) -> Tensor:
    """[B, H, W] number of the foremost sheet at arbitrary points [B, 2, H, W] of a frame."""
    front = torch.zeros(points.shape[0], *points.shape[-2:], dtype=torch.uint8, device=points.device)
    for k, rows, some in _sheets(scene):
        front[rows] = front[rows].masked_fill(_covers(some, shapes, k, matrix[rows], points[rows]) > 0, k)
    return front.long()


def chosen(values: Tensor, front: Tensor) -> Tensor:
    """[B, L] values -> [B, H, W], the value of each pixel's sheet."""
    return values.gather(1, front.flatten(1)).view(front.shape)


def chosen_matrix(matrix: Tensor, front: Tensor) -> Tensor:
    """[B, L, 3, 3] -> [B, 9, H, W], the homography of each pixel's sheet, stored as nine planes."""
    count, sheets = matrix.shape[:2]
    row = front + torch.arange(count, device=front.device)[:, None, None] * sheets
    planes = matrix.reshape(-1, 9).mT.contiguous().index_select(1, row.flatten())
    return planes.view(9, *front.shape).transpose(0, 1)


def shade(
    scene: Scene, textures: Textures, surface: Tensor, front: Tensor, points: Tensor, softness: Tensor | None = None
) -> Tensor:
    """[B, 3, H, W] colors of each pixel's sheet at the points, from the mip level that fits.

    Args:
        softness: [L] mip levels that the texture of each sheet is read coarser by.
    """
    matrix = chosen_matrix(surface, front)
    projected = project(matrix, points)
    m, (u, v, depth) = matrix.unbind(1), projected.unbind(1)
    # Jacobian of the projection; the root of its determinant is texture pixels per frame pixel.
    a, b = m[0] - u * m[6], m[1] - u * m[7]
    c, d = m[3] - v * m[6], m[4] - v * m[7]
    zoom = ((a * d - b * c).abs() / (depth * depth).clamp(min=1e-12)).clamp(1e-6, 1e6)
    level = 0.5 * zoom.log2() + (0.25 if softness is None else 0.25 + softness[front])
    level = level.floor().clamp(0, LEVELS - 1).int()
    shrink = torch.exp2(-level.float())
    at = (projected[:, :2].clamp(-1e6, 1e6) + 0.5) * shrink[:, None] - 0.5
    side = SIDE >> level
    period = 2 * side[:, None]

    def mirrored(position: Tensor) -> Tensor:
        position = position & (period - 1)  # a power of two
        return torch.minimum(position, period - 1 - position)

    low = at.floor()
    fx, fy = (at - low).unbind(1)
    low = low.int()
    x0, y0 = mirrored(low).unbind(1)
    x1, y1 = mirrored(low + 1).unbind(1)
    index = torch.stack((y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1), -1)
    first = level_start(level, textures.total) + chosen(scene.texture, front) * side * side
    first = first.to(torch.int32 if len(textures.table) < 2**31 else torch.int64)
    gx, gy = 1 - fx, 1 - fy
    weights = torch.stack((gx * gy, fx * gy, gx * fy, fx * fy), -1)
    rows = (index + first[..., None]).view(-1, 4)
    colors = F.embedding_bag(rows, textures.table, per_sample_weights=weights.view(-1, 4).half(), mode="sum")
    return colors.view(*front.shape, 4).permute(0, 3, 1, 2)[:, :3].contiguous().float()


def _soft_edges(frame: Tensor, front: Tensor) -> Tensor:
    """The frame with a 3x3 mean along the outlines, as a camera mixes the two sides of an edge."""
    edge = torch.zeros_like(front, dtype=torch.bool)
    across, down = front[:, :, 1:] != front[:, :, :-1], front[:, 1:] != front[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    wide = F.pad(frame, (1, 1, 1, 1), mode="replicate")
    mean = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    mean = (mean[..., :-2, :] + mean[..., 1:-1, :] + mean[..., 2:, :]) / 9
    return torch.where(edge[:, None], mean, frame)


def _unbend(scene: Scene, sheet: Tensor, wobble: Tensor, rounds: int = 20) -> Tensor:
    """The x with x + wobble * field(x) = sheet, by fixed-point iteration (the bend is a contraction): [B, 2, H, W]."""
    height, width = sheet.shape[-2:]
    bend = bend_of(scene, height, width)
    x = sheet
    for _ in range(rounds if bool((scene.wobble != 0).any()) else 0):
        grid = torch.stack((2 * x[:, 0] / max(width - 1, 1) - 1, 2 * x[:, 1] / max(height - 1, 1) - 1), -1)
        there = F.grid_sample(bend, grid, padding_mode="border", align_corners=True)
        x = sheet - wobble[:, None] * there
    return x
