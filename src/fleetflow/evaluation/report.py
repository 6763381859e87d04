"""What is written of an evaluation: JSON, CSV, and one HTML file that needs no other, with the worst and best pairs."""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fleetflow.data.dataset import Files
from fleetflow.evaluation.evaluate import Evaluation, PairResult, estimate
from fleetflow.evaluation.metrics import (
    BINS_PER_DECADE,
    DECADES,
    SPARSE_STEPS,
    SPEED_EDGES,
    Mean,
    ause,
    judge,
    quantile,
)
from fleetflow.evaluation.tables import (
    QUANTILES,
    SET_COLUMNS,
    left_out,
    protocol_line,
    rows_by_set,
    rows_pooled,
    text,
)
from fleetflow.io.atomic import write_atomically
from fleetflow.visualise import ERROR_BOUNDS, ERROR_COLORS, error_map, flow_to_color, robust_scale, with_legend

SHOWN = 3  # worst pairs, and as many best ones
PICTURE_WIDTH = 480  # pixels; wider pictures are reduced
QUALITY = 80  # of the WebP pictures
PLOT_WIDTH, PLOT_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 260, 56, 16, 16, 44  # pixels of a plot and of its margins
COLORS = ("#1f6fb4", "#8a8f98")
LIGHT = 384  # sum of red, green and blue from which a color takes black letters
DOTS = 20  # a line of so few points shows them
TITLES = ("frame 1", "frame 2", "predicted flow", "true flow", "error")

STYLE = """body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:1180px;margin:24px auto;padding:0 16px}
h1{font-size:24px}h2{font-size:19px;margin-top:32px}h3{font-size:15px;margin:20px 0 6px}
table{border-collapse:collapse}td,th{padding:3px 12px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.protocol{color:#555;font-size:13px}
.row{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0;flex:1 1 220px;max-width:480px}
.key{font-size:12px}.key span{padding:2px 8px;display:inline-block}
figure img{width:100%;display:block}figcaption{font-size:12px;color:#555}svg{max-width:100%}"""


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


# ---- the page ----


def write_report(evaluation: Evaluation, predict, files: Files, path: Path, *, iterations: int | None = None) -> None:
    """Writes the report of an evaluation to `path`, one HTML file with all pictures inside.

    predict, files, iterations: as they were given to `evaluate.measure`; the pairs shown are predicted once more.
    """
    parts = [
        f"<h1>{_escape(evaluation.model)} on {_escape(evaluation.dataset)}</h1>",
        f"<p class=protocol>Protocol: {_escape(protocol_line(evaluation))}.</p>",
        *(f"<p>{_escape(line)}.</p>" for line in left_out(evaluation)),
        f"<h2>By set ({len(evaluation.pairs)} pairs)</h2>",
        _table(SET_COLUMNS, rows_by_set(evaluation)),
        "<h2>All pixels together</h2>",
        _table(["error", "value", "pixels"], rows_pooled(evaluation)),
        "<h2>Error against speed</h2>",
        _speed_plot(evaluation),
        "<h2>Distribution of the error</h2>",
        _distribution_plot(evaluation),
    ]
    curves = evaluation.curves()
    if curves is not None:
        parts += [f"<h2>Sparsification (AUSE {ause(curves):.3f})</h2>", _sparsification_plot(curves)]
    order = sorted(range(len(evaluation.pairs)), key=lambda k: -evaluation.pairs[k].errors["epe"])
    places = {(pair.group, pair.name): k for k, pair in enumerate(files.pairs)}
    worst = order[:SHOWN]
    best = [k for k in order[: -SHOWN - 1 : -1] if k not in worst]
    parts.append(f"<p class=key>Error, px (or 3 px for every 5 % of the true length, if less): {_key()}</p>")
    for title, chosen in (("Worst pairs", worst), ("Best pairs", best)):
        parts.append(f"<h2>{title}</h2>" if chosen else "")
        for k in chosen:
            pair = evaluation.pairs[k]
            parts.append(_pair(pair, predict, files, places[pair.group, pair.name], iterations))
    head = f"<meta charset=utf-8><title>{_escape(evaluation.model)} on {_escape(evaluation.dataset)}</title>"
    page = f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>\n"
    page += "\n".join(part for part in parts if part) + "\n</body></html>\n"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _pair(pair: PairResult, predict, files: Files, k: int, iterations: int | None) -> str:
    """One pair: its errors and five pictures, true and predicted flow with one scale."""
    found = estimate(predict, files, k, iterations)
    frames = [(frame * 255).round().byte().permute(1, 2, 0).numpy() for frame in found.sample[:2]]
    valid = found.sample.valid.numpy()
    fields = (found.flow, found.sample.flow, judge(found.flow, found.sample).nearest)
    flow, truth, nearest = (field.permute(1, 2, 0).contiguous().numpy() for field in fields)
    scale = robust_scale(truth, valid)
    pictures = [
        *frames,
        with_legend(flow_to_color(flow, scale), scale),
        with_legend(flow_to_color(truth, scale, valid=valid), scale),
        error_map(flow, nearest, valid=valid),
    ]
    figures = "".join(
        f'<figure><img alt="{title}" src="{embedded(picture)}"><figcaption>{title}</figcaption></figure>'
        for title, picture in zip(TITLES, pictures, strict=True)
    )
    numbers = ", ".join(f"{name} {text(pair.errors[key])} {unit}" for name, key, unit in
                        (("EPE", "epe", "px"), ("over 3 px", "out3", "%"), ("Fl", "fl", "%")))  # fmt: skip
    return f"<h3>{_escape(pair.group)}/{_escape(pair.name)}: {numbers}</h3><div class=row>{figures}</div>"


