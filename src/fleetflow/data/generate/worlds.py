"""The worlds that generated scenes are drawn from: how sheets are placed and how they and the camera move.

Displacements are heavy-tailed: their magnitudes are log-uniform, so 0.3 px and 60 px are about as common. Figures on
published generators (FlyingChairs, AutoFlow, Kubric, TartanAir) guided the ranges; rigid camera motion over depth is
what a network needs for driving scenes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fleetflow.data.generate.scene import Scene
from fleetflow.data.generate.textures import SIDE

SHEETS = 8
CROWD = 14  # sheets of a crowd


class Draw:
    """Random numbers of shape [B, L] (or [B, n]) from one generator, on the CPU so that every device sees the same."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float, sheets: int = SHEETS) -> Tensor:
        return torch.rand(self.count, sheets, generator=self.generator) * (high - low) + low

    def log_uniform(self, low: float, high: float, sheets: int = SHEETS) -> Tensor:
        return self.uniform(math.log(low), math.log(high), sheets).exp()

    def normal(self, sigma: float, sheets: int = SHEETS) -> Tensor:
        return torch.randn(self.count, sheets, generator=self.generator) * sigma

    def chance(self, probability: float, sheets: int = SHEETS) -> Tensor:
        return torch.rand(self.count, sheets, generator=self.generator) < probability

    def integer(self, below: int, sheets: int = SHEETS) -> Tensor:
        return torch.randint(below, (self.count, sheets), generator=self.generator)


def matrix(*entries: Tensor | float) -> Tensor:
    """Returns [B, L, 3, 3] from nine entries, row by row, each [B, L] or a number."""
    shape = next(entry.shape for entry in entries if isinstance(entry, Tensor))
    full = [entry if isinstance(entry, Tensor) else torch.full(shape, float(entry)) for entry in entries]
    return torch.stack(full, -1).unflatten(-1, (3, 3))


def shift(x: Tensor, y: Tensor) -> Tensor:
    return matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def turn(angle: Tensor, scale_x: Tensor | float = 1.0, scale_y: Tensor | float = 1.0) -> Tensor:
    """Returns the scaling by axis followed by a rotation (radians), about the origin."""
    c, s = angle.cos(), angle.sin()
    return matrix(c * scale_x, -s * scale_y, 0, s * scale_x, c * scale_y, 0, 0, 0, 1)


def _motion(draw: Draw, x: Tensor, y: Tensor, reach: tuple[float, float], strength: float, tilt: float) -> Tensor:
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


def _detail(draw: Draw) -> Tensor:
    """Texture pixels per frame pixel; one sheet in four shows a small part of its texture, so that it looks smooth.

    One in seven (but not the first, behind all others) has one colour: only its outline tells how it moves.
    """
    detail = torch.where(draw.chance(0.25), draw.log_uniform(0.03, 0.5), draw.log_uniform(0.6, 2.0))
    plain = draw.chance(0.15)
    plain[:, 0] = False
    return torch.where(plain, draw.log_uniform(1e-3, 1e-2), detail)


def _flat(draw: Draw, height: int, width: int, strength: float) -> Scene:
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

    background = _motion(draw, x[:, :1], y[:, :1], (0.2, 25), strength, 1e-4)
    own = _motion(draw, x, y, (0.2, 50), strength, 2e-4)
    carried = draw.chance(0.7)[..., None, None]
    still = draw.chance(0.1)[..., None, None]
    own = torch.where(still, torch.eye(3), own)
    motion = torch.where(carried, background @ own, own)
    motion[:, 0] = background[:, 0]

    zoom = _detail(draw)
    surface = shift(draw.uniform(0, SIDE), draw.uniform(0, SIDE)) @ turn(draw.uniform(0, 6.283), zoom, zoom)
    shape = draw.integer(1 << 20)
    shape[:, 0] = -1
    wobble, field = _bend(draw, height, width, 0.35, strength)
    present = torch.arange(SHEETS) <= draw.uniform(1, SHEETS, 1)
    return Scene(motion, outline, surface, shape, draw.integer(1 << 20), present, wobble, field)


