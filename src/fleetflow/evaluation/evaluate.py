"""Evaluate: a network's errors on a data set by pair, by set, as the mean of sets and pooled, with their protocol."""

import hashlib
import inspect
import math
import platform
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import Files, datasets
from fleetflow.evaluation.metrics import (
    SPARSE_STEPS,
    Mean,
    ause,
    boundary_rule,
    error_histogram,
    judge,
    mean_over_sets,
    pair_errors,
    pixel_sums,
    pool,
    quantile,
    sparsification,
    speed_profile,
)
from fleetflow.inference.device import Precision
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import writing
from fleetflow.io.images import read_image
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import load
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Prediction, Sample

DIS, FARNEBACK, DEEPFLOW = "dis", "farneback", "deepflow"
FARNEBACK_SETTINGS = (0.5, 5, 15, 3, 7, 1.5)  # scale of a level, levels, window, iterations, neighborhood, its sigma
CLASSICAL = {  # what each of OpenCV's methods is, in tables and protocols
    DIS: "OpenCV DIS (medium)",
    FARNEBACK: f"OpenCV Farneback {FARNEBACK_SETTINGS}",
    DEEPFLOW: "OpenCV DeepFlow",
}
TRIAL = (125, 187)  # height and width of the pictures that a method of the user is tried on; multiples of nothing
ITERATIONS = {  # network -> data sets that begin so -> refinement iterations its authors took: for errors, for the test server
    "RAFT": {"sintel": (32, 32), "kitti": (24, 24)},
    "GMA": {"sintel": (12, 32), "kitti": (12, 24)},
}
QUANTILES = (0.5, 0.9, 0.95, 0.99)
PER_IMAGE = "mean over the known pixels of a pair, then over the pairs of a set, then over the sets"
POOLED = "over all known pixels of all pairs together (Fl: the official figure of KITTI 2015)"
ALL_PIXELS = "all pixels"

LABELS = {
    "epe": "EPE, px",
    "out1": "over 1 px, %",
    "out3": "over 3 px, %",
    "out5": "over 5 px, %",
    "fl": "Fl-all, %",
    "fl_bg": "Fl-bg, %",
    "fl_fg": "Fl-fg, %",
    "fl_visible": "Fl-all, visible, %",
    "out3_visible": "over 3 px, visible, %",
    "epe_visible": "EPE, visible, px",
    "epe_occluded": "EPE, occluded, px",
    "s0-10": "EPE of motion under 10 px",
    "s10-40": "EPE of motion of 10 to 40 px",
    "s40+": "EPE of motion from 40 px on",
    "d0-10": "EPE under 10 px from a boundary",
    "d10-60": "EPE 10 to 60 px from a boundary",
    "d60-140": "EPE 60 to 140 px from a boundary",
    "angle": "angular error, degrees",
    "wauc": "WAUC, % (100 is best)",
    "not_finite": "not finite, %",
}


class PairResult(NamedTuple):
    """What was measured on one pair; see `metrics` for the parts."""

    group: str
    name: str
    errors: dict[str, float]  # pair_errors
    sums: dict[str, Mean]  # pixel_sums
    histogram: Tensor  # error_histogram of the known pixels
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
        known = [pair.curves for pair in self.pairs if pair.is_sorted()]
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


