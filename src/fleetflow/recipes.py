"""The experiments, one row each: what a training run depends on besides the code. `fleetflow recipes` lists them."""

from dataclasses import dataclass

from fleetflow.registry import unknown


@dataclass(frozen=True)
class Stage:
    """A part of a run with one crop size: `steps` batches of `batch` pairs of height x width pixels."""

    steps: int
    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class Recipe:
    """One experiment. The learning rate warms up, stays, and falls to zero over the last part, the cool-down.

    So a run can be prolonged: resume a checkpoint from before the cool-down with more steps.
    """

    network: str
    stages: tuple[Stage, ...]
    learning_rate: float
    warmup: int  # steps
    cooldown: float  # share of all steps
    weight_decay: float
    clip: float  # largest norm of the gradient
    ema: float  # decay of the averaged weights, which are the ones saved
    source: str

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Returns the stage that step (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def samples(self, step: int) -> int:
        """Returns the number of pairs seen before step."""
        total = 0
        for stage in self.stages:
            total += min(max(step, 0), stage.steps) * stage.batch
            step -= stage.steps
        return total


RECIPES = {
    "fastflownet_synthetic": Recipe(
        network="fastflownet",
        stages=(Stage(6_000, 8, 192, 256), Stage(3_700, 5, 256, 512)),
        learning_rate=0.006,
        warmup=200,
        cooldown=0.25,
        weight_decay=0.01,
        clip=20.0,
        ema=0.999,
        source="ours: generated pairs only, sized for an afternoon on two CPU cores",
    ),
    "fastflownet_wide": Recipe(
        network="fastflownet",
        stages=(Stage(5_000, 4, 320, 640),),
        learning_rate=0.004,
        warmup=100,
        cooldown=0.35,
        weight_decay=0.01,
        clip=20.0,
        ema=0.999,
        source="ours: large frames and motions, after fastflownet_synthetic (--start fastflownet)",
    ),
}


def recipe(name: str) -> Recipe:
    """Returns the recipe called `name`; raises FleetflowError for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, sorted(RECIPES))
    return RECIPES[name]
