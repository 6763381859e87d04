"""Worlds in the picture plane: shapes over a background, each moving by itself, as in FlyingChairs.

Displacements are heavy-tailed: their magnitudes are log-uniform, so 0.3 px and 60 px are about as common.
"""

import math

import torch
from torch import Tensor

from fleetflow.data.generate.draw import SHEETS, Draw, matrix, shift, turn
from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import SIDE

CROWD = 14  # sheets of a crowd


def moved(draw: Draw, x: Tensor, y: Tensor, reach: tuple[float, float], strength: float, tilt: float) -> Tensor:
    """A random translation, rotation, zoom and perspective about the points (x, y)."""
    sheets = x.shape[1]
    distance = draw.log_uniform(*reach, sheets) * strength
    direction = draw.uniform(0, 2 * math.pi, sheets)
    angle = draw.normal(math.radians(6), sheets) * min(strength, 2) * draw.chance(0.5, sheets)
    zoom = (draw.normal(0.07, sheets) * min(strength, 2) * draw.chance(0.5, sheets)).exp()
    stretch = (draw.normal(0.02, sheets) * min(strength, 1) * draw.chance(0.3, sheets)).exp()
    px, py = (draw.normal(tilt, sheets) * min(strength, 2) * draw.chance(0.3, sheets) for _ in range(2))
    here = turn(angle, zoom * stretch, zoom / stretch) @ matrix(1, 0, 0, 0, 1, 0, px, py, 1)
    return shift(x + distance * direction.cos(), y + distance * direction.sin() * 0.8) @ here @ shift(-x, -y)


def _bend(draw: Draw, height: int, width: int, often: float, strength: float) -> tuple[Tensor, Tensor]:
    """Strength by sheet and coarse field; the slope of the bend stays below one half, so that it can be undone."""
    field = torch.randn(draw.count, 2, 5, 6, generator=draw.generator)
    largest = min(height / 4, width / 5) / 8
    wobble = draw.log_uniform(0.02, 1.0) * largest * min(strength, 1) * draw.chance(often)
    return wobble, field.clamp(-2, 2)


def detail_of(draw: Draw) -> Tensor:
    """Texture pixels per frame pixel; one sheet in four shows a small part of its texture, so that it looks smooth.

    One in seven (but not the first, behind all others) has one color: only its outline tells how it moves.
    """
    detail = torch.where(draw.chance(0.25), draw.log_uniform(0.03, 0.5), draw.log_uniform(0.6, 2.0))
    plain = draw.chance(0.15)
    plain[:, 0] = False
    return torch.where(plain, draw.log_uniform(1e-3, 1e-2), detail)


def shapes_over(draw: Draw, height: int, width: int, strength: float) -> Scene:
    """Shapes over a background, all in the picture plane, as in FlyingChairs but with more kinds of motion."""
    extent = math.sqrt(height * width)
    x, y = draw.uniform(-0.1, 1.1) * width, draw.uniform(-0.1, 1.1) * height
    x[:, 0], y[:, 0] = width / 2, height / 2
    radius = draw.log_uniform(0.05, 0.5) * extent
    aspect = draw.normal(0.35).exp()
    thin = draw.chance(0.15)
    half_x = torch.where(thin, radius * 1.5, radius * aspect)
    half_y = torch.where(thin, (radius * 0.06).clamp(min=1.6), radius / aspect)
    outline = torch.linalg.inv(shift(x, y) @ turn(draw.uniform(0, 6.283), half_x, half_y))

    background = moved(draw, x[:, :1], y[:, :1], (0.2, 25), strength, 1e-4)
    own = moved(draw, x, y, (0.2, 50), strength, 2e-4)
    carried = draw.chance(0.7)[..., None, None]
    still = draw.chance(0.1)[..., None, None]
    own = torch.where(still, torch.eye(3), own)
    motion = torch.where(carried, background @ own, own)
    motion[:, 0] = background[:, 0]

    zoom = detail_of(draw)
    surface = shift(draw.uniform(0, SIDE), draw.uniform(0, SIDE)) @ turn(draw.uniform(0, 6.283), zoom, zoom)
    shape = draw.integer(1 << 20)
    shape[:, 0] = -1
    wobble, field = _bend(draw, height, width, 0.35, strength)
    present = torch.arange(SHEETS) <= draw.uniform(1, SHEETS, 1)
    return Scene(motion, outline, surface, shape, draw.integer(1 << 20), present, wobble, field, draw.shutter(0.25))