def _camera(draw: Draw, height: int, width: int, style: str) -> Scene:
    """Planes in space seen by a moving pinhole camera: backdrop, ground, two walls and four boards.

    style: "drive" moves forward over a street, "stereo" sideways without turning, "hand" anywhere.
    The plane n . P = d moves in the picture by K (R + t n' / d) K^-1 (Hartley, Zisserman: Multiple View Geometry).
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
    density = focal / depth * _detail(draw)
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
    field = torch.zeros(count, 2, 5, 6)
    return Scene(motion, outline, surface, shape, draw.integer(1 << 20), present, torch.zeros(count, SHEETS), field)


def shapes_world(draw: Draw, height: int, width: int) -> Scene:
    return _flat(draw, height, width, 1.0)


def large_world(draw: Draw, height: int, width: int) -> Scene:
    return _flat(draw, height, width, 3.0)


def small_world(draw: Draw, height: int, width: int) -> Scene:
    return _flat(draw, height, width, 0.1)


def still_world(draw: Draw, height: int, width: int) -> Scene:
    return _flat(draw, height, width, 0.0)


def watch_world(draw: Draw, height: int, width: int) -> Scene:
    """A camera that stands still while objects move: all that is behind them has no motion, textured or not."""
    scene = _flat(draw, height, width, 1.5)
    motion, surface, wobble = scene.motion.clone(), scene.surface.clone(), scene.wobble.clone()
    motion[:, 0], wobble[:, 0] = torch.eye(3), 0
    smooth = torch.where(draw.chance(0.4, 1), draw.log_uniform(0.01, 0.3, 1), 1.0)[:, 0]
    surface[:, 0, :2, :2] *= smooth[:, None, None]
    resting = draw.chance(0.25)
    motion = torch.where(resting[..., None, None], torch.eye(3), motion)
    wobble = torch.where(resting, 0.0, wobble)
    return scene._replace(motion=motion, surface=surface, wobble=wobble)


def blank_world(draw: Draw, height: int, width: int) -> Scene:
    """One colour that does not move, and what the camera adds to it: nothing to match must mean no motion."""
    scene = _flat(draw, height, width, 0.0)
    surface, present = scene.surface.clone(), torch.zeros_like(scene.present)
    surface[..., :2, :2] *= 1e-3
    present[:, 0] = True
    return scene._replace(surface=surface, present=present)


def bare_world(draw: Draw, height: int, width: int) -> Scene:
    """Large objects, most of one colour, some of two parts: only outlines and corners tell how they move."""
    scene = _flat(draw, height, width, 2.0)
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
    of another colour. A piece moves in the picture plane, relative to the landscape (Dosovitskiy et al., "FlowNet",
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
    landscape = about(middle_x, middle_y, *(unit * peaked(40, 4, 15, 1) for _ in range(2)), turned, zoomed)

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
    own = landscape @ about(x, y, *(unit * peaked(120, 3, 10) for _ in range(2)), turned, zoomed)

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
    return Scene(motion, outline, surface, shape, texture, present, bend, torch.zeros(draw.count, 2, 5, 6))


def drive_world(draw: Draw, height: int, width: int) -> Scene:
    return _camera(draw, height, width, "drive")


def stereo_world(draw: Draw, height: int, width: int) -> Scene:
    return _camera(draw, height, width, "stereo")


def hand_world(draw: Draw, height: int, width: int) -> Scene:
    return _camera(draw, height, width, "hand")


World = Callable[[Draw, int, int], Scene]
MIXTURE: dict[World, float] = {
    shapes_world: 0.14,
    large_world: 0.13,
    bare_world: 0.12,
    small_world: 0.05,
    still_world: 0.06,
    watch_world: 0.16,
    drive_world: 0.14,
    stereo_world: 0.07,
    hand_world: 0.04,
    blank_world: 0.03,
    crowd_world: 0.06,
}


def _padded(scene: Scene, sheets: int) -> Scene:
    """The scene with sheets that are not present after its own, so many in all."""
    count, own = scene.present.shape
    none = torch.zeros(count, sheets - own)
    still = torch.eye(3).expand(count, sheets - own, 3, 3)
    new = Scene(still, still, still, none.long(), none.long(), none.bool(), none, scene.field)
    return Scene(*(torch.cat(both, 1) for both in zip(scene[:-1], new[:-1])), scene.field)


def draw_scene(count: int, height: int, width: int, generator: torch.Generator, mixture: dict[World, float]) -> Scene:
    """Returns `count` scenes, the world of each drawn with the probabilities of `mixture`."""
    weights = torch.tensor(list(mixture.values()), dtype=torch.float64)
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    draw = Draw(count, generator)
    scenes = [world(draw, height, width) for world in mixture]
    scenes = [_padded(scene, max(other.present.shape[1] for other in scenes)) for scene in scenes]
    rows = torch.arange(count)
    return Scene(*(torch.stack(fields)[which, rows] for fields in zip(*scenes)))
