"""Plots, drawn by matplotlib: accuracy against speed, and the curves of a report."""

import io
import math
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fleetflow.evaluation.metrics import BINS_PER_DECADE, DECADES, SPARSE_STEPS, SPEED_EDGES
from fleetflow.evaluation.speed import Report
from fleetflow.io.atomic import write_atomically
from fleetflow.types import FleetflowError

PLOT = (5.8, 2.8)  # inches, of the plots of a report
DPI = 150
MARK = {"Software": "fleetflow"}  # by which a picture is known to be ours
COLORS = {True: "tab:blue", False: "dimgray"}  # of networks of ours, and of peers
DOT = 4  # pixels from the middle of a dot to its side
LABELS = tuple((dx, dy, side) for dy in (4, -11, 14, -21, 24, -31, 34) for dx, side in ((6, "left"), (-6, "right")))


def require() -> None:
    """Raises FleetflowError where matplotlib is missing: a job that ends with a plot asks before it begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FleetflowError('plots need matplotlib; install it with pip install "fleetflow[plot]"') from None


def _axes(width: float, height: float):
    """New axes in a figure of width x height inches; no window, and no state that others share."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3, which="both")
    return axes


def _png(axes) -> bytes:
    file = io.BytesIO()
    axes.figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


# ---- of a report ----


def error_by_speed(speeds: Tensor) -> bytes:
    """Returns a PNG: the mean error of the pixels in each interval of SPEED_EDGES.

    Args:
        speeds: [2, 10], the sum of errors in pixels and the number of pixels, as `Evaluation.speeds` returns them.
    """
    sums, counts = speeds.tolist()
    known = [k for k, count in enumerate(counts) if count > 0]
    names = [f"{low:g}+" if math.isinf(high) else f"{low:g}-{high:g}" for low, high in pairwise(SPEED_EDGES)]
    means = [sums[k] / counts[k] for k in known]
    axes = _axes(*PLOT)
    axes.plot(range(len(known)), [mean if 0 < mean < math.inf else math.nan for mean in means], "o-")
    axes.set_xticks(range(len(known)), [names[k] for k in known])
    if any(0 < mean < math.inf for mean in means):
        axes.set_yscale("log")
    axes.set_xlabel("true motion, px")
    axes.set_ylabel("mean EPE, px")
    return _png(axes)


def distribution(histogram: Tensor) -> bytes:
    """Returns a PNG: the share of pixels whose error is under a limit; histogram: as `Evaluation.histogram` has it."""
    counts = histogram.double()
    shares = (100 * counts.cumsum(0) / counts.sum())[:-1].tolist()  # the last bin has no upper edge
    edges = [10 ** (DECADES[0] + place / BINS_PER_DECADE) for place in range(len(shares))]
    axes = _axes(*PLOT)
    axes.plot(edges, shares)
    axes.set_xscale("log")
    axes.set_xlim(0.01, 100)
    axes.set_ylim(0, 102)
    axes.set_xlabel("error, px")
    axes.set_ylabel("% of pixels under it")
    return _png(axes)


def sparsification_curves(curves: Tensor) -> bytes:
    """Returns a PNG: the error of what is left when the least certain pixels are left out; [2, 20], see `metrics`."""
    left_out = [100 * k / SPARSE_STEPS for k in range(SPARSE_STEPS)]
    axes = _axes(*PLOT)
    for name, curve in zip(("by the network's confidence", "by the true error"), curves.tolist()):
        axes.plot(left_out, curve, label=name)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("% of pixels left out")
    axes.set_ylabel("EPE of the rest / EPE of all")
    axes.legend()
    return _png(axes)


# ---- of a benchmark ----


def pareto(reports: list[Report], path: Path) -> None:
    """Writes a picture of accuracy against speed: a dot for each network and peer, the best ones joined.

    Raises:
        FleetflowError: Where nothing has an accuracy, or matplotlib is missing.
    """
    dots = _dots(reports)
    if not dots:
        raise FleetflowError("no network has weights and there is no peer: no accuracy can be shown; name others")
    axes = _axes(6.4, 4.2)
    for milliseconds, epe, _, ours in dots:
        axes.plot(milliseconds, epe, "o" if ours else "s", color=COLORS[ours])
    best = [dot for k, dot in enumerate(dots) if all(dot[1] < other[1] for other in dots[:k])]
    axes.plot([dot[0] for dot in best], [dot[1] for dot in best], color="tab:blue", alpha=0.4, zorder=1)
    height, width = reports[0].size
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_ylim(bottom=0)
    batch = f" in batches of {reports[0].batch}" if reports[0].batch > 1 else ""
    axes.set_xlabel(f"milliseconds for {height}x{width}{batch}, {reports[0].threads} threads ({reports[0].device})")
    axes.set_ylabel(f"EPE [px], mean of the sets, {reports[0].pairs} pairs")
    _label(axes, dots)
    figure: Any = axes.figure
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI, metadata=MARK))


def _dots(reports: list[Report]) -> list[tuple[float, float, str, bool]]:
    """Milliseconds, EPE, name, and whether it is ours, of all that has an EPE, the fastest first."""
    found: dict[str, list[float]] = {}
    epe: dict[str, float] = {}
    for report in reports:
        for timing in report.timings:
            if timing.epe is not None:
                found.setdefault(timing.name, []).append(timing.p50)
                epe.setdefault(timing.name, timing.epe)
    networks = {report.timings[0].name: report.network for report in reports}
    short = {name: _short(networks.get(name, name)) for name in found}
    counts = Counter(short.values())
    names = {name: short[name] if counts[short[name]] == 1 else networks.get(name, name) for name in found}
    return sorted(
        (float(np.median(milliseconds)), epe[name], names[name], name in networks)
        for name, milliseconds in found.items()
    )


def _short(name: str) -> str:
    """The name of a network, of a checkpoint's file, or of a method without its settings."""
    network, _, checkpoint = name.removeprefix("OpenCV ").partition(" (")[0].partition(":")
    return f"{network} ({Path(checkpoint).stem})" if checkpoint else Path(network).stem


def _label(axes, dots: list[tuple[float, float, str, bool]]) -> None:
    """Writes the names of the dots where they cover nothing and, if possible, no other dot is nearer; or not at all."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    middles = np.array([axes.transData.transform(dot[:2]) for dot in dots])
    taken = [Bbox.from_extents(*(middle - DOT), *(middle + DOT)) for middle in middles]
    for k, (x, y, name, ours) in enumerate(dots):
        for strict, (dx, dy, side) in product((True, False), LABELS):
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, color=COLORS[ours])
            box = text.get_window_extent(renderer)
            away = np.linalg.norm(middles - np.clip(middles, box.min, box.max), axis=1)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            free = inside and not any(box.overlaps(other) for other in taken)
            if free and (away.argmin() == k or not strict):
                taken.append(box)
                break
            text.remove()
