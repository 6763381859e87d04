"""How far a flow may be off, and what is hidden: learned from how the flows of both directions and both frames agree.

A network's errors are of its own kind, so each has a small map of its own, fitted on generated footage
(benchmarks/calibrate_uncertainty.py) and kept beside the weights. It has few numbers and only grows: where the flow back
misses more, or the frames differ more, the uncertainty is never smaller.
"""

import json
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.census import census_distance
from fleetflow.ops.warp import inside, warp
from fleetflow.types import Prediction

CLUES = ("missed", "census", "rough", "speed", "flat", "outside", "residual")  # names of what `clues` returns
PATCH = 3  # pixels of half the resolution, of the census
AROUND = 9  # pixels of half the resolution in which a flow is compared with its mean
LEVELS = 4 / 255  # change of brightness from pixel to pixel that counts as half flat


class Confidence(NamedTuple):
    """The map of one network.

    Attributes:
        weights: of each clue, and a constant: their sum is the score, in natural logarithms of pixels.
        score: at which the bounds are known, ascending; between them they are interpolated.
        bound: natural logarithm of the pixels that nine of ten errors are below, at these scores, ascending.
        half: the share of that bound that half of the errors are below.
        hidden: weights and constant for the logit of the probability that frame2 does not show a pixel.
    """

    weights: tuple[float, ...]
    score: tuple[float, ...]
    bound: tuple[float, ...]
    half: float
    hidden: tuple[float, ...]

    def uncertainty(self, seen: Tensor) -> Tensor:
        """Returns [N, h, w] pixels for the clues [N, C, h, w]: nine of ten errors are smaller."""
        score = _weighted(seen, self.weights)
        at, value = (torch.tensor(row, device=seen.device) for row in (self.score, self.bound))
        right = torch.searchsorted(at, score.contiguous()).clamp(1, len(at) - 1)
        share = ((score - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
        return torch.lerp(value[right - 1], value[right], share).exp()

    def occlusion(self, seen: Tensor) -> Tensor:
        """Returns [N, h, w], the probability that frame2 does not show a pixel, for the clues [N, C, h, w]."""
        return _weighted(seen, self.hidden).sigmoid()


@torch.no_grad()
def clues(found: Prediction, frame1: Tensor, frame2: Tensor) -> Tensor:
    """Returns [N, C, h, w], CLUES at half the resolution, each 0 or more; the larger, the less the flow can be trusted.

    Args:
        found: with the flow back.
        frame1, frame2: [N, 3, H, W] in [0, 1].
    """
    assert found.backward is not None  # as asked for
    first, second = (F.avg_pool2d(frame.float(), 2, ceil_mode=True) for frame in (frame1, frame2))
    flow, back = _halved(found.flow), _halved(found.backward)
    missed = _length(flow + warp(back, flow / 2))
    brought = warp(second, flow / 2)
    differs = F.avg_pool2d(census_distance(first, brought, PATCH)[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    mean = F.avg_pool2d(flow, AROUND, 1, AROUND // 2, count_include_pad=False)
    gray = first.mean(1, keepdim=True)
    change = F.max_pool2d(gray, 5, 1, 2) + F.max_pool2d(-gray, 5, 1, 2)
    outside = (~inside(flow / 2)).to(flow.dtype)
    seen = [
        torch.where(outside > 0, 0.0, missed).log1p(),
        torch.where(outside > 0, 0.0, differs),
        _length(flow - mean).log1p(),
        _length(flow).log1p(),
        LEVELS / (LEVELS + change[:, 0]),
        outside,
    ]
    rest = found.residual
    seen.append(torch.zeros_like(missed) if rest is None else F.avg_pool2d(rest.float(), 2, ceil_mode=True).log1p())
    return torch.stack(seen, 1)


def judged(found: Prediction, frame1: Tensor, frame2: Tensor, confidence: Confidence) -> Prediction:
    """Returns the prediction with `occlusion` and `uncertainty`; arguments as of `clues`."""
    seen, size = clues(found, frame1, frame2), found.flow.shape[2:]
    maps = torch.stack((confidence.occlusion(seen), confidence.uncertainty(seen)), 1)
    maps = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    return found._replace(occlusion=maps[:, 0], uncertainty=maps[:, 1])


@lru_cache(maxsize=1)
def known() -> dict[str, Confidence]:
    """Returns the maps of the package, by the first 16 digits of the SHA-256 of a network's weights, and "other"."""
    text = resources.files("fleetflow").joinpath("weights", "confidence.json").read_text()
    return {key: _read(row) for key, row in json.loads(text).items()}


def _read(row: dict[str, Any]) -> Confidence:
    weights, score, bound, hidden = (tuple(row[name]) for name in ("weights", "score", "bound", "hidden"))
    return Confidence(weights, score, bound, float(row["half"]), hidden)


def confidence_of(sha256: str) -> Confidence:
    """Returns the map for a network whose weights have this hash, or the one for networks that have none."""
    maps = known()
    return maps.get(sha256[:16], maps["other"])


def _length(vectors: Tensor) -> Tensor:
    return torch.hypot(vectors[:, 0], vectors[:, 1])


def _halved(flow: Tensor) -> Tensor:
    return F.avg_pool2d(flow.float().nan_to_num(0, 0, 0), 2, ceil_mode=True)  # still in pixels of the whole


def _weighted(seen: Tensor, weights: tuple[float, ...]) -> Tensor:
    *each, constant = weights
    return torch.einsum("nchw,c->nhw", seen, torch.tensor(each, device=seen.device)) + constant