def shapes_world(draw: Draw, height: int, width: int) -> Scene:
    return shapes_over(draw, height, width, 1.0)


def large_world(draw: Draw, height: int, width: int) -> Scene:
    return shapes_over(draw, height, width, 3.0)


def small_world(draw: Draw, height: int, width: int) -> Scene:
    return shapes_over(draw, height, width, 0.1)


def still_world(draw: Draw, height: int, width: int) -> Scene:
    return shapes_over(draw, height, width, 0.0)


def blank_world(draw: Draw, height: int, width: int) -> Scene:
    """One color that does not move, and what the camera adds to it: nothing to match must mean no motion."""
    scene = shapes_over(draw, height, width, 0.0)
    surface, present = scene.surface.clone(), torch.zeros_like(scene.present)
    surface[..., :2, :2] *= 1e-3
    present[:, 0] = True
    return scene._replace(surface=surface, present=present)


def bare_world(draw: Draw, height: int, width: int) -> Scene:
    """Large objects, most of one color, some of two parts: only outlines and corners tell how they move."""
    scene = shapes_over(draw, height, width, 2.0)
    motion, outline, surface = (part.clone() for part in scene[:3])
    outline[:, 1:, :2] /= draw.uniform(1.0, 2.5, SHEETS - 1)[..., None, None]
    wobble, joined = scene.wobble.clone(), draw.chance(0.5, 3)  # at the side of the one below, and moving with it
    wobble[:, 2::2] = torch.where(joined, wobble[:, 1:7:2], wobble[:, 2::2])
    joined = joined[..., None, None]
    beside = shift(draw.uniform(-1.5, 1.5, 3), draw.uniform(-1.5, 1.5, 3)) @ outline[:, 1:7:2]
    outline[:, 2::2] = torch.where(joined, beside, outline[:, 2::2])
    motion[:, 2::2] = torch.where(joined, motion[:, 1:7:2], motion[:, 2::2])
    plain = draw.chance(0.7)
    plain[:, 0] = False
    surface[..., :2, :2] *= torch.where(plain, 5e-3, 1.0)[..., None, None]
    return scene._replace(motion=motion, outline=outline, surface=surface, wobble=wobble)


