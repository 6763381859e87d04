"""The command `fleetflow predict`."""

from pathlib import Path
from typing import Annotated

import tyro

from fleetflow.cli.console import bar
from fleetflow.cli.options import Format, Positional, Precision, Several, flat
from fleetflow.types import FleetflowError


def predict(
    inputs: Positional[tuple[Path, ...]],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("flow"),
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    format: Annotated[Several[Format], tyro.conf.arg(aliases=["-f"])] = (),
    device: str = "auto",
    precision: Precision = "auto",
    iterations: int | None = None,
    warm_start: bool = False,
    scale: float | None = None,
    again: bool = False,
) -> None:
    """Predict flow: between two pictures, along the pictures of a folder, or along a video.

    Args:
        inputs: two pictures, one folder, or one video.
        output: a folder, or for two pictures also a file such as flow.flo or flow.png.
        model: a network or NETWORK:CHECKPOINT.
        format: what to write; "color" and "side" are pictures (of a video: an mp4). Default: flo color, or what the
            suffix of the output says.
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor has units for it.
        iterations: refinement iterations of RAFT, GMA, DEQ-Flow; their own if not given.
        warm_start: let each pair of a folder or video start from where the one before it ended (RAFT, GMA, DEQ-Flow).
        scale: pixels of motion shown at full color; chosen from the clip if not given.
        again: compute anew what a former run has finished.

    Examples:
        fleetflow predict frame1.png frame2.png -o flow.png
        fleetflow predict clip.mp4 -o out --format color flo
    """
    import warnings

    formats = flat(format) if format else None
    from fleetflow.inference import files as job
    from fleetflow.inference.predictor import Predictor
    from fleetflow.models.weights import load

    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is said in one line
    if len(inputs) not in (1, 2):
        raise FleetflowError(f"{len(inputs)} inputs were given; expected two pictures, one folder or one video")
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise FleetflowError(f"{missing[0]} does not exist; give two pictures, one folder or one video")
    if warm_start and len(inputs) == 2:
        raise FleetflowError("two pictures have no pair before them; leave --warm-start out, or give a folder or video")
    predictor = Predictor(load(model), device=device, precision=precision, iterations=iterations)
    problem = None
    if len(inputs) == 2:
        written = job.predict_pair(predictor, *inputs, output, formats, scale=scale)
    else:
        work = job.predict_folder if inputs[0].is_dir() else job.predict_video
        with bar(f"flow of {inputs[0].name}") as progress:
            options = {"scale": scale, "warm_start": warm_start, "again": again}
            result = work(predictor, inputs[0], output, formats, **options, progress=progress)
        written, problem = result if isinstance(result, tuple) else (result, None)
    for path in written if len(written) <= 4 else (*written[:2], "...", written[-1]):
        print(path)
    if problem:
        raise FleetflowError(f"{problem} (what could be read was written)")
