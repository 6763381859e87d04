"""Evaluate: the errors of a network on a data set by pair, by set, as the mean of sets and pooled."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import Files, to_images
from fleetflow.evaluation.baselines import Method
from fleetflow.evaluation.machine import machine
from fleetflow.evaluation.metrics import (
    SPARSE_STEPS,
    Mean,
    boundary_rule,
    error_histogram,
    flicker,
    judge,
    mean_over_sets,
    pair_errors,
    pixel_sums,
    pool,
    sparsification,
    speed_profile,
    still_histogram,
)
from fleetflow.evaluation.protocol import protocol
from fleetflow.evaluation.saved_flows import SavedFlows
from fleetflow.evaluation.warm_start import Warm
from fleetflow.inference.predictor import Predictor
from fleetflow.types import FleetflowError, Sample


class PairResult(NamedTuple):
    """What was measured on one pair; see `metrics` for the parts."""

    group: str
    name: str
    errors: dict[str, float]  # pair_errors
    sums: dict[str, Mean]  # pixel_sums
    histogram: Tensor  # error_histogram of the known pixels
    still: Tensor  # still_histogram
    speeds: Tensor  # speed_profile
    curves: Tensor | None  # sparsification, for networks that say how sure they are
    boundaries: str  # boundary_rule

    def is_sorted(self) -> bool:
        """Returns True where there are curves, and they say something: where no error is infinite."""
        return self.curves is not None and bool(self.curves.isfinite().all())


class Evaluation(NamedTuple):
    """The errors of a model on a data set, and how they were measured."""

    model: str
    dataset: str
    protocol: dict[str, str]
    machine: dict[str, str]
    pairs: list[PairResult]
    skipped: list[str]  # pairs whose truth has no known pixel

    def score(self) -> dict[str, dict[str, float]]:
        """Returns per set, and for the "mean of sets", the mean over its pairs: the house score."""
        return mean_over_sets([(pair.group, pair.errors) for pair in self.pairs])

    def pooled(self) -> dict[str, dict[str, Mean]]:
        """Returns per set, and under "all", the sums over all pixels, under the names of `pixel_sums`."""
        groups = dict.fromkeys(pair.group for pair in self.pairs)
        table = {name: pool(pair.sums for pair in self.pairs if pair.group == name) for name in groups}
        return {**table, "all": pool(table.values())}

    def histogram(self) -> Tensor:
        """Returns the histogram of the errors of all pixels."""
        return torch.stack([pair.histogram for pair in self.pairs]).sum(0)

    def speeds(self) -> Tensor:
        """Returns the sums and numbers of errors by speed over all pixels, [2, 10]."""
        return torch.stack([pair.speeds for pair in self.pairs]).sum(0)

    def curves(self) -> Tensor | None:
        """Returns the mean sparsification of the pairs but those of `unsorted`, [2, 20], where the network has any."""
        known = [pair.curves for pair in self.pairs if pair.curves is not None and pair.is_sorted()]
        return torch.stack(known).mean(0) if known else None

    def unsorted(self) -> list[str]:
        """Returns the pairs that `curves` leaves out, as their flow is not finite everywhere."""
        lost = [pair for pair in self.pairs if pair.curves is not None and not pair.is_sorted()]
        return [f"{pair.group}/{pair.name}" for pair in lost]


class Estimate(NamedTuple):
    """One pair with what was predicted for it."""

    sample: Sample
    flow: Tensor  # [2, H, W] float32 pixels
    uncertainty: Tensor | None  # [H, W], the residual of the prediction
    foreground: Tensor | None  # [H, W] bool


def evaluate(
    predict, files: Files, *, iterations: int | None = None, progress=lambda done, total: None
) -> dict[str, dict[str, float]]:
    """Returns per set, and for the "mean of sets", the mean over its pairs of epe, out1, out3, out5 and fl.

    Protocol: errors are averaged over the known pixels of each pair, then over the pairs of a set, then over the sets.

    Args:
        predict, iterations: as in `measure`.
    """
    rows = []
    for k, pair in enumerate(files.pairs):
        found = estimate(predict, files, k, iterations)
        rows.append((pair.group, pair_errors(found.flow, found.sample)))
        progress(k + 1, len(files))
    return mean_over_sets(rows)


def measure(
    predict, files: Files, *, model: str, dataset: str, iterations: int | None = None, progress=lambda done, total: None
) -> Evaluation:
    """Returns all errors of a model on a data set; memory does not grow with the size of the frames.

    Args:
        predict: a `Predictor`, one that is `Warm`, `SavedFlows` of these files, or a function of two uint8 [H, W, 3]
            RGB images that returns the flow, float32 [H, W, 2].
        model, dataset: what to call them.
        iterations: of refinement; None takes those of the predictor.

    Raises:
        FleetflowError: Where no pair has a known pixel.
    """
    results, skipped, last = [], [], None
    for k, pair in enumerate(files.pairs):
        sample, flow, uncertainty, foreground = estimate(predict, files, k, iterations)
        valid = sample.valid
        if valid.any():
            judged = judge(flow, sample)
            error = judged.error[valid]
            sums = pixel_sums(flow, sample, foreground=foreground)
            if last and last[0].group == pair.group and last[0].frame2 == pair.frame1 and sample.truths is None:
                sums["flicker"] = flicker(*last[1:], flow, sample)
            last = pair, flow, sample
            results.append(
                PairResult(
                    pair.group,
                    pair.name,
                    pair_errors(flow, sample),
                    sums,
                    error_histogram(error),
                    still_histogram(judged, valid),
                    speed_profile(judged.error, judged.speed, valid),
                    None if uncertainty is None else _curves(error, uncertainty[valid]),
                    boundary_rule(sample),
                )
            )
        else:
            skipped.append(f"{pair.group}/{pair.name}")
        progress(k + 1, len(files))
    if not results:
        raise FleetflowError(f"no pair of {dataset} has a known pixel; check the truth of the data set")
    rules = Counter(pair.boundaries for pair in results)
    how = {
        **protocol(predict, files, iterations),
        "d-bands": ", ".join(f"{rule} in {count} pairs" for rule, count in rules.items() if rule) or "none",
    }
    return Evaluation(model, dataset, how, machine(), results, skipped)


def _curves(error: Tensor, uncertainty: Tensor) -> Tensor:
    """The sparsification; NaN where an error is infinite, which no curve can show."""
    if error.isfinite().all():
        return sparsification(error, uncertainty)
    return torch.full((2, SPARSE_STEPS), math.nan, dtype=torch.float64)


def estimate(predict, files: Files, k: int, iterations: int | None = None) -> Estimate:
    """Returns pair k with its predicted flow; `predict` and `iterations` as in `measure`."""
    sample, masks = files.judged(k), {name: torch.from_numpy(mask) for name, mask in files.masks(k).items()}
    for name, mask in masks.items():
        if mask.shape != sample.valid.shape:
            sizes = f"{list(mask.shape)} for frames {list(sample.valid.shape)}"
            raise FleetflowError(f'the mask "{name}" of {files.pairs[k].name} is {sizes}; both must have the same size')
    sample, foreground = sample._replace(occluded=masks.get("occluded", sample.occluded)), masks.get("foreground")
    if isinstance(predict, Predictor | Warm):
        if isinstance(predict, Warm):
            found = predict.pair(k, iterations)
        else:
            found = predict.predict(*to_images(sample), iterations=iterations)
        sure = found.residual if found.uncertainty is None else found.uncertainty
        return Estimate(
            sample, found.flow[0].float().cpu(), None if sure is None else sure[0].float().cpu(), foreground
        )
    if iterations is not None:
        raise FleetflowError("this method has no refinement iterations; leave --iterations out")
    flow = _other_flow(predict, files, k, sample)
    return Estimate(sample, torch.from_numpy(np.ascontiguousarray(flow, np.float32)).permute(2, 0, 1), None, foreground)


def _other_flow(predict, files: Files, k: int, sample: Sample) -> np.ndarray:
    """The flow [H, W, 2] of pair k, of what is no network of ours: saved flows, a method, or any function."""
    pair = files.pairs[k]
    if isinstance(predict, Method):
        return predict(*to_images(sample), f"{pair.group}/{pair.name}")
    if not isinstance(predict, SavedFlows):
        return predict(*to_images(sample))
    flow, (height, width) = predict(k), sample.valid.shape
    if flow.shape[:2] != (height, width):
        size = f"{flow.shape[0]}x{flow.shape[1]}, the frames of {pair.group}/{pair.name} {height}x{width}"
        raise FleetflowError(f"{predict.flows[k]} is {size}; save each flow at the size of its frames")
    return flow
