"""The outlines of generated objects, as a bank of small signed fields: positive inside, 0 on the outline."""

import torch
from torch import Tensor

GRID = 64  # samples per side; a shape lives in the square [-1, 1] x [-1, 1] and is empty outside


def shape_bank(count: int = 256, seed: int = 0) -> Tensor:
    """Returns [count, GRID, GRID] float: discs, polygons, blobs, rings, clusters with holes, furniture.

    Number 0 is the whole square; the others come in about equal parts.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, GRID)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.ones_like(x)] + [_shape(k % 7, x, y, generator) for k in range(1, count)])


def _uniform(generator: torch.Generator, low: float, high: float, *size: int) -> Tensor:
    return torch.rand(size, generator=generator) * (high - low) + low


def _polygon(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """3 to 12 corners at uneven angles and radii, edges straight."""
    corners = int(torch.randint(3, 13, (), generator=generator))
    angles = (torch.arange(corners) + _uniform(generator, -0.25, 0.25, corners)) * (2 * torch.pi / corners)
    angles = angles + _uniform(generator, 0, 6.3)
    radii = _uniform(generator, float(_uniform(generator, 0.3, 0.9)), 1.0, corners)
    px, py = radii * angles.cos(), radii * angles.sin()
    qx, qy = px.roll(-1), py.roll(-1)
    ex, ey = qx - px, qy - py
    dx, dy = x[..., None] - px, y[..., None] - py
    along = ((dx * ex + dy * ey) / (ex**2 + ey**2)).clamp(0, 1)
    distance = ((dx - along * ex) ** 2 + (dy - along * ey) ** 2).sqrt().amin(-1)
    crosses = (py > y[..., None]) != (qy > y[..., None])
    where = px + (y[..., None] - py) * ex / torch.where(ey.abs() < 1e-9, 1e-9, ey)
    inside = (crosses & (x[..., None] < where)).sum(-1) % 2 == 1
    return torch.where(inside, distance, -distance)


def _blob(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """A radius that varies smoothly with the angle."""
    angle = torch.atan2(y, x)
    radius = torch.zeros_like(x)
    for k in range(1, 6):
        radius = radius + torch.randn((), generator=generator) / k * torch.cos(k * angle + _uniform(generator, 0, 6.3))
    radius = 0.65 + 0.3 * torch.tanh(radius)
    return radius - (x**2 + y**2).sqrt()


def _furniture(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """A polygon on thin legs and struts, as chairs, lamps and trees have them."""
    size = float(_uniform(generator, 0.35, 0.6))
    cx, cy = _uniform(generator, -0.3, 0.3, 2)
    field = size * _polygon((x - cx) / size, (y - cy) / size, generator)
    along = _uniform(generator, 0, 6.3)  # the way the legs point, more or less
    for _ in range(int(torch.randint(3, 8, (), generator=generator))):
        angle = along + _uniform(generator, -0.25, 0.25)
        if torch.rand((), generator=generator) < 0.25:
            angle = angle + torch.pi / 2  # a strut between them
        sx, sy = torch.stack([cx, cy]) + _uniform(generator, -0.5, 0.5, 2) * size
        length, thick = _uniform(generator, 0.4, 1.4), _uniform(generator, 0.025, 0.07)
        u = (x - sx) * angle.cos() + (y - sy) * angle.sin()
        v = (y - sy) * angle.cos() - (x - sx) * angle.sin()
        field = torch.maximum(field, torch.minimum(torch.minimum(u, length - u), thick - v.abs()))
    return torch.minimum(field, 0.97 - torch.maximum(x.abs(), y.abs()))


def _shape(kind: int, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    if kind == 0:
        return 0.97 - (x**2 + y**2).sqrt()
    if kind in (1, 2):
        return _polygon(x, y, generator)
    if kind == 3:
        return _blob(x, y, generator)
    if kind == 4:  # a frame or ring: a shape without its smaller copy
        outer = _polygon(x, y, generator) if torch.rand((), generator=generator) < 0.5 else _blob(x, y, generator)
        return torch.minimum(outer, float(_uniform(generator, 0.12, 0.35)) - outer)
    if kind == 6:
        return _furniture(x, y, generator)
    field = torch.full_like(x, -1.0)  # a cluster: parts joined, every third one cut out
    for part in range(int(torch.randint(2, 6, (), generator=generator))):
        size = _uniform(generator, 0.25, 0.6)
        cx, cy = _uniform(generator, -0.5, 0.5, 2)
        piece = size * _polygon((x - cx) / size, (y - cy) / size, generator)
        field = torch.minimum(field, -piece) if part % 3 == 2 else torch.maximum(field, piece)
    edge = 0.97 - torch.maximum(x.abs(), y.abs())
    return torch.minimum(field, edge)
