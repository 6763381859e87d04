"""The report of an evaluation: one HTML file that needs no other, with curves and the worst and best pairs."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from fleetflow.data.dataset import Files, to_images
from fleetflow.evaluation import plots
from fleetflow.evaluation.evaluate import Evaluation, PairResult, estimate
from fleetflow.evaluation.metrics import ause, judge
from fleetflow.evaluation.tables import (
    CLIP_COLUMNS,
    SET_COLUMNS,
    left_out,
    protocol_line,
    rows_by_set,
    rows_of_clips,
    rows_pooled,
    text,
)
from fleetflow.io.atomic import write_atomically
from fleetflow.visualise import ERROR_BOUNDS, ERROR_COLORS, error_map, flow_to_color, robust_scale, with_legend

SHOWN = 3  # worst pairs, and as many best ones
PICTURE_WIDTH = 480  # pixels; wider pictures are reduced
QUALITY = 80  # of the WebP pictures
LIGHT = 384  # sum of red, green and blue from which a color takes black letters
TITLES = ("frame 1", "frame 2", "predicted flow", "true flow", "error")


class Picture(NamedTuple):
    """A picture of the page."""

    title: str
    address: str  # of kind data:, which holds the picture itself


def write_report(evaluation: Evaluation, predict, files: Files, path: Path, *, iterations: int | None = None) -> None:
    """Writes the report of an evaluation to `path`, one HTML file with all pictures inside.

    Args:
        predict, files, iterations: as they were given to `evaluate.measure`; the pairs shown are predicted once more.

    Raises:
        FleetflowError: matplotlib is missing, or the file cannot be written.
    """
    tables = [
        (f"By set ({len(evaluation.pairs)} pairs)", SET_COLUMNS, rows_by_set(evaluation)),
        ("Still pixels, boundaries of motion, occlusion, flicker", CLIP_COLUMNS, rows_of_clips(evaluation)),
        ("All pixels together", ["error", "value", "pixels"], rows_pooled(evaluation)),
    ]
    order = sorted(range(len(evaluation.pairs)), key=lambda k: -evaluation.pairs[k].errors["epe"])
    worst = order[:SHOWN]
    best = [k for k in order[: -SHOWN - 1 : -1] if k not in worst]
    places = {(pair.group, pair.name): k for k, pair in enumerate(files.pairs)}

    def shown(chosen: list[int]) -> list[dict]:
        pairs = [evaluation.pairs[k] for k in chosen]
        return [_pair(pair, predict, files, places[pair.group, pair.name], iterations) for pair in pairs]

    page = _template().render(
        title=f"{evaluation.model} on {evaluation.dataset}",
        protocol=protocol_line(evaluation),
        left_out=left_out(evaluation),
        tables=[{"title": title, "columns": columns, "rows": rows} for title, columns, rows in tables if rows],
        plots=_plots(evaluation),
        keys=_keys(),
        parts=[{"title": "Worst pairs", "pairs": shown(worst)}, {"title": "Best pairs", "pairs": shown(best)}],
    )
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _template() -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")


def _plots(evaluation: Evaluation) -> list[Picture]:
    drawn = [
        ("Error against speed", plots.error_by_speed(evaluation.speeds())),
        ("Distribution of the error", plots.distribution(evaluation.histogram())),
    ]
    curves = evaluation.curves()
    if curves is not None:
        drawn.append((f"Sparsification (AUSE {ause(curves):.3f})", plots.sparsification_curves(curves)))
    return [Picture(title, _address(png, "png")) for title, png in drawn]


def _pair(pair: PairResult, predict, files: Files, k: int, iterations: int | None) -> dict:
    """One pair for the page: its errors and five pictures, true and predicted flow with one scale."""
    found = estimate(predict, files, k, iterations)
    valid = found.sample.valid.numpy()
    fields = (found.flow, found.sample.flow, judge(found.flow, found.sample).nearest)
    flow, truth, nearest = (field.permute(1, 2, 0).contiguous().numpy() for field in fields)
    scale = robust_scale(truth, valid)
    pictures = [
        *to_images(found.sample),
        with_legend(flow_to_color(flow, scale), scale),
        with_legend(flow_to_color(truth, scale, valid=valid), scale),
        error_map(flow, nearest, valid=valid),
    ]
    numbers = ", ".join(f"{name} {text(pair.errors[key])} {unit}" for name, key, unit in
                        (("EPE", "epe", "px"), ("over 3 px", "out3", "%"), ("Fl", "fl", "%")))  # fmt: skip
    return {
        "title": f"{pair.group}/{pair.name}: {numbers}",
        "pictures": [Picture(title, embedded(picture)) for title, picture in zip(TITLES, pictures, strict=True)],
    }


def embedded(picture: np.ndarray) -> str:
    """Returns a picture uint8 [H, W, 3] RGB as a data address, WebP, at most PICTURE_WIDTH pixels wide."""
    image = Image.fromarray(picture)
    if image.width > PICTURE_WIDTH:
        height = max(1, round(image.height * PICTURE_WIDTH / image.width))
        image = image.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return _address(file.getvalue(), "webp")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _keys() -> list[dict[str, str]]:
    """The colors of the error map, each with the errors that it stands for, and black for what is not known."""
    edges = [f"{bound:g}" for bound in ERROR_BOUNDS]
    names = [f"under {edges[0]}", *(f"{low}-{high}" for low, high in zip(edges, edges[1:])), f"{edges[-1]}+", "unknown"]
    colors = [tuple(map(int, color)) for color in (*ERROR_COLORS, (0, 0, 0))]
    return [
        {"name": name, "color": f"rgb{color}", "letters": "#000" if sum(color) > LIGHT else "#fff"}
        for name, color in zip(names, colors, strict=True)
    ]
