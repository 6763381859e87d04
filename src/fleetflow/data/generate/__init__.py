"""Procedural training pairs: `generate` gives a batch of frames with exact flow, no data set and no file needed."""

from functools import lru_cache

import torch
from torch import Tensor

from fleetflow.data.generate.camera import draw_camera, film
from fleetflow.data.generate.motion_blur import motion_blurred
from fleetflow.data.generate.own_texture import TRAINING, faint
from fleetflow.data.generate.render import render
from fleetflow.data.generate.scene import PLAIN, Scene
from fleetflow.data.generate.shapes import shape_bank
from fleetflow.data.generate.textures import SIDE, Textures, procedural
from fleetflow.data.generate.worlds import MIXTURE, World, draw_scene
from fleetflow.types import Sample

shapes = lru_cache(maxsize=1)(shape_bank)
default_textures = lru_cache(maxsize=1)(procedural)


def generate(
    count: int,
    height: int,
    width: int,
    *,
    seed: int,
    index: int = 0,
    textures: Textures | None = None,
    mixture: dict[World, float] = MIXTURE,
    full: bool = False,
    camera: bool = True,
) -> Sample:
    """Returns a batch of `count` generated pairs, the same for the same seed, index and size on every machine's CPU.

    Args:
        count, height, width: the batch is [count, 3, height, width].
        index: number of the batch; (seed, index) seeds all that is random in it.
        textures: surfaces; None uses procedural ones. The batch is made on their device.
        mixture: world -> probability.
        full: also gives the backward flow and the occlusion.
        camera: False leaves out motion blur, faint texture and all else in `camera.py` (frames then agree exactly along
            the flow). On other devices than the CPU no video codec runs; blocks are quantized there as JPEG does.
    """
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % 2**63)
    textures = textures or default_textures()
    scene, outlines = dressed(draw_scene(count, height, width, generator, mixture), textures, generator)
    with torch.no_grad():
        rendered = render(scene, textures, outlines, height, width, full)
        frames: list[Tensor] = [rendered.frame1, rendered.frame2]
        if camera:
            for k, front in enumerate((rendered.front1, rendered.front2)):
                frames[k] = motion_blurred(frames[k], front, scene, textures, outlines, k)
            frames = faint(frames, rendered.flow, generator, TRAINING)
            frames = film(frames, draw_camera(count, 2, generator), generator)
    return Sample(frames[0], frames[1], rendered.flow, rendered.valid, rendered.backward, rendered.occluded)


def dressed(scene: Scene, textures: Textures, generator: torch.Generator) -> tuple[Scene, Tensor]:
    """Returns the scene with numbers of shapes and textures that the banks have, and the outlines these count in.

    Where the bank has cut-outs, in every other scene they replace a third of the objects. All on the textures' device.
    """
    outlines = shapes()
    own = len(outlines)
    texture = scene.texture % textures.count
    if textures.plain:
        plain = textures.count + (scene.texture - PLAIN) % textures.plain
        texture = torch.where(scene.texture >= PLAIN, plain, texture)
    shape = torch.where(scene.shape > 0, 1 + scene.shape % (own - 1), scene.shape)
    cut = torch.rand(shape.shape, generator=generator) < 0.35
    cut &= (torch.rand(len(shape), 1, generator=generator) < 0.5) & (shape > 0)
    which = torch.randint(1 << 20, shape.shape, generator=generator)
    surface = scene.surface
    if len(textures.outlines):
        which = which % len(textures.outlines)
        shape = torch.where(cut, own + which, shape)
        texture = torch.where(cut, textures.count + textures.plain + which, texture)
        half = SIDE / 2
        fit = torch.tensor([[half, 0, half - 0.5], [0, half, half - 0.5], [0, 0, 1]])
        surface = torch.where(cut[..., None, None], fit @ scene.outline, surface)
        outlines = torch.cat((outlines, textures.outlines.cpu()))
    scene = scene._replace(texture=texture, shape=shape, surface=surface)
    return Scene(*(field.to(textures.device) for field in scene)), outlines.to(textures.device)


__all__ = ["Textures", "World", "default_textures", "dressed", "generate"]
