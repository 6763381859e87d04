"""Procedural training pairs: `generate` gives a batch of frames with exact flow, no data set and no file needed."""

from functools import lru_cache

import torch

from fleetflow.data.generate.own_texture import faint
from fleetflow.data.generate.photometric import photometric
from fleetflow.data.generate.render import render
from fleetflow.data.generate.shapes import shape_bank
from fleetflow.data.generate.textures import Textures, procedural
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

    count, height, width: the batch is [count, 3, height, width].
    index: number of the batch; (seed, index) seeds all that is random in it.
    textures: surfaces; None uses procedural ones. The batch is made on their device.
    mixture: world -> probability.
    full: also gives the backward flow and the occlusion.
    camera: False leaves out faint texture, exposure, blur and noise (frames then agree exactly along the flow).
    """
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % 2**63)
    textures = textures or default_textures()
    scene = draw_scene(count, height, width, generator, mixture)
    outlines = shapes()
    scene = scene._replace(
        texture=scene.texture % textures.count,
        shape=torch.where(scene.shape > 0, 1 + scene.shape % (len(outlines) - 1), scene.shape),
    )
    scene = type(scene)(*(field.to(textures.device) for field in scene))
    with torch.no_grad():
        rendered = render(scene, textures, outlines.to(textures.device), height, width, full)
        frame1, frame2 = rendered.frame1, rendered.frame2
        if camera:
            frame1, frame2 = faint(frame1, frame2, rendered.flow, generator)
            frame1, frame2 = photometric(frame1, frame2, generator)
    return Sample(frame1, frame2, rendered.flow, rendered.valid, rendered.backward, rendered.occluded)


__all__ = ["Textures", "World", "default_textures", "generate"]
