"""Fine-tuning: trained weights learn from pairs of one's own, and keep what they know.

    fleetflow train finetune --start NETWORK --data folder --root DIR

Every fourth batch is of generated pairs, on which the weights of the package were trained. That is the guard against
forgetting: unlike a penalty on the distance from the start it has no strength that would have to be found anew for each
network and optimizer, and it costs no stored data.
"""

from dataclasses import replace
from functools import partial

from fleetflow.data.dataset import Files
from fleetflow.data.generate.worlds import MIXTURE
from fleetflow.io.images import read_image
from fleetflow.models import weights
from fleetflow.models.spec import ModelSpec
from fleetflow.registry import unknown
from fleetflow.training import schedules
from fleetflow.training.recipe import Batches, Recipe, Stage
from fleetflow.training.recipes import RECIPES
from fleetflow.training.recipes.flownet_family import FINAL
from fleetflow.types import FleetflowError

FINETUNE = "finetune"  # as the user calls it; a run keeps it as finetune:NETWORK
RATE = 0.1  # of the learning rate of a recipe that trains from nothing
GENERATED_EVERY = 4
SCHEDULE = partial(schedules.cosine, warmup=20)
LOOKED_AT = 50  # pairs whose size decides the crop


def finetune(network: str) -> Recipe:
    """Returns the recipe that fine-tunes a network: optimizer and loss of the recipe that trains it, and a low rate.

    Raises:
        FleetflowError: no recipe trains the network.
    """
    stage = _template(network)
    stage = replace(
        stage,
        name=FINETUNE,
        batches=(Batches(1_000, 4, 320, 448),),
        learning_rate=stage.learning_rate * (1 if stage.sources else RATE),
        schedule=SCHEDULE,
        ema=0.98,
        sources=(),
        mixture=MIXTURE.copy(),
        network=None,
        initial_flow=None,
        teacher=None,
        init=None,
        grow=None,
        needs_weights=True,
        validation=(),
        validate_every=50,
        generated_every=GENERATED_EVERY,
        keep_best=True,
    )
    return Recipe(network, (stage,), "ours: fine-tuning on pairs of one's own")


def _template(network: str) -> Stage:
    """The stage whose optimizer and loss fine-tune a network: of our own recipe, else of published fine-tuning."""
    last = [(plan, plan.stages[-1]) for plan in RECIPES.values()]
    known = [stage for plan, stage in last if (stage.network or plan.network) == network and stage.loss is not FINAL]
    own = [stage for stage in known if not stage.sources]
    tuned = [stage for stage in known if stage.needs_weights]
    if not known:
        raise unknown("network with a recipe", network, sorted({plan.network for plan in RECIPES.values()}))
    return (own or tuned or known)[0]


def network_of(start: tuple[str, ...]) -> str:
    """Returns the network of the weights that fine-tuning starts from.

    Raises:
        FleetflowError: there are none, or several, or they do not name their network.
    """
    if len(start) != 1:
        raise FleetflowError("fine-tuning starts from the weights of one network; give --start NETWORK[:CHECKPOINT]")
    spec = ModelSpec.parse(start[0])
    network = spec.network
    if not network and spec.path and weights.is_safetensors(spec.path):
        network = weights.header(spec.path).get("network", "")
    if not network:
        raise FleetflowError(f"{start[0]} does not name its network; call it as NETWORK:{start[0]}")
    return network


def crop_for(network: str, files: Files, largest: Batches) -> tuple[int, int]:
    """Returns the height and width of the crops: as in the recipe, or the most that fits into the frames.

    Args:
        network: whose stride divides the crop.
        files: the pairs; of many, fifty are looked at.
        largest: the crop of the recipe.

    Raises:
        FleetflowError: the frames are smaller than the stride.
    """
    stride = weights.without_memory(network).stride
    looked_at = files.pairs[:: max(1, len(files) // LOOKED_AT)]
    sizes = [read_image(pair.frame1).shape[:2] for pair in looked_at]
    height, width = (min(size[axis] for size in sizes) // stride * stride for axis in (0, 1))
    if not height or not width:
        raise FleetflowError(f"frames of {min(sizes)} are smaller than the stride of {network}, {stride}; enlarge them")
    return min(height, largest.height), min(width, largest.width)
