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
    size: tuple[int, int] | None = None,
    scale: float | None = None,
    iterations: int | None = None,
    warm_start: bool = False,
    frames: str | None = None,
    every: int = 1,
    scenes: bool = True,
    overwrite: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    memory: str | None = None,
) -> None:
    """Predict flow: between two pictures, along the pictures of a folder, or along a video.

    Args:
        inputs: two pictures, one folder, or one video.
        output: a folder, or for two pictures also a file such as flow.flo or flow.png.
        model: a network, NETWORK:CHECKPOINT, or a file that `fleetflow export` wrote.
        format: what to write; "color", "side", "arrows", "streamlines" are pictures (of a video: an mp4), "backward" is
            the flow back, "occlusion" and "uncertainty" are gray pictures, "exr" and "stmap" are for compositing.
            Default: flo color, or what the suffix of the output says.
        size: height and width at which the network sees the frames; the flow is that of the frames as they are.
        scale: pixels of motion shown at full color; chosen from the clip if not given.
        iterations: refinement iterations of RAFT, GMA, DEQ-Flow; their own if not given.
        warm_start: let each pair of a folder or video start from where the one before it ended (RAFT, GMA, DEQ-Flow).
        frames: A:B, of a folder or video only frame A (0 is the first) up to B, which is left out; as 100:200, :50, 100:
        every: 2 takes every second frame of those, and so on.
        scenes: pair only pictures of a folder whose names differ in their last number alone.
        overwrite: compute anew what a former run has finished, and replace files in the way.
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor is faster in it.
        threads: 0 takes all.
        memory: what the process may take, such as 4G: large frames are predicted in tiles then.

    Examples:
        fleetflow predict frame1.png frame2.png -o flow.png
        fleetflow predict clip.mp4 -o out --format color flo --frames 0:100 --every 2
    """
    import warnings

    from fleetflow.inference import files as job
    from fleetflow.inference.device import use_threads
    from fleetflow.inference.memory import parse_bytes
    from fleetflow.inference.pairing import described
    from fleetflow.inference.predictor import Predictor

    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is said in one line
    formats = flat(format) if format else None
    _check_inputs(inputs, warm_start, frames, every)
    use_threads(threads)
    limit = None if memory is None else parse_bytes(memory)
    predictor = Predictor(model, device=device, precision=precision, iterations=iterations, size=size, memory=limit)
    problem, options = None, {"scale": scale, "overwrite": overwrite}
    if len(inputs) == 2:
        written = job.predict_pair(predictor, *inputs, output, formats, **options)
    else:
        options |= {"warm_start": warm_start, "frames": frames, "every": every}
        with bar(f"flow of {inputs[0].name}") as progress:
            if inputs[0].is_dir():
                clips = job.clips_of(inputs[0], not scenes, frames, every)
                written = job.predict_folder(
                    predictor, inputs[0], output, formats, **options, one_scene=not scenes, progress=progress
                )
            else:
                clips = []
                written, problem = job.predict_video(
                    predictor, inputs[0], output, formats, **options, progress=progress
                )
        if len(clips) > 1:
            print(described(clips))
    for path in written if len(written) <= 4 else (*written[:2], "...", written[-1]):
        print(path)
    if problem:
        raise FleetflowError(f"{problem} (what could be read was written)")


def _check_inputs(inputs: tuple[Path, ...], warm_start: bool, frames: str | None, every: int) -> None:
    """Raises FleetflowError for inputs that are not there, or not two pictures, one folder or one video."""
    if len(inputs) not in (1, 2):
        raise FleetflowError(f"{len(inputs)} inputs were given; expected two pictures, one folder or one video")
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise FleetflowError(f"{missing[0]} does not exist; give two pictures, one folder or one video")
    if len(inputs) == 2 and (frames is not None or every != 1):
        raise FleetflowError("two pictures are one pair; leave --frames and --every out, or give a folder or video")
    if warm_start and len(inputs) == 2:
        raise FleetflowError("two pictures have no pair before them; leave --warm-start out, or give a folder or video")
