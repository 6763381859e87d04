"""The errors of an evaluation as rows of text, for the terminal and for reports."""

import math

import torch

from fleetflow.evaluation.evaluate import Evaluation
from fleetflow.evaluation.machine import in_line
from fleetflow.evaluation.metrics import ause, quantile

QUANTILES = (0.5, 0.9, 0.95, 0.99)
ALL_PIXELS = "all pixels"
SET_COLUMNS = ["set", "EPE px", "EPE pooled", "% over 1", "% over 3", "% over 5", "Fl %", "Fl pooled"]
CLIP_COLUMNS = [
    "set",
    "still: % over 1",
    "% over 3",
    "95 % px",
    "99.9 % px",
    "edges px",
    "visible px",
    "hidden px",
    "flicker px",
]
CLIP_KEYS = ("false1", "false3", "edge0-5", "epe_visible", "epe_occluded", "flicker")
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
    "edge0-5": "EPE under 5 px from a boundary of motion",
    "false1": "still pixels over 1 px, %",
    "false3": "still pixels over 3 px, %",
    "flicker": "change of the error along a clip, px",
    "angle": "angular error, degrees",
    "wauc": "WAUC, % (100 is best)",
    "not_finite": "not finite, %",
}


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


def rows_of_clips(evaluation: Evaluation) -> list[list[str]]:
    """Returns what a person sees in clips, by set and for all pixels, as text; no row where the data set has no clips.

    False motion (see `pixel_sums`), the error that 95 and 99.9 % of the still pixels do not exceed, the EPE beside
    boundaries of motion, of visible and of hidden pixels, and the flicker.
    """
    pooled = evaluation.pooled()
    if "flicker" not in pooled["all"]:
        return []
    rows = []
    for name, sums in pooled.items():
        still = torch.stack([pair.still for pair in evaluation.pairs if name in ("all", pair.group)]).sum(0)
        value = {key: sums[key].value if key in sums else math.nan for key in CLIP_KEYS}
        high = [quantile(still, share) for share in (0.95, 0.999)]
        numbers = [value["false1"], value["false3"], *high, *(value[key] for key in CLIP_KEYS[2:])]
        rows.append([ALL_PIXELS if name == "all" else name, *map(text, numbers)])
    return rows


def text(value: float) -> str:
    """Returns a number for a table: two decimals, "-" where nothing was measured."""
    return "-" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value:.2f}"


def protocol_line(evaluation: Evaluation) -> str:
    """Returns in one line how the numbers were measured."""
    return in_line({**evaluation.protocol, **evaluation.machine})


def left_out(evaluation: Evaluation) -> list[str]:
    """Returns a line for each reason why pairs are left out of some figures, with their names."""
    reasons = {
        "left out, as their truth has no known pixel": evaluation.skipped,
        "left out of AUSE, as their flow is not finite everywhere": evaluation.unsorted(),
    }
    return [f"{reason}: {', '.join(names)}" for reason, names in reasons.items() if names]