def embedded(picture: np.ndarray) -> str:
    """Returns a picture uint8 [H, W, 3] RGB as a data address, WebP, at most PICTURE_WIDTH pixels wide."""
    image = Image.fromarray(picture)
    if image.width > PICTURE_WIDTH:
        height = max(1, round(image.height * PICTURE_WIDTH / image.width))
        image = image.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _key() -> str:
    """The colors of the error map, each with the errors that it stands for, and black for what is not known."""
    edges = [f"{bound:g}" for bound in ERROR_BOUNDS]
    names = [f"under {edges[0]}", *(f"{low}-{high}" for low, high in zip(edges, edges[1:])), f"{edges[-1]}+", "unknown"]
    colors = [*ERROR_COLORS, (0, 0, 0)]
    light = [sum(color) > LIGHT for color in colors]
    return "".join(
        f'<span style="background:rgb{color};color:{"#000" if bright else "#fff"}">{name}</span>'
        for name, color, bright in zip(names, colors, light, strict=True)
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _escape(words: str) -> str:
    return html.escape(words)


# ---- curves, as SVG ----

Ticks = list[tuple[float, str]]  # place on an axis and what stands there; the first and the last are its ends


def _speed_plot(evaluation: Evaluation) -> str:
    sums, counts = evaluation.speeds()
    known = [k for k in range(len(counts)) if counts[k] > 0]
    means = [(place, (sums[k] / counts[k]).item()) for place, k in enumerate(known)]
    points = [(float(place), float(np.log10(mean))) for place, mean in means if 0 < mean < np.inf]
    heights = [height for _, height in points] or [0.0]
    decades = range(int(np.floor(min(heights))), max(int(np.ceil(max(heights))), int(np.floor(min(heights))) + 1) + 1)
    names = [
        f"{SPEED_EDGES[k]:g}+" if k == len(counts) - 1 else f"{SPEED_EDGES[k]:g}-{SPEED_EDGES[k + 1]:g}" for k in known
    ]
    across = [(-0.5, ""), *((float(place), name) for place, name in enumerate(names)), (len(known) - 0.5, "")]
    up = [(float(decade), f"{10.0**decade:g}") for decade in decades]
    return _plot([("mean EPE", points)], across, up, "true motion, px", "mean EPE, px")


def _distribution_plot(evaluation: Evaluation) -> str:
    histogram = evaluation.histogram().double()
    shares = 100 * histogram.cumsum(0) / histogram.sum()
    low, high = -2, 2  # decades shown
    places = range((low - DECADES[0]) * BINS_PER_DECADE, (high - DECADES[0]) * BINS_PER_DECADE + 1, 10)
    points = [(DECADES[0] + place / BINS_PER_DECADE, shares[place].item()) for place in places]
    across = [(float(decade), f"{10.0**decade:g}") for decade in range(low, high + 1)]
    return _plot([("share", points)], across, _even(100, 25), "error, px", "% of pixels under it")


def _sparsification_plot(curves: torch.Tensor) -> str:
    left_out = [100 * k / SPARSE_STEPS for k in range(SPARSE_STEPS)]
    names = ("by the network's confidence", "by the true error")
    lines = [(name, list(zip(left_out, curve.tolist()))) for name, curve in zip(names, curves)]
    up = _even(max(1.0, np.ceil(4 * curves.max().item()) / 4), 0.25)
    return _plot(lines, _even(100, 20), up, "% of pixels left out", "EPE of the rest / EPE of all")


def _even(end: float, step: float) -> Ticks:
    return [(k * step, f"{k * step:g}") for k in range(round(end / step) + 1)]


def _plot(
    lines: list[tuple[str, list[tuple[float, float]]]], across: Ticks, up: Ticks, x_name: str, y_name: str
) -> str:
    """Returns an SVG picture of lines (name, points); a legend where there are several."""
    x, y = _axis(across, LEFT, PLOT_WIDTH - RIGHT), _axis(up, PLOT_HEIGHT - BOTTOM, TOP)
    size = f'width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}"'
    parts = [f'<svg {size} font-family="sans-serif" font-size="11" fill="#444">']
    for place, name in up:
        height = f"{y(place):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{PLOT_WIDTH - RIGHT}" y1="{height}" y2="{height}" stroke="#ddd"/>')
        parts.append(_label(LEFT - 6, y(place) + 4, name, "end"))
    parts += [_label(x(place), PLOT_HEIGHT - BOTTOM + 16, name) for place, name in across]
    for k, (color, (name, points)) in enumerate(zip(COLORS, lines)):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(points) <= DOTS:
            parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{color}"/>' for a, b in points]
        if len(lines) > 1:
            parts.append(_label(PLOT_WIDTH - RIGHT - 4, TOP + 12 + 15 * k, name, "end", color))
    parts.append(_label((LEFT + PLOT_WIDTH - RIGHT) / 2, PLOT_HEIGHT - 8, x_name))
    turned = f'transform="translate(14 {(TOP + PLOT_HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    return "".join([*parts, f"<text {turned}>{_escape(y_name)}</text></svg>"])


def _label(x: float, y: float, words: str, anchor: str = "middle", color: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{_escape(words)}</text>'


def _axis(ticks: Ticks, start: float, end: float) -> Callable[[float], float]:
    low, high = ticks[0][0], ticks[-1][0]
    return lambda value: start + (value - low) / (high - low) * (end - start)
