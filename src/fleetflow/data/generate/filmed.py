"""Worlds as cameras film them: what people's own clips have and benchmarks lack.

Sheet 0 is what lies behind; it is often plain, and most often it does not move. The other sheets are objects.
"""

import math

import torch
from torch import Tensor

from fleetflow.data.generate.draw import SHEETS, Draw, shift, turn
from fleetflow.data.generate.flat import shapes_over
from fleetflow.data.generate.scene import PLAIN, Scene
from fleetflow.data.generate.textures import SIDE

FASTEST = 160.0  # pixels that a large foreground moves at most
GROUND, WALL, SKY = 0, 1, 2  # kinds of plain surfaces, as `textures.plain_surfaces` has them in turn


def _panned(draw: Draw, height: int, width: int, reach: tuple[float, float], roll: float, zoom: float) -> Tensor:
    """[B, 1, 3, 3] motion of the whole picture: `reach` pixels, sigma of roll in degrees and of zoom as a logarithm."""
    x, y = torch.full((draw.count, 1), width / 2), torch.full((draw.count, 1), height / 2)
    distance, direction = draw.log_uniform(*reach, 1), draw.uniform(0, 2 * math.pi, 1)
    factor = draw.normal(zoom, 1).exp()
    there = shift(x + distance * direction.cos(), y + distance * direction.sin())
    return there @ turn(draw.normal(math.radians(roll), 1), factor, factor) @ shift(-x, -y)


def _unless(still: Tensor, motion: Tensor) -> Tensor:
    """The motion [B, L, 3, 3], none where `still` [B, L]."""
    return torch.where(still[..., None, None], torch.eye(3), motion)


def _behind(draw: Draw, scene: Scene, plain: float, smooth: float, kinds: tuple[int, ...] = (0, 1, 2)) -> Scene:
    """The scene with sheet 0 plain or a small part of a picture, with these probabilities, else all of a picture."""
    choice = draw.uniform(0, 1, 1)
    is_plain, is_smooth = choice < plain, choice > 1 - smooth
    zoom = torch.where(is_smooth, draw.log_uniform(0.01, 0.3, 1), draw.log_uniform(0.5, 1.2, 1))
    at = shift(draw.uniform(0, SIDE, 1), draw.uniform(0, SIDE, 1)) @ turn(draw.normal(0.2, 1), zoom, zoom)
    kind = torch.tensor(kinds)[draw.integer(len(kinds), 1)]
    texture = torch.where(is_plain, PLAIN + 3 * draw.integer(1 << 16, 1) + kind, draw.integer(1 << 20, 1))
    surface, textures = scene.surface.clone(), scene.texture.clone()
    surface[:, :1], textures[:, :1] = at, texture
    return scene._replace(surface=surface, texture=textures)


def watch_world(draw: Draw, height: int, width: int) -> Scene:
    """A camera that stands still while objects move: all that is behind them has no motion, textured or not."""
    scene = _behind(draw, shapes_over(draw, height, width, 1.5), plain=0.2, smooth=0.3)
    resting = draw.chance(0.25)
    resting[:, 0], resting[:, 1] = True, False
    return scene._replace(motion=_unless(resting, scene.motion), wobble=scene.wobble.masked_fill(resting, 0.0))


