"""Does fine-tuning pay, and what does it cost? python benchmarks/finetune.py FOLDER

A domain that the weights of the package have not seen: a thermal camera, which has one channel, less than half the contrast
in which warm is bright, blur, grain, and columns of its own sensitivity, which do not move with the scene. Its pairs are
generated, so their flow is exact. The recipe `finetune` learns from a folder of them as a user's would; then start and
result are measured on pairs of the domain that no run has seen, and on footage (split=validation).
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from footage_table import clips

from fleetflow.data.dataset import Files, open_files
from fleetflow.data.generate import generate
from fleetflow.data.generate.filmed import front_world, shake_world, watch_world
from fleetflow.evaluation.evaluate import measure
from fleetflow.evaluation.protocol import open_model
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.training.loop import train

WORLDS = {watch_world: 0.4, shake_world: 0.3, front_world: 0.3}
SIZE = 256, 384


def thermal(frames: torch.Tensor, columns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The frames [N, 3, H, W] in [0, 1] as the thermal camera shows them; columns: [W], its sensitivity."""
    warm = 1 - frames.mean(1, keepdim=True)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for _ in range(2):
        warm = F.conv2d(F.pad(warm, (1, 1, 1, 1), mode="replicate"), kernel.outer(kernel)[None, None])
    grain = 0.02 * torch.randn(warm.shape, generator=generator)
    return (0.3 + 0.4 * warm + columns + grain).clamp(0, 1).expand(-1, 3, -1, -1)


def write_pairs(folder: Path, count: int, seed: int) -> None:
    """Writes pairs of the domain as the data set `folder` reads them."""
    generator = torch.Generator().manual_seed(seed)
    columns = 0.02 * torch.randn(SIZE[1], generator=torch.Generator().manual_seed(0))
    for k in range(count):
        if (folder / f"{k:03d}_flow.flo").exists():
            continue
        sample = generate(1, *SIZE, seed=seed, index=k, mixture=WORLDS)
        for n, frames in enumerate((sample.frame1, sample.frame2), 1):
            image = thermal(frames, columns, generator)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
            write_image(folder / f"{k:03d}_img{n}.png", image)
        write_flow(folder / f"{k:03d}_flow.flo", sample.flow[0].permute(1, 2, 0).numpy())


def scores(models: dict[str, str], dataset: str, files: Files) -> dict[str, dict[str, float]]:
    """Returns the mean error of each model over the sets: end-point error in pixels, and percentage over 3 px."""
    predictors = {name: open_model(model, dataset, precision="fp32") for name, model in models.items()}
    found = {name: [] for name in models}
    for part in clips(files):  # made once, and shown to all
        for name, predict in predictors.items():
            result = measure(predict, part, model=name, dataset=dataset)
            found[name] += result.pairs
    tables = {name: result._replace(pairs=pairs).score() for name, pairs in found.items()}
    return {name: table.get("mean of sets") or next(iter(table.values())) for name, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="fastflownet")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--unseen", type=int, default=24)
    parser.add_argument("--footage", type=int, default=4, help="pairs of each class")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", nargs="*", default=["batch=2", "height=192", "width=320"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    write_pairs(given.folder / "mine", given.pairs, seed=1)
    write_pairs(given.folder / "unseen", given.unseen, seed=2)
    began = time.process_time()
    settings = dict(setting.split("=") for setting in given.set)
    run = given.folder / "run"
    train("finetune", start=(given.network,), data="folder", root=given.folder / "mine", folder=run, steps=given.steps,
          settings=settings, threads=1, workers=0, precision="fp32", resume=(run / "run.json").exists())  # fmt: skip
    rows = {"cpu_minutes": (time.process_time() - began) / 60}
    models = {"start": given.network, "result": str(run / "weights.safetensors")}
    footage = ("split=validation", f"limit={given.footage}", "size=288x512")
    for what, root, options in (("folder", given.folder / "unseen", ()), ("footage", None, footage)):
        rows[what] = scores(models, what, open_files(what, root, options=options))
        for key in ("epe", "out3"):
            start, result = rows[what]["start"][key], rows[what]["result"][key]
            print(f"{what} {key}: {start:.3f} before, {result:.3f} after, ratio {result / start:.3f}", flush=True)
    (given.folder / "finetune.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