def open_files(dataset: str, root: Path, *, options: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Files:
    """Returns the pairs of a data set, but those named in `without`.

    options: name=value of its reader, such as render=clean.
    Raises FleetflowError for an unknown data set, option or pair, and for what is missing on disk.
    """
    reader = datasets[dataset]
    known = [name for name in inspect.signature(reader).parameters if name not in ("root", "without")]
    given = dict(text.partition("=")[::2] for text in options)
    for name in given:
        if name not in known:
            raise unknown(f"option of {dataset}", name, known)
    return reader(root, **given).without(without)


def evaluate(
    predict, files: Files, *, iterations: int | None = None, progress=lambda done, total: None
) -> dict[str, dict[str, float]]:
    """Returns per set, and for the "mean of sets", the mean over its pairs of epe, out1, out3, out5 and fl.

    predict, iterations: as in `measure`.
    Protocol: errors are averaged over the known pixels of each pair, then over the pairs of a set, then over the sets.
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

    predict: a `Predictor`, one that is `Warm`, or a function of two uint8 [H, W, 3] RGB images that returns the flow,
        float32 [H, W, 2]. model, dataset: what to call them. iterations: of refinement; None takes those of the predictor.
    Raises FleetflowError where no pair has a known pixel.
    """
    results, skipped = [], []
    for k, pair in enumerate(files.pairs):
        sample, flow, uncertainty, foreground = estimate(predict, files, k, iterations)
        valid = sample.valid
        if valid.any():
            judged = judge(flow, sample)
            error = judged.error[valid]
            results.append(
                PairResult(
                    pair.group,
                    pair.name,
                    pair_errors(flow, sample),
                    pixel_sums(flow, sample, foreground=foreground),
                    error_histogram(error),
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
    images = _images(sample)
    if isinstance(predict, Predictor | Warm):
        prediction = (
            predict.pair(k, iterations)
            if isinstance(predict, Warm)
            else predict.predict(*images, iterations=iterations)
        )
        sure = prediction.residual if prediction.uncertainty is None else prediction.uncertainty
        return Estimate(
            sample, prediction.flow[0].float().cpu(), None if sure is None else sure[0].float().cpu(), foreground
        )
    if iterations is not None:
        raise FleetflowError("this method has no refinement iterations; leave --iterations out")
    flow = torch.from_numpy(np.ascontiguousarray(predict(*images), np.float32)).permute(2, 0, 1)
    return Estimate(sample, flow, None, foreground)


def fit_for(model: FlowModel, dataset: str) -> FlowModel:
    """Returns the model, which on KITTI pads below only where it pads, as RAFT and its descendants were measured."""
    for part in model.modules():  # those of a blend
        if dataset.startswith("kitti") and isinstance(part, FlowModel) and part.fit == "pad":
            part.fit = "pad_bottom"
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

    Raises FleetflowError for iterations, a device or a precision that a method is to take, and for unknown names.
    """
    found = method(model)
    if found is None:
        network = fit_for(load(model), dataset)
        iterations = iterations_for(network, dataset, submission=submission) if iterations is None else iterations
        return Predictor(network, device=device, precision=precision, iterations=iterations)
    if iterations is not None:
        raise FleetflowError(f"{model} has no refinement iterations; leave --iterations out")
    for option, value in (("device", device), ("precision", precision)):
        if value != "auto":
            raise FleetflowError(f"{model} is no network of ours and takes no --{option}; leave it out")
    return found


class Warm:
    """A network that begins each pair where it ended on the pair before, if that ends with the frame this begins with.

    pairs: what has files `frame1` and `frame2`, in order. A result depends on no other call: what comes before a pair
    in its scene is predicted again if it was not the last call.
    Raises FleetflowError for a method, and where no pair continues the one before it.
    """

    def __init__(self, predict: "Predictor | Method", pairs: Sequence):
        if not isinstance(predict, Predictor):
            raise FleetflowError(f"{predict.name} keeps nothing for the next pair; leave --warm-start out")
        self.predictor, self.pairs = predict, pairs
        frames = [(pair.frame1, pair.frame2) for pair in pairs]
        moves = enumerate(pairwise(frames), 1)
        self.continued = {k for k, (old, new) in moves if new[0] == old[1] and new[1] != old[0]}  # forward, not back
        self.last: tuple[int, Prediction | None] | None = None  # None: not finite, so the next pair starts cold
        if not self.continued:
            raise FleetflowError("no pair here begins with the frame that ends the one before; leave --warm-start out")

    def pair(self, k: int, iterations: int | None = None) -> Prediction:
        """Returns the prediction of pair k; raises FleetflowError for a network without a state."""
        first = k
        while first in self.continued and (self.last is None or self.last[0] != first - 1):
            first -= 1
        for place in range(first, k + 1):
            previous = self.last[1] if place in self.continued else None
            images = [read_image(file) for file in (self.pairs[place].frame1, self.pairs[place].frame2)]
            found = self.predictor.predict(*images, previous, iterations)
            if found.state is None:
                network = type(self.predictor.model).__name__
                raise FleetflowError(f"{network} keeps nothing for the next pair; leave --warm-start out")
            self.last = place, found if found.flow.isfinite().all() else None
        return found


def _images(sample: Sample) -> list[np.ndarray]:
    return [(frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for frame in sample[:2]]


def protocol(predict, files: Files, iterations: int | None = None) -> dict[str, str]:
    """Returns how the errors of `predict` on the pairs are measured; arguments as in `measure`."""
    whole = {
        "per image": PER_IMAGE,
        "pooled": POOLED,
        "frames": "whole, at their own size",
        "left out": ", ".join(files.left_out) or "none",
    }
    if any(pair.truths for pair in files.pairs):
        whole["truth"] = "the nearest of the true vectors of a pixel, Fl by the longest, speed by their mean (Spring)"
    if isinstance(predict, Warm):
        count = f"{len(predict.continued)} of {len(files)} pairs"
        whole["start"] = f"warm: where the pair before it in its scene ended ({count})"
        predict = predict.predictor
    if not isinstance(predict, Predictor):
        return {**whole, "method": predict.name if isinstance(predict, Method) else "a function"}
    own = predict.iterations
    return {
        **whole,
        "weights": f"sha256 {predict.label()['sha256'][:16]}",
        "fit": f"{predict.model.fit} to multiples of {predict.model.stride}",
        "iterations": str(iterations or own) if own else "none",
        "device": torch.cuda.get_device_name(predict.device) if predict.device.type == "cuda" else predict.device.type,
        "precision": str(predict.dtype).removeprefix("torch."),
    }


def machine() -> dict[str, str]:
    """Returns processor, system, threads and versions behind numbers; those of OpenCV and CUDA if they took part."""
    cv2, cuda = sys.modules.get("cv2"), torch.cuda.is_initialized()
    processor, listed = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if listed.exists():
        names = [line for line in listed.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "system": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"} if cuda else {}),
        "numpy": np.__version__,
        **({"opencv": f"{cv2.__version__}, {cv2.getNumThreads()} threads"} if cv2 else {}),
        "fleetflow": version("fleetflow"),
    }


class Method(NamedTuple):
    """What is no network of ours; called with two images, uint8 [H, W, 3] RGB, it returns the flow [H, W, 2] pixels."""

    name: str
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    file: Path | None = None  # of the user, whose function it is

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Returns the flow, float32; raises FleetflowError where the method fails, or returns anything else."""
        height, width = image1.shape[:2]
        who, size = f"predict of {self.file}" if self.file else self.name, f"{height}x{width}"
        try:
            flow = np.asarray(self.predict(image1, image2))
        except Exception as error:  # whatever the code of others raises
            raise FleetflowError(f"{who} failed on two pictures of {size} ({_words(error)}); mend it") from None
        if flow.shape != (height, width, 2) or not np.issubdtype(flow.dtype, np.floating):
            got = f"{flow.dtype} {list(flow.shape)}"
            raise FleetflowError(f"{who} returned {got} for pictures of {size}; expected float [{height}, {width}, 2]")
        return flow.astype(np.float32, copy=False)

    def label(self) -> dict[str, str]:
        """Returns what its results depend on, for a note beside them."""
        content = {"sha256": hashlib.sha256(self.file.read_bytes()).hexdigest()} if self.file else {}
        return {"model": self.name, **content}


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def method(name: str) -> Method | None:
    """Returns the classical method of that name, or that of a Python file NAME.py; None for any other name."""
    if name.endswith(".py"):
        return adapter(Path(name))
    return classical(name) if name in CLASSICAL else None


def adapter(path: Path) -> Method:
    """Returns the function predict(image1, image2) of a Python file, which is run, after one call to try it.

    While the file is run and tried, what lies beside it can be imported.
    Raises FleetflowError where there is no such function, or the trial fails.
    """
    if not path.is_file():
        raise FleetflowError(f"{path} does not exist; name {', '.join(CLASSICAL)} or a Python file with predict(a, b)")
    images = np.random.default_rng(0).integers(0, 256, (2, *TRIAL, 3), dtype=np.uint8)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found = Method(path.stem, runpy.run_path(str(path)).get("predict"), path)
        if callable(found.predict):
            found(*images)
    except FleetflowError:
        raise
    except Exception as error:  # whatever the code of the user raises
        raise FleetflowError(f"{path} cannot be run ({_words(error)}); mend it") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not callable(found.predict):
        raise FleetflowError(f"{path} has no function predict(image1, image2); add one that returns the flow")
    return found


def classical(name: str) -> Method:
    """Returns a method of OpenCV: "dis" (its medium preset), "farneback" or "deepflow".

    OpenCV takes as many threads as torch does now.
    Raises FleetflowError for another name, or where OpenCV or the part with DeepFlow is not installed.
    """
    if name not in CLASSICAL:
        raise FleetflowError(f'"{name}" is no classical method; known: {", ".join(CLASSICAL)}')
    try:
        import cv2
    except ImportError:
        raise FleetflowError(f'{name} needs OpenCV; install it with pip install "fleetflow[bench]"') from None
    if name == DEEPFLOW and not hasattr(cv2, "optflow"):
        raise FleetflowError('deepflow is in opencv-contrib, not in this OpenCV; run pip install "fleetflow[bench]"')
    cv2.setNumThreads(torch.get_num_threads())
    compute = {
        DIS: lambda: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc,
        FARNEBACK: lambda: lambda a, b, _: cv2.calcOpticalFlowFarneback(a, b, None, *FARNEBACK_SETTINGS, 0),
        DEEPFLOW: lambda: cv2.optflow.createOptFlow_DeepFlow().calc,
    }[name]()

    def predict(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image1, image2)]
        return compute(*gray, None)

    return Method(CLASSICAL[name], predict)


# ---- what is written ----


def make_room(*files: Path | None) -> None:
    """Makes the folders of files that are to be written; raises FleetflowError now where a job would at its end."""
    given = [file for file in files if file is not None]
    for file in given:
        if file.is_dir():
            raise FleetflowError(f"{file} is a folder; name a file in it")
        if [other.resolve() for other in given].count(file.resolve()) > 1:
            raise FleetflowError(f"{file} is named for two outputs; give each a file of its own")
    for file in given:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)


def rows_by_set(evaluation: Evaluation) -> list[list[str]]:
    """Returns the score by set as text: set, EPE per image and pooled, over 1, 3, 5 px, Fl per image and pooled.

    The last rows are the mean of the sets, of what is a mean over images, and all pixels, of what is pooled.
    """
    score, pooled = evaluation.score(), evaluation.pooled()
    pooled[ALL_PIXELS] = pooled.pop("all")
    rows = []
    for name in dict.fromkeys((*score, *pooled)):
        row, sums = score.get(name, {}), pooled.get(name, {})
        per_image = [text(row.get(key, math.nan)) for key in ("epe", "out1", "out3", "out5", "fl")]
        whole = [text(sums[key].value if sums else math.nan) for key in ("epe", "fl")]
        rows.append([name, per_image[0], whole[0], *per_image[1:], whole[1]])
    return rows


SET_COLUMNS = ["set", "EPE px", "EPE pooled", "% over 1", "% over 3", "% over 5", "Fl %", "Fl pooled"]


def rows_pooled(evaluation: Evaluation) -> list[list[str]]:
    """Returns the pooled errors of all pairs as text: what, value, number of pixels; only what has pixels."""
    sums = evaluation.pooled()["all"]
    rows = [[label, text(sums[key].value), f"{sums[key].count:,}"] for key, label in LABELS.items() if key in sums]
    rows = [row for row in rows if row[2] != "0"]
    pixels, histogram = f"{sums['epe'].count:,}", evaluation.histogram()
    rows += [[f"error of {share:.0%} of the pixels is at most, px", text(quantile(histogram, share)), pixels]
             for share in QUANTILES]  # fmt: skip
    curves = evaluation.curves()
    if curves is not None:
        counts = [pair.sums["epe"].count for pair in evaluation.pairs if pair.is_sorted()]
        rows.append([f"AUSE, mean over {len(counts)} pairs (0 is best)", f"{ause(curves):.3f}", f"{sum(counts):,}"])
    return rows


def text(value: float) -> str:
    """Returns a number for a table: two decimals, "-" where nothing was measured."""
    return "-" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value:.2f}"


def protocol_line(evaluation: Evaluation) -> str:
    """Returns in one line how the numbers were measured."""
    return in_line({**evaluation.protocol, **evaluation.machine})


def in_line(parts: dict[str, str]) -> str:
    """Returns the parts of a protocol, or of a machine, as one line."""
    return "; ".join(f"{key}: {value}" for key, value in parts.items())


def left_out(evaluation: Evaluation) -> list[str]:
    """Returns a line for each reason why pairs are left out of some figures, with their names."""
    reasons = {
        "left out, as their truth has no known pixel": evaluation.skipped,
        "left out of AUSE, as their flow is not finite everywhere": evaluation.unsorted(),
    }
    return [f"{reason}: {', '.join(names)}" for reason, names in reasons.items() if names]