def _plain_world(draw: Draw, height: int, width: int, kinds: tuple[int, ...]) -> Scene:
    """A plain surface that fills the picture, or all of it below or above a line, and some objects before it."""
    scene = _behind(draw, shapes_over(draw, height, width, 0.7), plain=0.5, smooth=0.2, kinds=kinds)
    outline, shape, texture, surface = (
        part.clone() for part in (scene.outline, scene.shape, scene.texture, scene.surface)
    )
    part = draw.uniform(0.2, 0.9, 1) * height
    edge = part if kinds[0] == GROUND else part - 2 * height
    middle = torch.full_like(edge, width / 2)
    outline[:, 1:2] = turn(draw.normal(0.04, 1), 1 / (2.0 * width), 1.0 / height) @ shift(-middle, -edge - height)
    shape[:, 1] = 0
    texture[:, 1:2] = PLAIN + 3 * draw.integer(1 << 16, 1) + torch.tensor(kinds)[draw.integer(len(kinds), 1)]
    zoom = draw.log_uniform(0.3, 1.2, 1)
    surface[:, 1:2] = shift(draw.uniform(0, SIDE, 1), draw.uniform(0, SIDE, 1)) @ turn(draw.normal(0.2, 1), zoom, zoom)
    camera = _unless(draw.chance(0.75, 1), _panned(draw, height, width, (0.2, 12), 0.5, 0.01))
    resting = draw.chance(0.4)
    resting[:, :2] = True
    motion = camera @ _unless(resting, scene.motion)
    present = torch.arange(SHEETS) <= draw.uniform(1, 6, 1)
    nothing = torch.zeros_like(scene.wobble)
    return scene._replace(
        motion=motion, outline=outline, shape=shape, texture=texture, surface=surface, present=present, wobble=nothing
    )


def ground_world(draw: Draw, height: int, width: int) -> Scene:
    """Dark or gray ground with little texture below a horizon, as parking lots and roads have it."""
    return _plain_world(draw, height, width, (GROUND,))


def plain_world(draw: Draw, height: int, width: int) -> Scene:
    """Walls, skies and water above or behind some objects."""
    return _plain_world(draw, height, width, (WALL, SKY))


def _carried(draw: Draw, height: int, width: int, camera: Tensor, strength: float, resting: float) -> Scene:
    """Objects before a picture, all carried by the motion of the camera [B, 1, 3, 3]; nearer ones a little farther."""
    scene = _behind(draw, shapes_over(draw, height, width, strength), plain=0.1, smooth=0.2)
    still = draw.chance(resting)
    still[:, 0] = True
    nearness = torch.arange(SHEETS) * draw.uniform(0, 0.06, 1) + 1
    shifts = camera.expand(-1, SHEETS, -1, -1).clone()
    shifts[..., :2, 2] = (
        shifts[..., :2, 2]
        + (nearness[..., None] - 1)
        * (camera @ torch.tensor((width / 2, height / 2, 1.0)) - torch.tensor((width / 2, height / 2, 1.0)))[..., :2]
    )
    return scene._replace(motion=shifts @ _unless(still, scene.motion), wobble=scene.wobble.masked_fill(still, 0.0))


def shake_world(draw: Draw, height: int, width: int) -> Scene:
    """A camera held by hand: all moves by a few pixels and turns a little."""
    return _carried(draw, height, width, _panned(draw, height, width, (0.3, 8), 0.3, 0.004), 1.0, 0.6)


def pan_world(draw: Draw, height: int, width: int) -> Scene:
    """A camera that pans, zooms and rolls."""
    return _carried(draw, height, width, _panned(draw, height, width, (2, 60), 2.0, 0.05), 1.0, 0.5)


