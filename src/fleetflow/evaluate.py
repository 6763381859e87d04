"""Evaluate: a network's errors on a data set by pair, by set, as the mean of sets and pooled, with their protocol."""

import csv
import inspect
import json
import math
import platform
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import Files, datasets
from fleetflow.io import write_atomically, writing
from fleetflow.metrics import (
    SPARSE_STEPS,
    SPEED_EDGES,
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
from fleetflow.models.base import FlowModel
from fleetflow.predict import Predictor
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError, Sample

DIS, FARNEBACK, DEEPFLOW = "dis", "farneback", "deepflow"
FARNEBACK_SETTINGS = (0.5, 5, 15, 3, 7, 1.5)  # scale of a level, levels, window, iterations, neighbourhood, its sigma
CLASSICAL = {  # what each of OpenCV's methods is, in tables and protocols
    DIS: "OpenCV DIS (medium)",
    FARNEBACK: f"OpenCV Farneback {FARNEBACK_SETTINGS}",
    DEEPFLOW: "OpenCV DeepFlow",
}
TRIAL = (128, 192)  # height and width of the pictures that a method of the user is tried on
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
    uncertainty: Tensor | None  # [H, W], the residual of an equilibrium network
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
    predict, files: Files, *, steps: int | None = None, progress=lambda done, total: None
) -> dict[str, dict[str, float]]:
    """Returns per set, and for the "mean of sets", the mean over its pairs of epe, out1, out3, out5 and fl.

    predict, steps: as in `measure`.
    Protocol: errors are averaged over the known pixels of each pair, then over the pairs of a set, then over the sets.
    """
    rows = []
    for k, pair in enumerate(files.pairs):
        found = estimate(predict, files, k, steps)
        rows.append((pair.group, pair_errors(found.flow, found.sample)))
        progress(k + 1, len(files))
    return mean_over_sets(rows)


def measure(
    predict, files: Files, *, model: str, dataset: str, steps: int | None = None, progress=lambda done, total: None
) -> Evaluation:
    """Returns all errors of a model on a data set; memory does not grow with the size of the frames.

    predict: a `Predictor`, or a function of two uint8 [H, W, 3] RGB images that returns the flow, float32 [H, W, 2].
    model, dataset: what to call them. steps: refinement steps of the network; None takes its own.
    Raises FleetflowError where no pair has a known pixel.
    """
    results, skipped = [], []
    for k, pair in enumerate(files.pairs):
        sample, flow, uncertainty, foreground = estimate(predict, files, k, steps)
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
        **protocol(predict, files, steps),
        "d-bands": ", ".join(f"{rule} in {count} pairs" for rule, count in rules.items() if rule) or "none",
    }
    return Evaluation(model, dataset, how, machine(), results, skipped)


def _curves(error: Tensor, uncertainty: Tensor) -> Tensor:
    """The sparsification; NaN where an error is infinite, which no curve can show."""
    if error.isfinite().all():
        return sparsification(error, uncertainty)
    return torch.full((2, SPARSE_STEPS), math.nan, dtype=torch.float64)


def estimate(predict, files: Files, k: int, steps: int | None = None) -> Estimate:
    """Returns pair k with its predicted flow; `predict` and `steps` as in `measure`."""
    sample, masks = files.judged(k), {name: torch.from_numpy(mask) for name, mask in files.masks(k).items()}
    for name, mask in masks.items():
        if mask.shape != sample.valid.shape:
            sizes = f"{list(mask.shape)} for frames {list(sample.valid.shape)}"
            raise FleetflowError(f'the mask "{name}" of {files.pairs[k].name} is {sizes}; both must have the same size')
    sample, foreground = sample._replace(occluded=masks.get("occluded", sample.occluded)), masks.get("foreground")
    images = _images(sample)
    if isinstance(predict, Predictor):
        prediction = predict.predict(*images, steps=steps)
        sure = prediction.residual
        return Estimate(
            sample, prediction.flow[0].float().cpu(), None if sure is None else sure[0].float().cpu(), foreground
        )
    if steps is not None:
        raise FleetflowError("this method has no refinement steps; leave --steps out")
    flow = torch.from_numpy(np.ascontiguousarray(predict(*images), np.float32)).permute(2, 0, 1)
    return Estimate(sample, flow, None, foreground)


def fit_for(model: FlowModel, dataset: str) -> FlowModel:
    """Returns the model, which on KITTI pads below only where it pads, as RAFT and its descendants were measured."""
    if dataset.startswith("kitti") and model.fit == "pad":
        model.fit = "pad_bottom"
    return model


