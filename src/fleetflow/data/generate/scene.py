"""What a generated scene is: plane sheets, back to front, each moving by its own homography, the front hiding the rest.

Everything is exact by construction. A sheet has coordinates z. Frame1 shows the sheet at z = x + wobble * field(x), a
smooth non-rigid bend; frame2 shows it at z = motion^-1(y). So the flow of a pixel of frame1 is motion(z) - x, with no
search and no interpolation. A sheet is visible where its outline says so and where it lies in front of the camera.
The flow is that of the middle of both exposures; while the shutter is open, sheets move on evenly (`motion_blur.py`).
"""

from typing import NamedTuple

from torch import Tensor

PLAIN = 1 << 24  # numbers of textures from here on mean the plain surfaces of the bank


class Scene(NamedTuple):
    """A batch of B scenes of L sheets, sheet 0 the hindmost. Homographies act on (x, y, 1) in pixels."""

    motion: Tensor  # [B, L, 3, 3] sheet -> frame2, pixels
    outline: Tensor  # [B, L, 3, 3] sheet -> coordinates of its shape ([-1, 1] is its square)
    surface: Tensor  # [B, L, 3, 3] sheet -> pixels of its texture
    shape: Tensor  # [B, L] number of the shape in the bank; -1 means all of the plane
    texture: Tensor  # [B, L] number of the texture in the bank
    present: Tensor  # [B, L] bool
    wobble: Tensor  # [B, L] strength of the bend
    field: Tensor  # [B, 2, h, w] pixels, coarse samples of the bend, shared by the sheets of a scene
    shutter: Tensor  # [B] share of the time between frames that the shutter is open
