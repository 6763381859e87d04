"""The experiments, one row each. `fleetflow recipes` lists them, `fleetflow train` runs them."""

from functools import partial

from fleetflow.models.fastflownet import start_as_matcher
from fleetflow.plan import Batches, Recipe, Stage
from fleetflow.registry import unknown


def warm_flat_cool(step: int, steps: int, *, warmup: int, cooldown: float) -> float:
    """Returns a linear warm-up of `warmup` steps, then 1, then a straight line to 0 over the share `cooldown`."""
    warm = (step + 1) / warmup if warmup else 1.0
    left = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return max(0.0, min(1.0, warm, left))


RECIPES = {
    "fastflownet_synthetic": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(6_000, 8, 192, 256), Batches(3_700, 5, 256, 512)),
                learning_rate=0.006,
                schedule=partial(warm_flat_cool, warmup=200, cooldown=0.25),
                weight_decay=0.01,
                begin=start_as_matcher,
            ),
        ),
        "ours: generated pairs only, sized for an afternoon on two CPU cores",
    ),
    "fastflownet_wide": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(5_500, 4, 320, 640),),
                learning_rate=0.004,
                schedule=partial(warm_flat_cool, warmup=100, cooldown=0.35),
                weight_decay=0.01,
            ),
        ),
        "ours: large frames and motions, after fastflownet_synthetic (--start fastflownet)",
    ),
}


def recipe(name: str) -> Recipe:
    """Returns the recipe called `name`; raises FleetflowError for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, sorted(RECIPES))
    return RECIPES[name]
