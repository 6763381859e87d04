"""Worlds in space: planes seen by a pinhole camera that moves, which is what driving and hand-held footage need."""

import math

import torch
from torch import Tensor

from fleetflow.data.generate.draw import SHEETS, Draw, matrix, shift, turn
from fleetflow.data.generate.flat import detail_of
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import SIDE


def _planes(draw: Draw, height: int, width: int, style: str) -> Scene:
    """Planes in space seen by a moving pinhole camera: backdrop, ground, two walls and four boards.

    The plane n . P = d moves in the picture by K (R + t n' / d) K^-1 (Hartley, Zisserman: Multiple View Geometry).

    Args:
        style: "drive" moves forward over a street, "stereo" sideways without turning, "hand" anywhere.
    """
    count = draw.count
    drive, stereo = style == "drive", style == "stereo"
    view = width * draw.uniform(1.0, 3.0, 1)  # the frame is a window of a wider view
    focal = view * draw.log_uniform(0.6, 1.5, 1)
    centre_x = width / 2 + draw.uniform(-0.5, 0.5, 1) * (view - width)
    centre_y = height / 2 + draw.uniform(-0.5, 0.5, 1) * (0.5 * view - height).clamp(min=0)
    lens = matrix(focal, 0, centre_x, 0, focal, centre_y, 0, 0, 1)
    back = torch.linalg.inv(lens)

    sigma = {"drive": (0.3, 1.0, 0.3), "stereo": (0, 0, 0), "hand": (1.0, 1.0, 1.0)}[style]
    pitch, yaw, roll = (draw.normal(math.radians(angle), 1) for angle in sigma)
    rotation = (
        matrix(1, 0, 0, 0, pitch.cos(), -pitch.sin(), 0, pitch.sin(), pitch.cos())
        @ matrix(yaw.cos(), 0, yaw.sin(), 0, 1, 0, -yaw.sin(), 0, yaw.cos())
        @ turn(roll)
    )
    if drive:
        step = torch.stack((draw.normal(0.05, 1), draw.normal(0.03, 1), -draw.uniform(-0.2, 1.7, 1)), -1)
    elif stereo:
        sign = torch.where(draw.chance(0.8, 1), -1.0, 1.0)
        step = torch.stack((sign * draw.log_uniform(0.05, 0.6, 1), *(torch.zeros(count, 1),) * 2), -1)
    else:
        step = torch.stack([draw.normal(0.15, 1) for _ in range(3)], -1)

    # Each sheet: a point on it, its normal and its two directions, in camera coordinates (x right, y down, z ahead).
    px, py = draw.uniform(-0.1, 1.1) * width, draw.uniform(-0.1, 1.1) * height
    depth = draw.log_uniform(3.0, 30.0) if drive else draw.log_uniform(1.5, 15.0)
    depth[:, 0:1] = draw.log_uniform(25, 200, 1) if drive else draw.log_uniform(6, 40, 1)
    depth[:, 4:] = depth[:, 4:].sort(1, descending=True).values
    point = (back @ torch.stack((px * depth, py * depth, depth), -1)[..., None])[..., 0]
    tilt = 0.15 if drive else 0.35
    normal = torch.stack((draw.normal(tilt), draw.normal(tilt), torch.ones(count, SHEETS)), -1)
    level = draw.log_uniform(1.2, 2.2, 1) * (1.0 if drive else draw.log_uniform(0.3, 1.0, 1))
    side = draw.log_uniform(2.5, 12, 2)
    zeros = torch.zeros(count, 1)
    normal[:, 1] = torch.cat((draw.normal(0.02, 1), zeros + 1, draw.normal(0.02, 1)), 1)
    point[:, 1] = torch.cat((zeros, level, zeros), 1)
    for k, sign in ((2, -1.0), (3, 1.0)):
        normal[:, k] = torch.cat((zeros + sign, zeros, draw.normal(0.05, 1)), 1)
        point[:, k] = torch.cat((sign * side[:, k - 2 : k - 1], zeros, draw.uniform(5, 25, 1)), 1)
    normal = normal / normal.norm(dim=-1, keepdim=True)
    distance = (normal * point).sum(-1)
    flip = torch.where(distance < 0, -1.0, 1.0)
    normal, distance = normal * flip[..., None], (distance * flip).clamp(min=0.05)

    down = torch.tensor((0.0, 1.0, 0.0)).expand_as(normal)
    ahead = torch.tensor((0.0, 0.0, 1.0)).expand_as(normal)
    guide = torch.where((torch.arange(SHEETS) == 1)[:, None], ahead, down)
    first = torch.linalg.cross(guide, normal)
    first = first / first.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    second = torch.linalg.cross(normal, first)

    # A ray r meets the plane at d r / (n . r): coordinates (u, v) on it around its point are a homography of r.
    def coordinate(axis: Tensor) -> Tensor:
        return distance[..., None] * axis - (axis * point).sum(-1, keepdim=True) * normal

    metric = torch.stack((coordinate(first), coordinate(second), normal), -2) @ back
    moves = draw.chance(0.3)[..., None] * torch.stack((draw.normal(0.3), draw.normal(0.03), draw.normal(0.4)), -1)
    moves[:, :4] = 0
    if stereo:
        moves = moves * 0
    travel = (rotation @ moves[..., None])[..., 0] + step
    motion = lens @ (rotation + travel[..., None] * (normal / distance[..., None])[..., None, :]) @ back

    half_u, half_v = draw.log_uniform(0.05, 0.6) * depth, draw.log_uniform(0.05, 0.6) * depth
    half_u[:, 2:4], half_v[:, 2:4] = draw.uniform(4, 30, 2), draw.uniform(1.5, 8, 2)
    outline = turn(draw.normal(0.05), 1 / half_u, 1 / half_v) @ metric
    density = focal / depth * detail_of(draw)
    smooth = torch.where(draw.chance(0.5, 3), draw.log_uniform(0.03, 0.4, 3), 1.0)  # roads, walls without marks
    density[:, 1:4] = focal / (12 if drive else 5) * draw.log_uniform(0.5, 1.6, 3) * smooth
    surface = (
        shift(draw.uniform(0, SIDE), draw.uniform(0, SIDE)) @ turn(draw.uniform(0, 6.283), density, density) @ metric
    )
    shape = torch.where(draw.chance(0.3), 0, draw.integer(1 << 20))
    shape[:, 2:4] = torch.where(draw.chance(0.6, 2), 0, shape[:, 2:4])
    shape[:, :2] = -1
    present = draw.chance(0.75)
    present[:, 1:2] = draw.chance(0.9 if drive else 0.4, 1)
    present[:, 2:4] &= draw.chance(0.8 if drive else 0.3, 2)
    present[:, 0] = True
    texture, bend, field = draw.integer(1 << 20), torch.zeros(count, SHEETS), torch.zeros(count, 2, 5, 6)
    shutter = torch.zeros(count) if stereo else draw.shutter(0.3)
    return Scene(motion, outline, surface, shape, texture, present, bend, field, shutter)


def drive_world(draw: Draw, height: int, width: int) -> Scene:
    return _planes(draw, height, width, "drive")


def stereo_world(draw: Draw, height: int, width: int) -> Scene:
    return _planes(draw, height, width, "stereo")


def hand_world(draw: Draw, height: int, width: int) -> Scene:
    return _planes(draw, height, width, "hand")
