"""A picture of the classes of footage, or of the worlds of training: frame1, frame2 and flow of some pairs of each.

python benchmarks/footage_sheet.py docs/lab/footage.jpg
python benchmarks/footage_sheet.py docs/lab/worlds.webp --worlds --count 64 --columns 8 --height 40
"""

import argparse
import math
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

SIZE = (256, 320)  # of training pairs
AT_ONCE = 8  # training pairs that are made together, for memory
LABEL = 14  # height of a line of text


def triple(sample: Sample, height: int) -> np.ndarray:
    """Returns frame1, frame2 and the flow, each of this height and with its own scale of colors, side by side."""
    size = (round(height * sample.flow.shape[2] / sample.flow.shape[1]), height)
    flow = flow_to_color(sample.flow.permute(1, 2, 0).numpy())
    pictures = [Image.fromarray(picture).resize(size, Image.LANCZOS) for picture in (*to_images(sample), flow)]
    return np.concatenate([np.asarray(picture) for picture in pictures], 1)


def block(name: str, samples: list[Sample], columns: int, height: int) -> np.ndarray:
    """Returns the samples of a class in rows, under its name; `height` is that of a picture."""
    cells = [np.pad(triple(sample, height), ((0, 2), (0, 4), (0, 0)), constant_values=255) for sample in samples]
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
    for number, world in enumerate(MIXTURE):
        found[world.__name__] = rows = []
        for index in range(math.ceil(count / AT_ONCE)):
            size = min(AT_ONCE, count - len(rows))
            batch = generate(size, *SIZE, seed=18 + number, index=index, textures=textures, mixture={world: 1.0})
            rows += [Sample(*(part[k] for part in batch[:4])) for k in range(size)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--root", help="photographs and cut-outs; default: procedural surfaces")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--worlds", action="store_true", help="of training, in place of footage")
    parser.add_argument("--count", type=int, default=8, help="pairs of each")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--height", type=int, default=84, help="of a picture in the sheet, pixels")
    given = parser.parse_args()
    samples = of_worlds(given.root, given.count) if given.worlds else of_footage(given.root, given.split, given.count)
    blocks = [block(name, rows, given.columns, given.height) for name, rows in samples.items()]
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(blocks)).save(given.picture, quality=60)
    print(given.picture, given.picture.stat().st_size // 1024, "KB")


if __name__ == "__main__":
    main()
