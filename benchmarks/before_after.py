"""A picture of what other weights see on footage: a frame, the true flow where it is known, and the flow of each.

    python benchmarks/before_after.py OLD.safetensors docs/images/before_after.jpg --shared ../shared

Rows: two clips that we did not make (of ../shared), then one pair of each class of `footage`, split=test. One row has one
scale of colors, that of the true flow, or of the new flow where there is no truth.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fleetflow.data.dataset import to_images
from fleetflow.data.datasets.footage import CLASSES, footage
from fleetflow.inference.predictor import Predictor
from fleetflow.io.images import read_image
from fleetflow.io.video import read_video
from fleetflow.visualise import flow_to_color, robust_scale

CELL = (150, 250)  # height and width of a picture
LABEL = 15  # height of a line of text
Row = tuple[str, np.ndarray, np.ndarray, np.ndarray | None]  # name, two frames, true flow


def rows(shared: Path) -> list[Row]:
    """Returns the pairs that are shown."""
    car = [read_image(shared / "data" / "videos" / "car_frames" / f"{k:03d}.jpg") for k in (7, 8)]
    bird = list(islice(read_video(shared / "data" / "videos" / "cockatoo.mp4", frames="20:22"), 2))
    found: list[Row] = [("car on asphalt", car[0], car[1], None), ("cockatoo", bird[0], bird[1], None)]
    for name in CLASSES:
        sample = footage(shared / "photos", split="test", classes=name, limit=1)[0]
        found.append((name, *to_images(sample), sample.flow.permute(1, 2, 0).numpy()))
    return found


def picture(shared: Path, old: str, new: str) -> np.ndarray:
    """Returns the sheet [H, W, 3] uint8."""
    networks = [Predictor(name, precision="fp32") for name in (old, new)]
    sheet = []
    for name, frame1, frame2, truth in rows(shared):
        flows = [network(frame1, frame2) for network in networks]
        scale = robust_scale(flows[1] if truth is None else truth)
        cells = [
            frame1,
            *(np.full_like(frame1, 240) if flow is None else flow_to_color(flow, scale) for flow in (truth, *flows)),
        ]
        texts = [
            name,
            "" if truth is None else f"truth, full color at {scale:g} px",
            *(described(flow, truth) for flow in flows),
        ]
        sheet.append(np.concatenate([labelled(cell, text) for cell, text in zip(cells, texts)], 1))
    return np.concatenate(sheet)


def described(flow: np.ndarray, truth: np.ndarray | None) -> str:
    if truth is None:
        return f"median motion {np.median(np.linalg.norm(flow, axis=-1)):.1f} px"
    return f"EPE {np.linalg.norm(flow - truth, axis=-1).mean():.1f} px"


def labelled(cell: np.ndarray, text: str) -> np.ndarray:
    """Returns the picture at the size of a cell, under its text."""
    canvas = Image.new("RGB", (CELL[1] + 4, CELL[0] + LABEL + 4), "white")
    ImageDraw.Draw(canvas).text((2, 1), text, fill="black")
    canvas.paste(Image.fromarray(cell).resize(CELL[::-1], Image.Resampling.LANCZOS), (0, LABEL))
    return np.asarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("output", type=Path)
    parser.add_argument("--new", default="fastflownet")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    given = parser.parse_args()
    Image.fromarray(picture(given.shared, given.old, given.new)).save(given.output, quality=82)


if __name__ == "__main__":
    main()
