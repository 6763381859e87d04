"""The command `fleetflow train`."""

from pathlib import Path

from fleetflow.cli.options import Positional, Precision, Several, flat
from fleetflow.types import FleetflowError


def train(
    recipe: Positional[str],
    /,
    folder: Path | None = None,
    resume: bool = False,
    start: Several[str] = (),
    stage: str | None = None,
    set: Several[str] = (),
    root: Path | None = None,
    data: str | None = None,
    textures: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    repeat: int = 1,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    workers: int | None = None,
    gradient_accumulation: int | None = None,
    compile: bool = False,
    save_memory: bool = False,
    checkpoint_every: int = 250,
) -> None:
    """Train a recipe, or fine-tune a network on pairs of your own; the weights lie in FOLDER/weights.safetensors.

    Args:
        recipe: such as fastflownet_synthetic; `fleetflow recipes` lists them. finetune takes the network of --start.
        folder: where the run lives; default runs/RECIPE.
        resume: continue exactly where the last checkpoint left off, with what the run was begun with.
        start: a network or NETWORK:CHECKPOINT whose weights the run starts from (two for FlowNet2: --start A B).
        stage: train this stage of the recipe alone.
        set: name=value, in place of what the recipe says: learning_rate=1e-4 batch=4 steps=1000 ...
        root: the folder that holds the data sets, for recipes that use them.
        data: train on this data set instead, in the folder --root: folder, folder:split=train, sintel:render=final ...
        textures: a folder of photographs for the surfaces of generated pairs; default: procedural ones.
        minutes: stop after so long; the run can be resumed.
        steps: stop at this step; the run can be resumed. With finetune the whole length, which the schedule fits.
        seed: of weights and data; default 0.
        repeat: so many runs with seeds from SEED on, in FOLDER/seed-N, with their mean and spread.
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
        threads: of the training process; 0 takes all.
        workers: processes that make or read pairs; default: 1, and for data sets as many as cores, up to 8.
        gradient_accumulation: parts of a batch over which gradients are accumulated; default: one for each process.
        compile: use torch.compile, which needs a compiler and minutes before the first step.
        save_memory: compute activations again instead of keeping them.
        checkpoint_every: steps between checkpoints; a killed run loses at most so many.

    Examples:
        fleetflow train fastflownet_synthetic --folder runs/first --minutes 10
        fleetflow train fastflownet_synthetic --folder runs/first --resume --steps 2000
    """
    from statistics import fmean, stdev

    from fleetflow.training import distributed as processes
    from fleetflow.training import loop as job

    wrong = [text for text in flat(set) if "=" not in text]
    if wrong:
        raise FleetflowError(f'"{wrong[0]}" is not a setting; expected name=value, such as batch=4')
    if repeat < 1:
        raise FleetflowError(f"--repeat is {repeat}; expected a number of runs from 1 on")
    settings = dict(text.split("=", 1) for text in flat(set))
    folder = folder or Path("runs") / recipe
    seeds = [seed] if repeat == 1 else [(seed or 0) + k for k in range(repeat)]
    first, outcomes = None, []
    for one in seeds:
        place = folder if repeat == 1 else folder / f"seed-{one}"
        like = first if resume and not (place / "checkpoint.pt").exists() else None  # begins as the first one did
        outcome = job.train(
            recipe, folder=place, resume=resume and not like, like=like, start=flat(start), stage=stage, settings=settings,
            root=root, data=data, textures=textures, minutes=minutes, steps=steps, seed=one, device=device,
            precision=precision, threads=threads, workers=workers,
            gradient_accumulation=gradient_accumulation, compile=compile, save_memory=save_memory,
            checkpoint_every=checkpoint_every,
        )  # fmt: skip
        print(f"step {outcome.step} of {outcome.steps}, EPE of the last steps {outcome.epe:.2f} px")
        if outcome.best:
            best = outcome.best
            print(
                f"held-back pairs: EPE {best.start:.3f} px before, {best.epe:.3f} px at step {best.step}, which is kept"
            )
        print(outcome.weights)
        outcomes.append(outcome.epe)
        first = first or outcome.checkpoint
    processes.leave()
    if repeat > 1:
        print(f"EPE of the last steps over {repeat} runs: {fmean(outcomes):.3f} px, spread {stdev(outcomes):.3f}")
