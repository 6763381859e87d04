"""The command line: each command is a typed function, and its signature is its help. torch is imported by the jobs."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.types import FleetflowError

Positional = tyro.conf.Positional
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal["flo", "kitti", "npy", "npz", "pfm", "flo5", "color", "side"]


def predict(
    inputs: Positional[tuple[Path, ...]],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("flow"),
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    format: Annotated[tuple[Format, ...], tyro.conf.arg(aliases=["-f"])] = ("flo", "color"),
    device: str = "auto",
    precision: Precision = "auto",
    scale: float | None = None,
    again: bool = False,
) -> None:
    """Predict flow: between two pictures, along the pictures of a folder, or along a video.

    Args:
        inputs: two pictures, one folder, or one video.
        output: a folder, or for two pictures also a file such as flow.flo or flow.png.
        model: a network, or NETWORK:CHECKPOINT.
        format: what to write; "color" and "side" are pictures (of a video: an mp4).
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor has units for it.
        scale: pixels of motion shown at full colour; chosen from the clip if not given.
        again: compute anew what a former run has finished.
    """
    from fleetflow import predict as job
    from fleetflow.models.weights import load

    if len(inputs) not in (1, 2):
        raise FleetflowError(f"{len(inputs)} inputs were given; expected two pictures, one folder or one video")
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise FleetflowError(f"{missing[0]} does not exist; give two pictures, one folder or one video")
    predictor = job.Predictor(load(model), device=device, precision=precision)
    problem = None
    if len(inputs) == 2:
        written = job.predict_pair(predictor, *inputs, output, format)
    else:
        work = job.predict_folder if inputs[0].is_dir() else job.predict_video
        with _bar(f"flow of {inputs[0].name}") as progress:
            result = work(predictor, inputs[0], output, format, scale=scale, again=again, progress=progress)
        written, problem = result if isinstance(result, tuple) else (result, None)
    for path in written if len(written) <= 4 else (*written[:2], "...", written[-1]):
        print(path)
    if problem:
        raise FleetflowError(f"{problem} (what could be read was written)")


def train(
    recipe: Positional[str],
    /,
    folder: Path | None = None,
    resume: bool = False,
    start: str | None = None,
    stage: str | None = None,
    set: tuple[str, ...] = (),
    root: Path | None = None,
    textures: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    repeat: int = 1,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    workers: int = 1,
    parts: int | None = None,
    compile: bool = False,
    save_memory: bool = False,
    checkpoint_every: int = 250,
) -> None:
    """Train a recipe; the averaged weights lie in FOLDER/weights.safetensors.

    Args:
        recipe: such as fastflownet_synthetic; `fleetflow recipes` lists them.
        folder: where the run lives; default runs/RECIPE.
        resume: continue exactly where the last checkpoint left off.
        start: a network or NETWORK:CHECKPOINT whose weights the run starts from.
        stage: train this stage of the recipe alone.
        set: name=value, in place of what the recipe says: learning_rate=1e-4 batch=4 steps=1000 ...
        root: the folder that holds the data sets, for recipes that use them.
        textures: a folder of photographs for the surfaces of generated pairs; default: procedural ones.
        minutes: stop after so long; the run can be resumed.
        steps: stop at this step; the run can be resumed.
        seed: of weights and data.
        repeat: so many runs with seeds from SEED on, in FOLDER/seed-N, with their mean and spread.
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
        threads: of the training process; 0 takes all.
        workers: processes that make or read pairs.
        parts: parts of a batch, over which gradients are accumulated; default: one for each process.
        compile: use torch.compile, which needs a compiler.
        save_memory: compute activations again instead of keeping them.
        checkpoint_every: steps between checkpoints; a killed run loses at most so many.
    """
    from statistics import fmean, stdev

    from fleetflow import train as job

    wrong = [text for text in set if "=" not in text]
    if wrong:
        raise FleetflowError(f'"{wrong[0]}" is not a setting; expected name=value, such as batch=4')
    settings = dict(text.split("=", 1) for text in set)
    outcomes = []
    for k in range(repeat):
        place = folder if repeat == 1 else (folder or Path("runs") / recipe) / f"seed-{seed + k}"
        outcome = job.train(
            recipe, folder=place, resume=resume, start=start, stage=stage, settings=settings, root=root,
            textures=textures, minutes=minutes, steps=steps, seed=seed + k, device=device, precision=precision,
            threads=threads, workers=workers, parts=parts, compile=compile, save_memory=save_memory,
            checkpoint_every=checkpoint_every,
        )  # fmt: skip
        print(f"step {outcome.step} of {outcome.steps}, EPE of the last steps {outcome.epe:.2f} px")
        print(outcome.weights)
        outcomes.append(outcome.epe)
    if repeat > 1:
        print(f"EPE of the last steps over {repeat} runs: {fmean(outcomes):.3f} px, spread {stdev(outcomes):.3f}")


def evaluate(
    model: Positional[str],
    dataset: Positional[str],
    /,
    root: Path,
    without: tuple[str, ...] = (),
    device: str = "auto",
    precision: Precision = "auto",
    json: Path | None = None,
) -> None:
    """Measure a network on a data set: means by set, and the mean of the sets.

    Args:
        model: a network, NETWORK:CHECKPOINT, or dis or farneback (OpenCV).
        dataset: such as pairs.
        root: the folder of the data set.
        without: names of pairs to leave out.
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
        json: a file to write the table to.
    """
    from fleetflow import evaluate as job
    from fleetflow.data.dataset import datasets
    from fleetflow.models.weights import load
    from fleetflow.predict import Predictor

    files = datasets[dataset](root, without=without)
    classical = model in (job.DIS, job.FARNEBACK)
    predict = job.classical(model) if classical else Predictor(load(model), device=device, precision=precision)
    with _bar(f"{model} on {dataset}") as progress:
        table = job.evaluate(predict, files, progress=lambda done, total: progress((done, total)))
    _table(
        f"{model} on {dataset} ({len(files)} pairs)",
        ["set", "EPE px", "% over 1", "% over 3", "% over 5", "Fl %"],
        [[name, *(f"{row[key]:.2f}" for key in ("epe", "out1", "out3", "out5", "fl"))] for name, row in table.items()],
    )
    if json:
        job.as_json(table, json)


def benchmark(
    models: Positional[tuple[str, ...]] = ("fastflownet",),
    /,
    size: tuple[int, int] = (448, 1024),
    device: str = "cpu",
    threads: int = 0,
    precision: Precision = "auto",
    seconds: float = 20.0,
    peers: tuple[str, ...] = ("dis",),
    training: bool = True,
    root: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time networks on this machine, beside their plain definitions and OpenCV's DIS, in one process.

    Args:
        models: networks, or NETWORK:CHECKPOINT.
        size: height and width of the frames.
        device: cpu, cuda, ...
        threads: 0 takes all.
        precision: of the convolutions.
        seconds: how long to measure each network.
        peers: dis, farneback, deepflow, or a Python file with a function predict(image1, image2) -> flow.
        training: also measure training steps (on the CPU).
        root: a folder of pairs with truth (data set "pairs"), to measure the accuracy on.
        json: a file to which one line of JSON per network is added.
        plot: a picture of accuracy against speed; needs --root.
    """
    import json as text

    from fleetflow import benchmark as job
    from fleetflow.data.pairs import pairs

    if plot and not root:
        raise FleetflowError("--plot shows accuracy against speed; give --root DIR, a folder of pairs with truth")
    files = pairs(root) if root else None
    reports = []
    for name in models:
        report = job.benchmark(
            name, *size, device=device, threads=threads, precision=precision, seconds=seconds, peers=peers,
            training=training, pairs=files,
        )  # fmt: skip
        reports.append(report)
        ours = report.timings[0].p50
        _table(
            f"{name}: one pair of {size[0]}x{size[1]}, {report.device}, {report.precision}, {report.threads} threads",
            ["", "p50 ms", "p95 ms", "runs", "times ours"],
            [[t.name, f"{t.p50:.1f}", f"{t.p95:.1f}", str(t.runs), f"{t.p50 / ours:.2f}"] for t in report.timings],
        )
        if report.times_dis():
            print(f"{report.times_dis():.2f} times the time of DIS")
        print(f"{report.parameters:,} parameters, {report.multiply_adds / 1e9:.1f} G multiply-adds at 448x1024")
        print(f"memory of a prediction: {report.memory:.0f} MB")
        print(f"mean difference to float32: {report.difference:.4f} px")
        if report.training:
            print(f"training at 256x320, batch 8: {report.training:.1f} samples/s")
        if report.epe is not None:
            print(f"EPE, mean of the sets: {report.epe:.2f} px")
        if json:
            with json.open("a") as file:
                file.write(text.dumps({**report._asdict(), "timings": [t._asdict() for t in report.timings]}) + "\n")
    print(", ".join(f"{key} {value}" for key, value in reports[0].machine.items()))
    if plot:
        job.pareto(reports, plot)
        print(plot)


