"""What people do with a flow: warping, occlusion, arithmetic of flows, the camera's part, cuts, tracks, scores of clips.

    from fleetflow import motion
    there_and_on, valid = motion.compose(flow_1_2, flow_2_3)

The names below are imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_HOME` says the same, to be imported at the first use
    from fleetflow.motion.algebra import compose as compose
    from fleetflow.motion.algebra import crop as crop
    from fleetflow.motion.algebra import inside as inside
    from fleetflow.motion.algebra import invert as invert
    from fleetflow.motion.algebra import resize as resize
    from fleetflow.motion.algebra import sample as sample
    from fleetflow.motion.arrays import Masked as Masked
    from fleetflow.motion.camera import CameraFit as CameraFit
    from fleetflow.motion.camera import camera_flow as camera_flow
    from fleetflow.motion.camera import fit_fundamental as fit_fundamental
    from fleetflow.motion.camera import fit_homography as fit_homography
    from fleetflow.motion.camera import fit_similarity as fit_similarity
    from fleetflow.motion.camera import residual_motion as residual_motion
    from fleetflow.motion.consistency import occlusion as occlusion
    from fleetflow.motion.cuts import CutState as CutState
    from fleetflow.motion.cuts import find_cuts as find_cuts
    from fleetflow.motion.cuts import is_cut as is_cut
    from fleetflow.motion.scores import ClipMotion as ClipMotion
    from fleetflow.motion.scores import score as score
    from fleetflow.motion.splatting import splat as splat
    from fleetflow.motion.tracks import Tracks as Tracks
    from fleetflow.motion.tracks import grid as grid
    from fleetflow.motion.tracks import track as track
    from fleetflow.motion.warping import warp as warp

_HOME = {
    "algebra": ("compose", "crop", "inside", "invert", "resize", "sample"),
    "arrays": ("Masked",),
    "camera": ("CameraFit", "camera_flow", "fit_fundamental", "fit_homography", "fit_similarity", "residual_motion"),
    "consistency": ("occlusion",),
    "cuts": ("CutState", "find_cuts", "is_cut"),
    "scores": ("ClipMotion", "score"),
    "splatting": ("splat",),
    "tracks": ("Tracks", "grid", "track"),
    "warping": ("warp",),
}
_FILES = {name: file for file, names in _HOME.items() for name in names}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'fleetflow.motion' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fleetflow.motion.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