def _images(sample: Sample) -> list[np.ndarray]:
    return [(frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for frame in sample[:2]]


def protocol(predict, files: Files, steps: int | None = None) -> dict[str, str]:
    """Returns how the errors of `predict` on the pairs are measured; arguments as in `measure`."""
    whole = {
        "per image": PER_IMAGE,
        "pooled": POOLED,
        "frames": "whole, at their own size",
        "left out": ", ".join(files.left_out) or "none",
    }
    if any(pair.truths for pair in files.pairs):
        whole["truth"] = "the nearest of the true vectors of a pixel, Fl by the longest, speed by their mean (Spring)"
    if not isinstance(predict, Predictor):
        return {**whole, "method": predict.name if isinstance(predict, Method) else "a function"}
    own = predict.model.steps
    return {
        **whole,
        "weights": f"sha256 {predict.label()['sha256'][:16]}",
        "fit": f"{predict.model.fit} to multiples of {predict.model.stride}",
        "steps": str(steps or own) if own else "none",
        "device": torch.cuda.get_device_name(predict.device) if predict.device.type == "cuda" else predict.device.type,
        "precision": str(predict.dtype).removeprefix("torch."),
    }


def machine() -> dict[str, str]:
    """Returns the processor, the threads and the versions that the numbers belong to; OpenCV's where it took part."""
    cv2 = sys.modules.get("cv2")
    processor, listed = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if listed.exists():
        names = [line for line in listed.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **({"opencv": f"{cv2.__version__}, {cv2.getNumThreads()} threads"} if cv2 else {}),
        "fleetflow": version("fleetflow"),
    }


class Method(NamedTuple):
    """What is no network of ours; called with two images, uint8 [H, W, 3] RGB, it returns the flow [H, W, 2] pixels."""

    name: str
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        return self.predict(image1, image2)


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
        predict = runpy.run_path(str(path)).get("predict")
        found = np.asarray(predict(*images)) if callable(predict) else None
    except Exception as error:  # whatever the code of the user raises
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FleetflowError(f"{path} failed on two pictures of 128x192 ({words}); mend its predict(a, b)") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    if found is None:
        raise FleetflowError(f"{path} has no function predict(image1, image2); add one that returns the flow")
    if found.shape != (*TRIAL, 2) or not np.issubdtype(found.dtype, np.floating):
        got = f"{found.dtype} {list(found.shape)}"
        raise FleetflowError(f"predict of {path} returned {got} for pictures of 128x192; expected float [128, 192, 2]")
    return Method(path.stem, predict)


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
    for file in files:
        if file is not None and file.is_dir():
            raise FleetflowError(f"{file} is a folder; name a file in it")
        if file is not None:
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


def as_json(evaluation: Evaluation, path: Path) -> None:
    """Writes protocol, machine, score, pooled errors, quantiles, curves and all pairs as JSON.

    A number with nothing to measure is null; an infinite one is the string "infinite".
    """
    curves, histogram = evaluation.curves(), evaluation.histogram()
    speeds = [Mean(total, int(count)) for total, count in evaluation.speeds().T.tolist()]
    content = {
        **{key: getattr(evaluation, key) for key in ("model", "dataset", "protocol", "machine", "skipped")},
        "score": evaluation.score(),
        "pooled": {name: _numbers(sums) for name, sums in evaluation.pooled().items()},
        "quantiles": {str(share): quantile(histogram, share) for share in QUANTILES},
        "epe_by_speed": [
            {"from": low, "to": high, "value": mean.value, "pixels": mean.count}
            for low, high, mean in zip(SPEED_EDGES, SPEED_EDGES[1:], speeds)
        ],
        "ause": None if curves is None else ause(curves),
        "ause_left_out": evaluation.unsorted(),
        "sparsification": None if curves is None else curves.tolist(),
        "pairs": [{"set": pair.group, "pair": pair.name, **_numbers(pair.sums)} for pair in evaluation.pairs],
    }
    whole = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(whole))


def as_csv(evaluation: Evaluation, path: Path) -> None:
    """Writes one line per pair: set, pair, known pixels, every error of `pixel_sums`, and quantiles of the error.

    Each line ends with the model, the data set and the protocol, so that files can be joined.
    """
    whole = [evaluation.model, evaluation.dataset, protocol_line(evaluation)]
    names = list(dict.fromkeys(key for pair in evaluation.pairs for key in pair.sums))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            table = csv.writer(file)
            shares = [f"q{100 * share:g}" for share in QUANTILES]
            table.writerow(["set", "pair", "pixels", *names, *shares, "ause", "model", "dataset", "protocol"])
            for pair in evaluation.pairs:
                values = [pair.sums[name].value if name in pair.sums else math.nan for name in names]
                values += [quantile(pair.histogram, share) for share in QUANTILES]
                values.append(math.nan if pair.curves is None else ause(pair.curves))
                cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
                table.writerow([pair.group, pair.name, pair.sums["epe"].count, *cells, *whole])

    write_atomically(path, write)


def _numbers(sums: dict[str, Mean]) -> dict[str, dict[str, float]]:
    return {name: {"value": mean.value, "pixels": mean.count} for name, mean in sums.items()}


def plain(value):
    """Returns the value for JSON: not-a-number becomes null, an infinite number "infinite"."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite"
    return value
