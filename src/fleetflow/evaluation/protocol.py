"""How errors are measured: as the authors of a network measured it on a data set, and what is said beside numbers."""

import torch

from fleetflow.data.dataset import Files
from fleetflow.evaluation.baselines import Method, method
from fleetflow.evaluation.saved_flows import SavedFlows
from fleetflow.evaluation.warm_start import Warm
from fleetflow.inference.device import Precision
from fleetflow.inference.exported import open_network
from fleetflow.inference.predictor import Predictor
from fleetflow.models.base import FlowModel
from fleetflow.types import FleetflowError

ITERATIONS = {  # network -> data sets that begin so -> refinement iterations its authors took: for errors, for the test server
    "RAFT": {"sintel": (32, 32), "kitti": (24, 24)},
    "GMA": {"sintel": (12, 32), "kitti": (12, 24)},
}
PER_IMAGE = "mean over the known pixels of a pair, then over the pairs of a set, then over the sets"
POOLED = "over all known pixels of all pairs together (Fl: the official figure of KITTI 2015)"


def fit_for(model: FlowModel, dataset: str) -> FlowModel:
    """Returns the model, which on KITTI pads below only where it pads, as RAFT and its descendants were measured."""
    if dataset.startswith("kitti") and model.fit == "pad":
        model.fit = "pad_bottom"
    return model


def iterations_for(model: FlowModel, dataset: str, *, submission: bool = False) -> int | None:
    """Returns the refinement iterations that the authors of the model took on a data set, or for its test server.

    Elsewhere, and where they say nothing, these are the network's own; None for a network without refinement.
    """
    published = ITERATIONS.get(type(model).__name__, {})
    return next(
        (iterations[submission] for begin, iterations in published.items() if dataset.startswith(begin)),
        model.iterations,
    )


def open_model(
    model: str,
    dataset: str,
    *,
    iterations: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    submission: bool = False,
) -> "Predictor | Method":
    """Returns what predicts: a `method`, or a network with the fit and the iterations (None: `iterations_for`) of the data set.

    Raises:
        FleetflowError: For iterations, a device or a precision that a method is to take, and for unknown names.
    """
    found = method(model)
    if found is None:
        network = fit_for(open_network(model), dataset)
        iterations = iterations_for(network, dataset, submission=submission) if iterations is None else iterations
        return Predictor(network, device=device, precision=precision, iterations=iterations)
    if iterations is not None:
        raise FleetflowError(f"{model} has no refinement iterations; leave --iterations out")
    for option, value in (("device", device), ("precision", precision)):
        if value != "auto":
            raise FleetflowError(f"{model} is no network of ours and takes no --{option}; leave it out")
    return found


def protocol(predict, files: Files, iterations: int | None = None) -> dict[str, str]:
    """Returns how the errors of `predict` on the pairs are measured; arguments as in `measure`."""
    whole = {
        "per image": PER_IMAGE,
        "pooled": POOLED,
        "frames": "whole, at their own size",
        "left out": ", ".join(files.left_out) or "none",
    }
    if files.about:
        whole["pairs"] = files.about
    if any(pair.truths for pair in files.pairs):
        whole["truth"] = "the nearest of the true vectors of a pixel, Fl by the longest, speed by their mean (Spring)"
    if isinstance(predict, Warm):
        count = f"{len(predict.continued)} of {len(files)} pairs"
        whole["start"] = f"warm: where the pair before it in its scene ended ({count})"
        predict = predict.predictor
    if not isinstance(predict, Predictor):
        return {**whole, "method": predict.name if isinstance(predict, Method | SavedFlows) else "a function"}
    own = predict.iterations
    return {
        **whole,
        "weights": f"sha256 {predict.label()['sha256'][:16]}",
        "fit": f"{predict.model.fit} to multiples of {predict.model.stride}",
        "iterations": str(iterations or own) if own else "none",
        "device": torch.cuda.get_device_name(predict.device) if predict.device.type == "cuda" else predict.device.type,
        "precision": str(predict.dtype).removeprefix("torch."),
    }
