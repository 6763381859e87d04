"""Renders the example in the package: one generated pair with procedural textures, its flow as a KITTI png."""

from pathlib import Path

import numpy as np

from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import shapes_world
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image

SEED, INDEX = 7, 36  # chosen by eye: two objects that turn before a background that zooms, motions up to 20 px


def main() -> None:
    folder = Path(__file__).parents[1] / "src" / "fleetflow" / "example"
    sample = generate(1, 320, 448, seed=SEED, index=INDEX, mixture={shapes_world: 1.0})
    for k, frame in ((1, sample.frame1), (2, sample.frame2)):
        image = (frame[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        write_image(folder / f"frame{k}.png", image)
    write_flow(folder / "flow.png", sample.flow[0].permute(1, 2, 0).numpy(), sample.valid[0].numpy())


if __name__ == "__main__":
    main()