def crowd_world(draw: Draw, height: int, width: int) -> Scene:
    """Furniture before a landscape that hardly moves, every piece by itself, sizes and motions as in FlyingChairs.

    Sheets 0 and 1 are a sky and what stands before it, moving alike; of the others two make a piece: legs, then a body
    of another color. A piece moves in the picture plane, relative to the landscape (Dosovitskiy et al., "FlowNet",
    ICCV 2015).
    """
    pieces = (CROWD - 2) // 2

    def peaked(most: float, power: int, part: float, sheets: int = pieces) -> Tensor:
        """Most draws are near zero, those beyond `most` become zero: no motion."""
        z = draw.normal(1.0, sheets)
        drawn = most * z.sign() * z.abs() ** power / part
        return torch.where(drawn.abs() <= most, drawn, 0.0)

    def about(x: Tensor, y: Tensor, step: Tensor, rise: Tensor, angle: Tensor, zoom: Tensor) -> Tensor:
        return shift(x + step, y + rise) @ turn(angle, zoom, zoom) @ shift(-x, -y)

    def both(legs: Tensor, bodies: Tensor) -> Tensor:
        """[B, pieces, ...] twice -> [B, 2 pieces, ...], one after the other."""
        return torch.stack((legs, bodies), 2).flatten(1, 2)

    extent, scale = math.sqrt(height * width), draw.log_uniform(0.7, 1.8, 1)  # FlyingChairs: 1, 443 px
    unit = scale * extent / 443
    middle_x, middle_y = torch.full((draw.count, 1), width / 2), torch.full((draw.count, 1), height / 2)
    turned = peaked(math.radians(10), 2, 6, 1) * draw.chance(0.3, 1)
    zoomed = 1 + peaked(0.07, 2, 6, 1) * draw.chance(0.6, 1)
    step, rise = unit * peaked(40, 4, 15, 1), unit * peaked(40, 4, 15, 1)
    landscape = about(middle_x, middle_y, step, rise, turned, zoomed)

    x, y = draw.uniform(-0.1, 1.1, pieces) * width, draw.uniform(-0.1, 1.1, pieces) * height
    radius = unit * (100 + draw.normal(70, pieces)).clamp(25, 300)
    lean = draw.normal(0.2, pieces) + draw.uniform(0, 6.283, pieces) * draw.chance(0.2, pieces)
    aspect = draw.normal(0.3, pieces).exp()
    legs = torch.linalg.inv(shift(x, y) @ turn(lean, radius * aspect, radius / aspect))
    share = draw.uniform(0.4, 0.8, pieces)
    bodies = turn(draw.normal(0.3, pieces), 1 / share, 1 / share)
    bodies = bodies @ shift(draw.uniform(-0.4, 0.4, pieces), draw.uniform(-0.4, 0.4, pieces)) @ legs
    turned = peaked(math.radians(30), 2, 6) * draw.chance(0.7, pieces)
    zoomed = 1 + peaked(0.2, 2, 6) * draw.chance(0.7, pieces)
    step, rise = unit * peaked(120, 3, 10), unit * peaked(120, 3, 10)
    own = landscape @ about(x, y, step, rise, turned, zoomed)

    ridge = shift(draw.uniform(-0.2, 1.2, 1) * width, draw.uniform(0.4, 1.2, 1) * height)
    ridge = ridge @ turn(draw.normal(0.2, 1), *(draw.log_uniform(0.5, 1.2, 1) * extent for _ in range(2)))
    ridge = torch.linalg.inv(ridge)
    detail = torch.where(draw.chance(0.6, CROWD), draw.log_uniform(2e-3, 0.1, CROWD), draw.log_uniform(0.3, 1.5, CROWD))
    sky = draw.chance(0.4, 1)
    detail[:, :1] = torch.where(sky, draw.log_uniform(1e-3, 3e-2, 1), draw.log_uniform(0.5, 2.0, 1))
    detail[:, 1:2] = draw.log_uniform(0.5, 2.0, 1)
    surface = shift(draw.uniform(0, SIDE, CROWD), draw.uniform(0, SIDE, CROWD))
    surface = surface @ turn(draw.uniform(0, 6.283, CROWD), detail, detail)

    shape = draw.integer(1 << 20, CROWD)
    shape[:, 0] = -1
    shape[:, 2::2] = 5 + 7 * draw.integer(36, pieces)  # in the bank these are furniture
    here = torch.arange(pieces) < draw.uniform(2, pieces + 2, 1)
    present = torch.cat((torch.ones_like(sky), sky, both(here & draw.chance(0.85, pieces), here)), 1)
    outline = torch.cat((ridge, ridge, both(legs, bodies)), 1)
    motion = torch.cat((landscape, landscape, both(own, own)), 1)
    texture, bend = draw.integer(1 << 20, CROWD), torch.zeros(draw.count, CROWD)
    return Scene(
        motion, outline, surface, shape, texture, present, bend, torch.zeros(draw.count, 2, 5, 6), draw.shutter(0.1)
    )
