"""Fits what networks say about their uncertainty, on generated footage, and judges it elsewhere.

    python benchmarks/calibrate_uncertainty.py NETWORK[:CHECKPOINT] ... --root PHOTOS --data REAL_PAIRS [--clips 12]

For each network the map of `motion/confidence.py` is fitted on the validation part of `footage` and written into
src/fleetflow/weights/confidence.json under the hash of its weights (the map "other", for weights without one of their own,
is fitted on all networks named). Then it is judged on the test part and on the real pairs, which nothing is chosen on.
PHOTOS: the folder of photographs and cut-outs that footage takes. Of each clip one pair counts, 256x448 pixels, and of
real pairs the middle, to spare time. With four clips a class, 90 % of the errors on them became 82 to 87 % on other clips
of the same part: what a class shows varies from clip to clip, so clips count, not pixels. Prints two tables in Markdown: by
network, and by class of footage.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from fleetflow.data.dataset import Files
from fleetflow.data.datasets.footage import CLASSES, footage
from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation.metrics import ause, sparsification
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import write_atomically
from fleetflow.models.base import Clip
from fleetflow.motion.confidence import CLUES, Confidence, clues, judged
from fleetflow.ops.warp import inside
from fleetflow.types import Prediction, Sample

STORE = Path(__file__).parents[1] / "src" / "fleetflow" / "weights" / "confidence.json"
SIZE = (256, 448)  # pixels of a picture, at most
Samples = list[tuple[str, Sample]]  # by group
PIXELS = 1000  # of a pair that the fit sees
FOLDS = 4  # of the clips
KNOTS = 12  # of the bound
SURE = 1.28  # standard errors that nine of ten means are not farther below the true one
STEPS = 100  # of the fit, at most
HIDDEN = 0.25  # probability from which a pixel counts as hidden, for F1
UNVERIFIED = "ambush_4_final_0004"  # its truth is doubted, as in ship.py


@dataclass
class Found:
    """What was found in the pairs of a set: for each pair, rows of pixels."""

    seen: list[Tensor] = field(default_factory=list)  # [P, clues]
    error: list[Tensor] = field(default_factory=list)  # [P] pixels
    hidden: list[Tensor] = field(default_factory=list)  # [P] bool


def middle(sample: Sample) -> Sample:
    """Returns the middle of a sample, at most SIZE."""
    height, width = sample.frame1.shape[-2:]
    top, left = (max((side - most) // 2, 0) for side, most in zip((height, width), SIZE))
    window = (..., slice(top, top + SIZE[0]), slice(left, left + SIZE[1]))
    return Sample(*(part[window].contiguous() if isinstance(part, Tensor) else part for part in sample))


def one_a_clip(root: Path | None, split: str, clips: int) -> Files:
    """Returns one pair of each of so many clips of every class of footage."""
    files = [
        footage(root, split=split, classes=name, limit=clips * about.pairs, size="x".join(map(str, SIZE)))
        for name, about in CLASSES.items()
    ]
    return Files([pair for one, about in zip(files, CLASSES.values()) for pair in one.pairs[:: about.pairs]])


def hidden_pixels(sample: Sample) -> Tensor:
    """Returns [H, W] bool: pixels that frame2 does not show, what the cut took away included."""
    outside = ~inside(sample.flow[None])[0]
    return outside if sample.occluded is None else outside | sample.occluded


def predicted(predictor: Predictor, sample: Sample) -> tuple[Prediction, Tensor, Tensor]:
    """Returns the prediction in both directions, and the frames [1, 3, H, W]."""
    frame1, frame2 = (
        frame[None].contiguous(memory_format=torch.channels_last) for frame in (sample.frame1, sample.frame2)
    )
    return predictor.predict_frames(frame1, frame2, clip=Clip(both_ways=True)), frame1, frame2


def collect(predictor: Predictor, samples: Samples) -> Found:
    """Returns what the network finds in the pairs, and how far off it is."""
    found, generator = Found(), torch.Generator().manual_seed(0)
    for _, sample in samples:
        prediction, *frames = predicted(predictor, sample)
        height, width = sample.valid.shape
        error = (prediction.flow[0].float() - sample.flow).norm(dim=0)
        seen = clues(prediction, *frames)[0].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
        places = sample.valid.flatten().nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)[:PIXELS]]
        found.seen.append(seen.flatten(1)[:, places].T)
        found.error.append(error.flatten()[places])
        found.hidden.append(hidden_pixels(sample).flatten()[places])
    return found


def fitted(sets: list[Found]) -> Confidence:
    """Returns the map that fits: the score by the likelihood of a Laplace distribution, the bounds by counting.

    A bound counted on the clips that it was fitted to is too small for others. Each fold of the clips is judged by a map of
    the others, and the bounds grow as `limit` says.
    """
    rows = [rows for one in sets for rows in enumerate(zip(one.seen, one.error, one.hidden))]
    apart: dict[int, list[Tensor]] = {}  # by clip: natural logarithm of the share of its bound that an error takes
    for fold in range(FOLDS):
        rest = _fitted([row for number, row in rows if number % FOLDS != fold])
        for number, (seen, error, _) in rows:
            if number % FOLDS == fold:
                bound = rest.uncertainty(seen.T[None, :, None])[0, 0]
                apart.setdefault(number, []).append((error.clamp(min=1e-3) / bound).log())
    clips = [torch.cat(parts) for parts in apart.values()]
    tenth, half = (limit(clips, share) for share in (0.9, 0.5))
    whole = _fitted([row for _, row in rows])
    return whole._replace(bound=tuple(value + tenth for value in whole.bound), half=math.exp(half - tenth))


def limit(clips: list[Tensor], share: float) -> float:
    """Returns the least value that we are sure, nine times out of ten, to be above `share` of the values of other clips.

    Values of one clip are alike, so there are as many observations as clips: of each the share that is below counts, and
    their mean less 1.28 of its standard errors must reach `share`.
    """
    for value in torch.quantile(torch.cat(clips), torch.linspace(share, 1, 401)).tolist():
        below = torch.stack([(clip <= value).float().mean() for clip in clips])
        if below.mean() - SURE * below.std() / math.sqrt(len(clips)) >= share:
            return value
    return max(clip.max().item() for clip in clips)


def _fitted(rows: list[tuple[Tensor, Tensor, Tensor]]) -> Confidence:
    """The map that fits these pairs (clues, errors, hidden); its `half` is not told yet."""
    seen, error, hidden = (torch.cat(column) for column in zip(*rows))
    weights, score = _fit(seen, lambda score: (score + error.clamp(max=100) * (-score).exp()).mean())
    odds, _ = _fit(seen, lambda score: binary_cross_entropy_with_logits(score, hidden.float()))
    edges = torch.quantile(score, torch.linspace(0, 1, KNOTS + 1))
    parts = [(score >= low) & (score <= high) for low, high in zip(edges, edges[1:]) if high > low]
    at = [score[part].median().item() for part in parts]
    bound = [max(torch.quantile(error[part], 0.9).item(), 0.01) for part in parts]
    bound = torch.tensor(bound).log().cummax(0).values
    kept = [k for k in range(len(at)) if k == 0 or at[k] > at[k - 1]]
    return Confidence(weights, tuple(at[k] for k in kept), tuple(bound[k].item() for k in kept), 1.0, odds)


def _fit(seen: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[tuple[float, ...], Tensor]:
    """The weights, none below 0, and the constant that make the loss of the score small; and that score."""
    raw, constant = torch.full((len(CLUES),), -1.0, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw, constant], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(seen @ softplus(raw) + constant) + 1e-4 * softplus(raw).sum()  # clues that say nothing get none
        value.backward()
        return value

    optimizer.step(closure)
    used = (seen != 0).any(0)  # a clue that a network does not give has no weight
    weights = [*(softplus(raw) * used).tolist(), constant.item()]
    return tuple(weights), (seen @ torch.tensor(weights[:-1]) + weights[-1]).detach()


def figures(
    predictor: Predictor, samples: Samples, confidence: Confidence
) -> dict[str, tuple[float, float, float, float]]:
    """Returns by group and for "all": AUSE, share of errors within the bound and within its half, F1 of occlusion."""
    rows: dict[str, list] = {}
    for group, sample in samples:
        prediction, *frames = predicted(predictor, sample)
        told = judged(prediction, *frames, confidence)
        error = (prediction.flow[0].float() - sample.flow).norm(dim=0)[sample.valid]
        bound = told.uncertainty[0][sample.valid]
        area = ause(sparsification(error, bound)) if error.isfinite().all() else float("nan")
        hidden = hidden_pixels(sample)
        said = told.occlusion[0] > HIDDEN
        counts = [(said & hidden).sum().item(), said.sum().item(), hidden.sum().item()]
        within = [(error <= share * bound).float().mean().item() for share in (1.0, confidence.half)]
        rows.setdefault(group, []).append((area, *within, *counts))
    rows["all"] = [row for group in list(rows.values()) for row in group]
    result = {}
    for group, found_rows in rows.items():
        area, whole, half, hit, said, there = (sum(column) for column in zip(*found_rows))
        count = len(found_rows)
        result[group] = area / count, whole / count, half / count, 2 * hit / max(said + there, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--clips", type=int, default=12, help="clips of each class")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    splits = {split: one_a_clip(options.root, split, options.clips) for split in ("validation", "test")}
    if options.data:
        splits["real"] = pairs(options.data, without=(UNVERIFIED,))
    samples = {
        split: [(pair.group, middle(files[k])) for k, pair in enumerate(files.pairs)] for split, files in splits.items()
    }
    every, tables = [], {}
    for name in options.networks:
        predictor = Predictor(name, precision=options.precision)
        every.append(collect(predictor, samples["validation"]))
        confidence = fitted(every[-1:])
        store = json.loads(STORE.read_text()) if STORE.is_file() else {}  # only now: other runs write it, too
        store = {sha: row for sha, row in store.items() if row.get("network") != name}  # of weights before these
        store[predictor.label()["sha256"][:16]] = {"network": name, **confidence._asdict()}
        if len(every) > 1 or "other" not in store:
            store["other"] = {"network": "other", **fitted(every)._asdict()}
        write(store)
        tables[name] = {
            split: figures(predictor, samples[split], confidence) for split in samples if split != "validation"
        }
        show({name: tables[name]})
    if len(tables) > 1:
        show(tables)


def write(store: dict[str, dict]) -> None:
    """Writes the maps, numbers in four digits."""
    text = json.dumps(json.loads(json.dumps(store), parse_float=lambda number: float(f"{float(number):.4g}")))
    text = text.replace("}, ", "},\n ") + "\n"
    write_atomically(STORE, lambda temporary: temporary.write_text(text))


def show(tables: dict[str, dict[str, dict[str, tuple[float, ...]]]]) -> None:
    """Prints both tables."""
    print("\n| network | AUSE real | within 90 % real | AUSE footage | within 90 % | within 50 % | occlusion F1 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, sets in tables.items():
        area, whole, half, score = sets["test"]["all"]
        real = sets.get("real", {}).get("all")
        cells = ["-", "-"] if real is None else [f"{real[0]:.2f}", f"{100 * real[1]:.0f} %"]
        cells += [f"{area:.2f}", f"{100 * whole:.0f} %", f"{100 * half:.0f} %", f"{score:.2f}"]
        print(f"| `{name}` | {' | '.join(cells)} |")
    print(f"\n| within 90 % | {' | '.join(CLASSES)} |\n|---|{'--:|' * len(CLASSES)}")
    for name, sets in tables.items():
        shares = [f"{100 * sets['test'][group][1]:.0f}" for group in CLASSES]
        print(f"| `{name}` | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
