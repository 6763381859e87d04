"""DEQ-Flow: Bai, Geng, Savani, Kolter, "Deep Equilibrium Optical Flow Estimation", CVPR 2022, arXiv 2204.08442.

RAFT or GMA whose recurrent update is not repeated but solved: hidden state and flow are the fixed point of one step.
Any solver of `fleetflow.deq` may find it, training takes the memory of one step however many were made, the next frame
of a video starts from the last fixed point, and what is left of f(z) - z says where the flow is not settled.

The published code has two versions. deq_flow_b (5,242,816 parameters) and deq_flow_h (12,799,808) are of the first,
which solves with Anderson mixing and Broyden's method; the others are of the second, which iterates plainly and has
wider flow heads. Its width b is that of deq_flow_b, under other names, which are read too. Frames as in `raft`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fleetflow.deq import (
    Anderson,
    Broyden,
    Gradient,
    NotFinite,
    Phantom,
    Picard,
    Solver,
    fixed_point,
    held,
    weight_norm,
)
from fleetflow.layers.attention import Aggregate, Attention
from fleetflow.layers.residual_encoder import ResidualEncoder
from fleetflow.layers.update import (
    GRU,
    LEVELS,
    SEPARABLE,
    Features,
    FlowHead,
    MaskHead,
    MotionEncoder,
    State,
    look,
)
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import reduced
from fleetflow.models.base import FlowModel, RefiningModel
from fleetflow.ops.all_pairs import MEMORY_LIMIT, all_pairs
from fleetflow.ops.warp import pixel_grid
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, size_of

RADIUS = 4


@dataclass(frozen=True)
class Equilibrium:
    """How the fixed point is found, and how it is trained.

    Args:
        solver, iterations: of the search; a step is one evaluation of f.
        tolerance, relative: where it ends, see `fixed_point`; the published 1e-3 is absolute, so on large frames the
            iterations run out first.
        image: the result is f(z) for the best point z that was found, instead of z; both are known, so it costs
            nothing.
        gradient: in training, how the result is differentiated.
        keep: in training, the evaluations below `iterations` after which a flow is trained, too (fixed-point
            correction).
        sliced: in training, the search begins anew at each kept point: at what it had "found" (v1's sliced core), or at
            that point as it is "trained", after the gradient rule's steps (v2's default); "" goes on (v1's default).
        through_flow: whether gradients pass from the flow to the step before it (v2's all_grad), or are cut as in RAFT.
    """

    solver: Solver
    iterations: int = 60
    tolerance: float = 1e-3
    relative: bool = False
    image: bool = False
    gradient: Gradient = Phantom()
    keep: tuple[int, ...] = (6, 12, 18, 24, 30)
    sliced: Literal["", "found", "trained"] = ""
    through_flow: bool = False


# What the published evaluations use: 40 * 1.5 iterations, 36 * 1.5 and the one that measures the first point, 40 * 1.5.
ANDERSON = Equilibrium(Anderson(ridge=1e-4, scaled=False, restart=torch.inf))
BROYDEN = Equilibrium(Broyden(history=60), iterations=55, keep=(7, 14, 21, 28, 35), sliced="found")
PLAIN = Equilibrium(Picard(), image=True, sliced="trained")


class Width(NamedTuple):
    """Channels of the parts."""

    hidden: int  # and of the context
    correlation: tuple[int, int]
    flow: tuple[int, int]
    motion: int
    head: int  # of the flow head
    features: int = 256  # that are correlated


TINY = Width(32, (64, 48), (32, 16), 32, 64, features=64)
BASE = Width(128, (256, 192), (128, 64), 128, 256)
LARGE = Width(192, (384, 288), (192, 96), 192, 384)
HUGE = Width(256, (512, 384), (256, 128), 256, 512)
GIGANTIC = Width(384, (640, 480), (320, 160), 320, 640)


class UpdateBlock(nn.Module):
    """Hidden state, context prepared by the GRU, attention, correlation, flow -> next state and change of the flow.

    Args:
        attention: whether the unit also sees motion features mixed by the attention, as in GMA.
    """

    def __init__(self, width: Width, attention: bool):
        super().__init__()
        correlations = LEVELS * (2 * RADIUS + 1) ** 2
        self.encoder = MotionEncoder(correlations, width.correlation, width.flow, width.motion)
        self.gma = Aggregate(1, width.motion) if attention else None
        self.gru = GRU(width.hidden, width.hidden + width.motion * (2 if attention else 1), SEPARABLE)
        self.flow_head = FlowHead(width.hidden, width.head)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        mix: Callable[[Tensor], Tensor] | None,
        correlation: Tensor,
        flow: Tensor,
    ) -> State:
        motion = self.encoder(correlation, flow)
        seen = motion if self.gma is None else torch.cat((motion, self.gma(motion, mix)), 1)
        hidden = self.gru(hidden, context, seen)
        return hidden, self.flow_head(hidden.to(motion.dtype))


class Result:
    """A gradient rule that applies `rule` to what a search has found, and remembers it.

    found: [N, D], the result of the search, without a graph. change: [N, D], f(z) - z for the best point z.
    """

    def __init__(self, rule: Gradient | None, image: bool):
        self.rule, self.image = rule, image
        self.unrolled = rule is not None and rule.unrolled
        self.found = self.change = torch.empty(0)

    def attach(self, f: Callable[[Tensor], Tensor], point: Tensor, image: Tensor) -> Tensor:
        """Returns the result, with the gradient that the rule gives it."""
        best = image if self.image else point
        self.found, self.change = best.detach(), (image - point).detach()
        return self.found if self.rule is None else self.rule.attach(f, best, image)


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a checkpoint of either published version with the names used here."""
    renamed = (
        ("update_block.mask.", "mask."),  # where the first version keeps it
        (".weight_g", ".parametrizations.weight.original0"),
        (".weight_v", ".parametrizations.weight.original1"),
    )
    own = {}
    for key, value in state.items():
        for theirs, ours in renamed:
            key = key.replace(theirs, ours)
        own[key] = value
    return own


class DEQFlow(RefiningModel):
    """width: of all parts. attention: the update is GMA's instead of RAFT's.

    Args:
        equilibrium: how the fixed point is found and trained.
        memory_limit: bytes that the stored correlations, and the stored attention, may take.
    """

    fit = "pad"
    paper = "Bai et al., CVPR 2022, arXiv 2204.08442"
    license = "AGPL-3.0"
    translate: ClassVar = staticmethod(own_names)

    def __init__(
        self,
        width: Width,
        equilibrium: Equilibrium,
        *,
        attention: bool = False,
        memory_limit: int = MEMORY_LIMIT,
    ):
        super().__init__()
        self.equilibrium = equilibrium
        self.iterations = equilibrium.iterations
        self.memory_limit = memory_limit
        self.fnet = ResidualEncoder(width.features, "instance")
        self.cnet = ResidualEncoder(width.hidden, "batch")
        self.update_block = weight_norm(UpdateBlock(width, attention))
        self.mask = MaskHead(width.hidden)
        self.attn = (
            Attention(1, content=True, position=False, channels=width.hidden, embedded=False) if attention else None
        )

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * frame1 - 1, 2 * frame2 - 1

    def encode(
        self, frame1: Tensor, frame2: Tensor, features: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Features, State]:
        """Returns the features, and zero: where a search begins that knows nothing."""
        features = features or (self.fnet(frame1), self.fnet(frame2))
        pyramid = all_pairs(*features, LEVELS, self.memory_limit)
        context = self.cnet(frame1).relu()
        attended = None if self.attn is None else self.attn(context, self.memory_limit)
        # The state is that of an equation: it stays in float32 (or wider) whatever the precision of the layers.
        hidden = torch.zeros_like(context, dtype=torch.promote_types(context.dtype, torch.float32))
        flow = hidden.new_zeros(hidden.shape[0], 2, *hidden.shape[-2:])
        context = self.update_block.gru.prepare(context)
        return Features(pyramid, context, pixel_grid(*size_of(flow), flow), attended), (hidden, flow)

    def step(self, features: Features, state: State) -> State:
        """Returns f(z) for the state z; its fixed point is the result."""
        hidden, flow = state
        if not self.equilibrium.through_flow:
            flow = flow.detach()
        mix = None if self.attn is None else partial(self.attn.mix, features.attended, self.memory_limit)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden, change = self.update_block(hidden, features.context, mix, *look(features, flow, RADIUS))
        return hidden, flow + change.to(flow.dtype)

    def decode(self, state: State) -> Tensor:
        hidden, flow = state
        first: Any = self.mask[0]  # a convolution, or what stands for it in prediction
        return convex_upsample(flow, self.mask(hidden.to(first.weight.dtype)))

    def equation(self, frame1: Tensor, frame2: Tensor) -> tuple[Callable[[State], State], State]:
        """Returns f, whose fixed point is to be found, and the cold start, which is zero, for prepared frames."""
        features, rest = self.encode(frame1, frame2)
        return partial(self.step, features), rest

    def solve(self, f: Callable[[State], State], z: State, iterations: int) -> tuple[list[State], Tensor]:
        """Returns the states to be decoded, the fixed point last, and f(z) - z [N, C, h, w] there.

        The search sees the hidden state as [N, h, w, C], as the layers leave it in memory: in its vectors the numbers lie
        in their order, so that nothing is transposed on the way there and back.
        """
        choice = self.equilibrium
        result = Result(choice.gradient if self.training else None, choice.image)
        keep = tuple(k for k in choice.keep if k < iterations) if self.training else ()
        z, states = _channels_last(z), []
        slices = zip((0, *keep), (*keep, iterations)) if choice.sliced else [(0, iterations)]
        for first, last in slices:
            solution = fixed_point(
                lambda z: _channels_last(f(_channels_first(z))),
                z,
                choice.solver,
                result,
                tolerance=choice.tolerance,
                max_steps=last - first,
                relative=choice.relative,
                keep=() if choice.sliced else keep,
            )
            states += [_channels_first(state) for state in (*solution.kept, solution.value)]
            z = solution.value if choice.sliced == "trained" else _parts(result.found, z)
            z = z[0].detach(), z[1].detach()
        return states, torch.cat(_channels_first(_parts(result.change, z)), 1)

    def search(
        self, step: Callable[[State], State], rest: State, previous: Prediction | None, iterations: int
    ) -> tuple[list[State], dict[str, Any]]:
        """Returns the states: in training those at the kept points and the last one.

        The next pair may begin with the fixed point (hidden, flow). The residual is the length of f(z) - z at each
        pixel, over the channels of hidden state and flow.
        """
        with held(self.update_block):
            try:
                states, change = self.solve(step, _started(previous, rest), iterations)
            except NotFinite as error:
                raise FleetflowError(
                    "the first step of the network is not finite; expected finite frames and weights: look at both"
                ) from error
        return states, {"state": tuple(part.detach() for part in states[-1]), "residual": change.norm(dim=1)}


def _channels_last(state: State) -> State:
    return state[0].permute(0, 2, 3, 1), state[1]


def _channels_first(state: State) -> State:
    return state[0].permute(0, 3, 1, 2), state[1]


def _parts(vector: Tensor, like: State) -> State:
    """The parts of a state of which the search made a vector [N, D]."""
    hidden, flow = vector.tensor_split((like[0][0].numel(),), 1)
    return hidden.reshape(like[0].shape), flow.reshape(like[1].shape)


def _started(previous: Prediction | None, cold: State) -> State:
    """Returns the cold start, also with a given flow, or the last pair's fixed point.

    Raises:
        FleetflowError: Where that is another network's.
    """
    if previous is None:
        return cold
    if previous.state is None:
        return cold[0], reduced(previous.flow, size_of(cold[1])).to(cold[1])
    memory, shapes = previous.state, [list(part.shape) for part in cold]
    fits = isinstance(memory, tuple | list) and all(isinstance(part, Tensor) for part in memory)
    if not fits or [list(part.shape) for part in memory] != shapes:
        was = [list(part.shape) for part in memory] if fits else type(memory).__name__
        raise FleetflowError(
            f"the previous prediction's memory is {was}; expected {shapes}: pass that of the same network and size"
        )
    return memory[0].to(cold[0]), memory[1].to(cold[1])


@models.register
def deq_flow_tiny(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow v2, tiny (2,490,976 parameters); reads the checkpoints of locuslab/deq-flow v2 (--tiny)."""
    return DEQFlow(TINY, equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_tiny_gma(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow v2, tiny, GMA's update; reads the checkpoints of locuslab/deq-flow v2 (--tiny --gma)."""
    return DEQFlow(TINY, equilibrium, attention=True, memory_limit=memory_limit)


@models.register
def deq_flow_b(*, equilibrium: Equilibrium = ANDERSON, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-B (CVPR 2022, 5,242,816 parameters); reads the checkpoints of locuslab/deq-flow v1 B and v2."""
    return DEQFlow(BASE, equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_b_gma(*, equilibrium: Equilibrium = ANDERSON, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-B, GMA's update (5,783,617 parameters); reads the checkpoints of locuslab/deq-flow v1, v2 (--gma)."""
    return DEQFlow(BASE, equilibrium, attention=True, memory_limit=memory_limit)


@models.register
def deq_flow_h(*, equilibrium: Equilibrium = BROYDEN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-H (CVPR 2022, 12,799,808 parameters); reads the checkpoints of locuslab/deq-flow v1 H."""
    return DEQFlow(HUGE._replace(head=256), equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_h_gma(*, equilibrium: Equilibrium = BROYDEN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-H, GMA's update (14,962,753 weights); reads the checkpoints of locuslab/deq-flow v1 (--huge --gma)."""
    return DEQFlow(HUGE._replace(head=256), equilibrium, attention=True, memory_limit=memory_limit)


@models.register
def deq_flow_l2(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-L of v2 (8,673,664 parameters); reads the checkpoints of locuslab/deq-flow v2 (--large)."""
    return DEQFlow(LARGE, equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_l2_gma(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-L of v2, GMA's update; reads the checkpoints of locuslab/deq-flow v2 (--large --gma)."""
    return DEQFlow(LARGE, equilibrium, attention=True, memory_limit=memory_limit)


@models.register
def deq_flow_h2(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-H of v2 (13,394,752 parameters); reads the checkpoints of locuslab/deq-flow v2 H."""
    return DEQFlow(HUGE, equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_h2_gma(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-H of v2, GMA's update (15,557,697 parameters); reads the checkpoints of locuslab/deq-flow v2 (--gma)."""
    return DEQFlow(HUGE, equilibrium, attention=True, memory_limit=memory_limit)


@models.register
def deq_flow_g2(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-G of v2 (23,248,960 parameters); reads the checkpoints of locuslab/deq-flow v2 (--gigantic)."""
    return DEQFlow(GIGANTIC, equilibrium, memory_limit=memory_limit)


@models.register
def deq_flow_g2_gma(*, equilibrium: Equilibrium = PLAIN, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """DEQ-Flow-G of v2, GMA's update; reads the checkpoints of locuslab/deq-flow v2 (--gigantic --gma)."""
    return DEQFlow(GIGANTIC, equilibrium, attention=True, memory_limit=memory_limit)
