"""A picture of the classes of footage, or of the worlds of training: frame1, frame2 and flow of some pairs of each.

python benchmarks/footage_sheet.py docs/lab/footage.jpg
python benchmarks/footage_sheet.py docs/lab/worlds.jpg --worlds
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fleetflow.data.dataset import to_images
from fleetflow.data.datasets.footage import CLASSES, footage
from fleetflow.data.generate import generate
from fleetflow.data.generate.photographs import photographs
from fleetflow.data.generate.worlds import MIXTURE
from fleetflow.types import Sample
from fleetflow.visualise import flow_to_color

CELL = (84, 144)  # height and width of a picture in the sheet
SIZE = (256, 320)  # of training pairs
LABEL = 14  # height of a line of text


def triple(sample: Sample) -> np.ndarray:
    """Returns frame1, frame2 and the flow, side by side, each with its own scale of colors."""
    flow = flow_to_color(sample.flow.permute(1, 2, 0).numpy())
    pictures = [Image.fromarray(picture).resize(CELL[::-1], Image.LANCZOS) for picture in (*to_images(sample), flow)]
    return np.concatenate([np.asarray(picture) for picture in pictures], 1)


def block(name: str, samples: list[Sample], columns: int) -> np.ndarray:
    """Returns the samples of a class in rows, under its name."""
    cells = [np.pad(triple(sample), ((0, 2), (0, 4), (0, 0)), constant_values=255) for sample in samples]
    rows = [np.concatenate(cells[k : k + columns], 1) for k in range(0, len(cells), columns)]
    title = Image.new("RGB", (rows[0].shape[1], LABEL), "white")
    ImageDraw.Draw(title).text((2, 1), name, fill="black")
    return np.concatenate([np.asarray(title), *rows])


def of_footage(root: str | None, split: str, count: int) -> dict[str, list[Sample]]:
    """Returns the first pair of `count` clips of each class."""
    found = {}
    for name, about in CLASSES.items():
        files = footage(root, split=split, classes=name, limit=count * about.pairs)
        found[name] = [files[k * about.pairs] for k in range(count)]
    return found


def of_worlds(root: str | None, count: int) -> dict[str, list[Sample]]:
    """Returns `count` training pairs of each world."""
    textures, found = photographs(root) if root else None, {}
    for world in MIXTURE:
        batch = generate(count, *SIZE, seed=18, textures=textures, mixture={world: 1.0})
        found[world.__name__] = [Sample(*(part[k] for part in batch[:4])) for k in range(count)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--root", help="photographs and cut-outs; default: procedural surfaces")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--worlds", action="store_true", help="of training, in place of footage")
    parser.add_argument("--count", type=int, default=8, help="pairs of each")
    parser.add_argument("--columns", type=int, default=4)
    given = parser.parse_args()
    samples = of_worlds(given.root, given.count) if given.worlds else of_footage(given.root, given.split, given.count)
    blocks = [block(name, rows, given.columns) for name, rows in samples.items()]
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(blocks)).save(given.picture, quality=72)
    print(given.picture, given.picture.stat().st_size // 1024, "KB")


if __name__ == "__main__":
    main()