def front_world(draw: Draw, height: int, width: int) -> Scene:
    """A large, fast, blurred foreground of up to five joined parts before a slow and often plain background.

    Its body covers some 30 to 80 % of the picture and moves by an eighth to half of its size; limbs turn about joints.
    """
    extent, limbs = math.sqrt(height * width), SHEETS - 4
    scene = _behind(draw, shapes_over(draw, height, width, 0.3), plain=0.35, smooth=0.25)
    motion, outline, surface = (part.clone() for part in scene[:3])
    slow = _panned(draw, height, width, (0.1, 4), 0.2, 0.003)
    motion[:, :3] = _unless(draw.chance(0.5, 1), slow) @ _unless(draw.chance(0.6, 3), motion[:, :3])
    motion[:, :1] = _unless(draw.chance(0.5, 1), slow)

    x, y = draw.uniform(0.2, 0.8, 1) * width, draw.uniform(0.3, 0.9, 1) * height
    size, aspect = draw.uniform(0.4, 0.85, 1) * extent, draw.normal(0.25, 1).exp()
    lean = draw.uniform(0, 6.283, 1)
    outline[:, 3:4] = torch.linalg.inv(shift(x, y) @ turn(lean, size * aspect, size / aspect))
    distance = (draw.log_uniform(0.12, 0.5, 1) * extent).clamp(max=FASTEST)
    direction = draw.uniform(0, 6.283, 1)
    twist = turn(draw.normal(math.radians(5), 1), *(draw.normal(0.05, 1).exp(),) * 2)
    body = shift(x + distance * direction.cos(), y + 0.6 * distance * direction.sin()) @ twist @ shift(-x, -y)

    angle = draw.uniform(0, 6.283, limbs)
    jx, jy = x + 0.7 * size * angle.cos(), y + 0.7 * size * angle.sin()  # joints
    length, thick = draw.uniform(0.3, 0.7, limbs) * size, draw.uniform(0.08, 0.3, limbs) * size
    limb = turn(angle + draw.normal(0.5, limbs), length, thick) @ shift(torch.full_like(angle, 0.8), 0 * angle)
    outline[:, 4:] = torch.linalg.inv(shift(jx, jy) @ limb)
    swing = shift(jx, jy) @ turn(draw.normal(math.radians(12), limbs)) @ shift(-jx, -jy)
    motion[:, 3:4], motion[:, 4:] = body, body @ swing

    alike = draw.chance(0.6, limbs)
    texture = scene.texture.clone()
    texture[:, 4:] = torch.where(alike, texture[:, 3:4], texture[:, 4:])
    surface[:, 4:] = torch.where(alike[..., None, None], surface[:, 3:4], surface[:, 4:])
    shape = scene.shape.clone()
    shape[:, 3:] = torch.where(
        draw.chance(0.7, limbs + 1), 3 + 7 * draw.integer(36, limbs + 1) - 1, shape[:, 3:]
    )  # blobs
    present = torch.arange(SHEETS) - 4 < draw.uniform(-0.3, limbs, 1)
    present[:, 1:3] = draw.chance(0.4, 2)
    wobble = torch.zeros_like(scene.wobble)
    wobble[:, 3:] = scene.wobble[:, 3:4]
    return scene._replace(
        motion=motion, outline=outline, surface=surface, shape=shape, texture=texture, present=present, wobble=wobble,
        shutter=draw.shutter(0.7),
    )  # fmt: skip


def darts_world(draw: Draw, height: int, width: int) -> Scene:
    """Small and thin objects that move fast: balls, birds, wires, sticks, limbs far away."""
    scene = _behind(draw, shapes_over(draw, height, width, 1.0), plain=0.2, smooth=0.25)
    camera = _unless(draw.chance(0.5, 1), _panned(draw, height, width, (0.2, 8), 0.3, 0.005))
    thin = draw.chance(0.5)
    half_x = torch.where(thin, draw.log_uniform(10, 60), draw.log_uniform(2.5, 14))
    half_y = torch.where(thin, draw.log_uniform(1.2, 3.5), half_x * draw.uniform(0.5, 1.0))
    x, y = draw.uniform(0.05, 0.95) * width, draw.uniform(0.05, 0.95) * height
    outline = torch.linalg.inv(shift(x, y) @ turn(draw.uniform(0, 6.283), half_x, half_y))
    distance, direction = draw.log_uniform(5, 0.25 * math.sqrt(height * width)), draw.uniform(0, 6.283)
    spin = turn(draw.normal(math.radians(10)))
    motion = camera @ shift(x + distance * direction.cos(), y + distance * direction.sin()) @ spin @ shift(-x, -y)
    motion[:, :1] = camera
    outline[:, 0] = scene.outline[:, 0]
    shape = torch.where(thin, torch.zeros_like(scene.shape), scene.shape)
    shape[:, 0] = -1
    present = torch.arange(SHEETS) <= draw.uniform(1, SHEETS, 1)
    wobble = torch.zeros_like(scene.wobble)
    return scene._replace(
        motion=motion, outline=outline, shape=shape, present=present, wobble=wobble, shutter=draw.shutter(0.4)
    )
