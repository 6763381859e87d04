"""The command `fleetflow adapt`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.cli.console import table
from fleetflow.cli.options import Positional
from fleetflow.types import FleetflowError


def adapt(
    frames: Positional[Path],
    /,
    start: Annotated[str, tyro.conf.arg(name="from")] = "fastflownet",
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("weights.safetensors"),
    other: Annotated[str | None, tyro.conf.arg(name="with")] = None,
    steps: int = 300,
    batch: int = 2,
    size: tuple[int, int] = (256, 448),
    learning_rate: float = 0.002,
    occlusion: Literal["consistency", "range"] = "consistency",
    order: Literal[1, 2] = 1,
    measure_every: int = 25,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 0,
) -> None:
    """Fine-tune a network on a video or a folder of frames, without truth; the last fifth is only measured on.

    Args:
        frames: a video, or a folder of consecutive pictures.
        start: the network that is adapted, or NETWORK:CHECKPOINT.
        output: the file for the best weights, never worse than the start on the held-back frames.
        other: a second network that learns too; each teaches the other what it is sure of.
        steps: of training.
        batch: pairs in a step.
        size: height and width of the crops.
        learning_rate: of the inner convolutions (Muon).
        occlusion: how hidden pixels are found: flow there and back agree, or something comes from there.
        order: of the smoothness: 1 for constant flow, 2 for flow that is linear (roads, walls).
        measure_every: steps between measurements.
        seed: of crops and views.
        device: auto, cpu, cuda, ...
        precision: of the convolutions in training; all measuring is in fp32.
        threads: 0 takes all.

    Examples:
        fleetflow adapt clip.mp4 -o adapted.safetensors
        fleetflow adapt frames --from deq_flow_tiny --steps 500 -o adapted.safetensors
    """
    from fleetflow.training import adapt as job

    problems: list[str] = []
    pairs = job.read_pairs(frames, problems.append)
    for problem in problems:
        print(f"warning: {problem} (what could be read is learned from)")
    outcomes = job.adapt(
        pairs, output, start=start, other=other, name=frames.name, steps=steps, batch=batch,
        size=size, learning_rate=learning_rate, occlusion=occlusion, order=order, measure_every=measure_every,
        seed=seed, device=device, precision=precision, threads=threads,
    )  # fmt: skip
    rows = []
    for outcome in outcomes:
        for when, error in (("start", outcome.start), (f"step {outcome.step}", outcome.best)):
            rows.append([outcome.network, when, f"{error.census:.3f}", f"{error.l1:.3f}", f"{error.length:.2f}"])
    table("held-back pairs", ["network", "weights of", "census %", "L1 (of 255)", "flow px"], rows)
    for outcome in outcomes:
        print(outcome.weights)
    if problems:
        raise FleetflowError(f"{problems[0]} (what could be read was learned from)")
