"""A network that refines as three graphs: encode, step, decode. The loop stays outside, in `Session` or in your program.

encode(image1, image2) -> features..., hidden, coarse;  step(features..., hidden, coarse) -> hidden, coarse;
decode(hidden, coarse) -> flow. The state is hidden [1, C, h, w] and coarse [1, 2, h, w], the flow in pixels of the grid
of stride 8. A state of the pair before may take the place of the one that encode returns.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_unflatten

from fleetflow.export.forms import for_runtimes
from fleetflow.export.graph import Sizes, frames_of, trace
from fleetflow.models.base import FlowModel
from fleetflow.ops.kernels import reference
from fleetflow.types import FleetflowError, size_of


class Part(NamedTuple):
    """One of the three graphs.

    Attributes:
        program: of `graph.trace`.
        inputs: their names.
        outputs: their names.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Encode(nn.Module):
    """(image1, image2) -> the tensors among the features, those of `kept` (None: all), then the state."""

    def __init__(self, model: FlowModel):
        super().__init__()
        self.model: Any = model
        self.kept: list[int] | None = None
        self.structure: Any = None  # of the features, known after the first call

    def forward(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, ...]:
        frames = self.model.prepare(*frames_of(image1, image2))
        sides = padding(self.model, size_of(image1[..., 0]))
        frames = [F.pad(frame, sides, mode="replicate") for frame in frames]
        features, state = self.model.encode(*frames)
        leaves, self.structure = tree_flatten(features)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kept = range(len(tensors)) if self.kept is None else self.kept
        return *(tensors[k].clone() for k in kept), *(part.float() for part in state)


class Step(nn.Module):
    """(features..., hidden, coarse) -> (hidden, coarse); `absent` stands for the features that no step reads."""

    def __init__(self, encode: Encode, shapes: list[torch.Size]):
        super().__init__()
        self.model: Any = encode.model
        self.encode, self.shapes = [encode], shapes

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, hidden, coarse = given
        encode, leaves = self.encode[0], list(self.encode[0].others)
        kept = range(len(encode.places)) if encode.kept is None else encode.kept
        for k, place in enumerate(encode.places):
            leaves[place] = tensors[list(kept).index(k)] if k in kept else hidden.new_zeros(()).expand(self.shapes[k])
        features = tree_unflatten(leaves, encode.structure)
        hidden, coarse = self.model.step(features, (hidden, coarse))
        return hidden.float(), coarse.float()


class Decode(nn.Module):
    """(hidden, coarse) -> flow [N, H, W, 2] for pictures of one size."""

    def __init__(self, model: FlowModel, size: tuple[int, int]):
        super().__init__()
        self.model: Any = model
        self.size = size

    def forward(self, hidden: Tensor, coarse: Tensor) -> Tensor:
        left, _, top, _ = padding(self.model, self.size)
        flow = self.model.decode((hidden, coarse))
        height, width = self.size
        return flow[..., top : top + height, left : left + width].permute(0, 2, 3, 1).float()


def padding(model: FlowModel, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the pixels that the network's padding adds left, right, above and below."""
    height, width = (-side % model.stride for side in size)
    left, top = width // 2, 0 if model.fit == "pad_bottom" else height // 2
    return left, width - left, top, height - top


def in_parts(model: FlowModel, sizes: Sizes) -> dict[str, Part]:
    """Returns the three graphs of a network that `graph.plain` has prepared.

    Raises:
        FleetflowError: for a network that does not refine, and for sizes that are open or under 128 pixels.
    """
    if model.iterations is None or not all(hasattr(model, part) for part in ("encode", "step", "decode")):
        raise FleetflowError(f"{type(model).__name__} is not made of encode, step and decode; leave --parts out")
    if model.fit == "scale":
        raise FleetflowError(f"{type(model).__name__} is exported as one graph; leave --parts out")
    size = sizes.size
    if size is None or min(size) < 128:
        raise FleetflowError("--parts takes pictures of one size from 128 pixels on; give it with --size HEIGHT WIDTH")
    sizes = sizes._replace(batch=1)
    image = torch.randint(0, 256, (*sizes.example(), 3), dtype=torch.uint8)
    encode = Encode(model).eval()
    with torch.no_grad(), reference(), for_runtimes():
        values = encode(image, image.flip(1))
    step = Step(encode, [value.shape for value in values[:-2]])
    first = trace(step, values, None)
    used = [node for node in first.graph.nodes if node.op == "placeholder"][-len(values) :]
    kept = encode.kept = [k for k, node in enumerate(used[:-2]) if node.users]
    values = (*(values[k] for k in kept), *values[-2:])
    names = tuple(f"features{k}" for k in range(len(kept)))
    state = ("hidden", "coarse")
    return {
        "encode": Part(trace(encode, (image, image.flip(1)), None), ("image1", "image2"), (*names, *state)),
        "step": Part(trace(step, values, None), (*names, *state), ("new_hidden", "new_coarse")),
        "decode": Part(trace(Decode(model, size), values[-2:], None), state, ("flow",)),
    }