def demo(output: Path = Path("demo")) -> None:
    """Predict the flow of the example in the package, compare it with the truth, and draw it.

    Args:
        output: the folder for the picture.
    """
    from fleetflow import demo as job

    result = job.demo(output)
    print(f"fastflownet on a generated pair of {result.height}x{result.width} pixels: {result.milliseconds:.0f} ms")
    print(f"mean error {result.epe:.2f} px (frames held still: {result.still:.2f} px)")
    print(result.picture)


def models(json: bool = False) -> None:
    """List the networks: size and cost, whose checkpoints they read, licences, our weights in the package, papers.

    Args:
        json: as JSON instead of a table.
    """
    from fleetflow import catalog

    rows = catalog.rows()
    if json:
        print(catalog.as_json(rows))
        return
    height, width = catalog.SIZE
    cells = [catalog.cells(row) for row in rows]
    costs, names = slice(0, 6), catalog.COLUMNS  # all columns together are too wide for a terminal
    _table(f"networks (multiply-adds for frames of {height}x{width})", names[costs], [row[costs] for row in cells])
    sources = [0, 6, 7, 8]
    _table("checkpoints they read", [names[k] for k in sources], [[row[k] for k in sources] for row in cells])


def convert(
    checkpoint: Positional[Path],
    variant: Positional[str],
    output: Positional[Path],
    /,
    licence: str = "unknown",
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write a published checkpoint in our format, .safetensors with a header.

    Args:
        checkpoint: the published file; nothing in it is executed.
        variant: the network it belongs to, such as fastflownet.
        output: the file to write.
        licence: of the weights, as their author states it.
        precision: of the stored weights.
    """
    import torch

    from fleetflow.models.weights import load, save

    if output.suffix != ".safetensors":
        raise FleetflowError(f"{output} does not end in .safetensors; name the output so")
    model = load(f"{variant}:{checkpoint}")
    header = {"network": variant, "licence": licence, "source": checkpoint.name}
    save(model, output, header, dtype=torch.float32 if precision == "fp32" else torch.float16)
    print(output)


def recipes() -> None:
    """List the training recipes, a row for each stage: steps, pairs, frames, learning rate, loss, data, source."""
    from fleetflow.recipes import RECIPES

    rows = []
    for name, plan in RECIPES.items():
        for k, stage in enumerate(plan.stages):
            sizes = dict.fromkeys(f"{part.batch} x {part.height}x{part.width}" for part in stage.batches)
            loss = getattr(stage.loss, "func", stage.loss).__name__
            data = ", ".join(dict.fromkeys(source.folder for source in stage.sources)) or "generated"
            rows.append(
                [name if k == 0 else "", stage.name, f"{stage.steps:,}", f"{stage.samples(stage.steps):,}",
                 ", ".join(sizes), f"{stage.learning_rate:g}", loss, data, plan.source if k == 0 else ""]
            )  # fmt: skip
    _table("recipes", ["name", "stage", "steps", "pairs", "batches", "rate", "loss", "data", "source"], rows)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


class _bar:
    """A progress bar on standard error: share, pairs per second, time left. Called with (done, total)."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(title, total=None, rate="")
        self.first: int | None = None

    def __call__(self, state) -> None:
        done, total = state
        if self.first is None:  # not before there is something to show: an error would stand behind an empty bar
            self.first = done
            self.bar.start()
        elapsed = self.bar.tasks[0].elapsed or 0
        rate = f"{(done - self.first + 1) / elapsed:.1f} frames/s" if elapsed > 0 else ""
        self.bar.update(self.task, completed=done, total=total, rate=rate)

    def __enter__(self) -> "_bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()


COMMANDS = {
    "predict": predict,
    "train": train,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "demo": demo,
    "models": models,
    "convert": convert,
    "recipes": recipes,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after one line on what is wrong."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fleetflow", args=arguments, description=__doc__)
    except (FleetflowError, OSError) as error:
        print(f"fleetflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fleetflow: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
