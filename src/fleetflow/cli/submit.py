"""The command `fleetflow submit`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.cli.console import bar
from fleetflow.cli.options import Positional, Precision
from fleetflow.types import FleetflowError


def submit(
    model: Positional[str],
    benchmark: Positional[Literal["sintel", "kitti2012", "kitti2015", "spring"]],
    /,
    root: Path,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("submission.zip"),
    iterations: int | None = None,
    warm_start: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
) -> None:
    """Predict the test frames of a public benchmark in its official layout, check every file, and zip them.

    An interrupted run continues by the same command. Nothing is uploaded.

    Args:
        model: a network, NETWORK:CHECKPOINT, dis, ..., a Python file with a function predict(image1, image2) -> flow
            or predict(image1, image2, name); or a folder or .zip of finished files, which is only checked (./NAME where
            it is called like a network).
        benchmark: whose test frames and whose layout.
        root: the folder of the data set.
        output: the .zip to write; the files stay in the folder of the same name. Without .zip: that folder only.
        iterations: refinement iterations of the network; if not given those its authors took for the server, else its own.
        warm_start: let each pair start from where the one before it in its scene ended (RAFT, GMA, DEQ-Flow).
        device: auto, cpu, cuda, cuda:1, mps, xpu, npu, hpu, ... as torch has them here.
        precision: of the convolutions.
        threads: 0 takes all.

    Examples:
        fleetflow submit raft:raft-sintel.pth sintel --root Sintel -o sintel.zip
        fleetflow submit sintel.zip sintel --root Sintel
    """
    from fleetflow.evaluation import submit as job
    from fleetflow.evaluation.baselines import CLASSICAL
    from fleetflow.evaluation.protocol import open_model
    from fleetflow.inference.device import use_threads
    from fleetflow.registry import models

    if job.is_finished(model, (*models, *CLASSICAL)):
        with bar(f"checking {model}") as progress:
            problems = job.problems(
                Path(os.path.expanduser(model)), benchmark, root, progress=lambda *state: progress(state)
            )
        if problems:
            raise FleetflowError(f"{benchmark} would refuse {model}: {job.summary(problems)}")
        print(f"{model} is a whole submission to {benchmark}")
        return
    use_threads(threads)
    predict = open_model(model, benchmark, iterations=iterations, device=device, precision=precision, submission=True)
    label = {"model": model, **predict.label()}
    with bar(f"{model} on {benchmark}") as progress:
        options = {"warm_start": warm_start, "progress": lambda *state: progress(state)}
        written = job.submit(predict, benchmark, root, output, label, **options)
    print(written)
    print(job.next_step(benchmark, written))
