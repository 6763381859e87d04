"""The graph that is exported: uint8 RGB pictures in, flow in pixels out, and all that lies between inside of it."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbols
from torch.nn.utils.parametrize import is_parametrized

from fleetflow.deq import remove_norm
from fleetflow.export.forms import for_runtimes
from fleetflow.models.base import FlowModel
from fleetflow.ops.kernels import reference
from fleetflow.types import FleetflowError, Size

LARGEST_SIDE, LARGEST_BATCH = 8192, 64  # that a graph with open sizes is promised for
UNLIMITED = 2**62  # bytes that stored correlations may take: a graph never computes them at the lookup


class Sizes(NamedTuple):
    """Which pictures a graph takes.

    Attributes:
        height: of all pictures, in pixels; None for any from `least` to LARGEST_SIDE.
        width: likewise.
        batch: how many pairs at once; None for any number from 1 to LARGEST_BATCH.
        least: the smallest height and width where they are open.
    """

    height: int | None = None
    width: int | None = None
    batch: int | None = None
    least: int = 128

    @property
    def size(self) -> Size | None:
        """Height and width of all pictures; None where they are open."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def fixed(self) -> bool:
        """Whether all pictures have one size."""
        return self.size is not None

    def example(self) -> tuple[int, int, int]:
        """Returns pairs, height and width of what the graph is traced with; open ones are multiples of no stride."""
        height, width = self.size or (self.least + 22, self.least + 83)
        return self.batch or 2, height, width


class Graph(nn.Module):
    """A network with its preprocessing: (image1, image2) -> flow.

    The pictures are uint8 [N, H, W, 3] in RGB, as they lie in memory; the flow is float32 [N, H, W, 2], pixels to the
    right and downwards, as a .flo file holds it.
    """

    def __init__(self, model: FlowModel, iterations: int | None):
        super().__init__()
        self.model, self.iterations = model, model.iterations_of(iterations)

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        frames = [image.permute(0, 3, 1, 2).float() / 255 for image in (image1, image2)]
        return self.model(*frames, iterations=self.iterations).flow.float().permute(0, 2, 3, 1)


def plain(model: FlowModel) -> FlowModel:
    """Returns a copy of the network as a graph can hold it.

    Correlations and attention are always stored, norms of weights are computed once. Refinement makes a fixed number of
    plain steps: a solver that looks at residuals (DEQ-Flow's) becomes plain iteration.
    """
    plain: Any = copy.deepcopy(model).eval().requires_grad_(False)
    for module in plain.modules():
        if is_parametrized(module):  # a copy has the class of the model, which removing a norm changes
            kind = type(module)
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
    remove_norm(plain)
    if hasattr(plain, "memory_limit"):
        plain.memory_limit = UNLIMITED
    if hasattr(plain, "equilibrium"):
        plain.search = _plain_search  # stands before the method of the class
    return plain


def _plain_search(step, rest, previous, iterations: int) -> tuple[list, dict]:
    """As `RefiningModel.search`: the state after so many steps."""
    for _ in range(iterations):
        rest = step(rest)
    return [rest], {}


def trace(module: nn.Module, inputs: tuple[Tensor, ...], open_axes: tuple[dict[int, Dim], ...] | None):
    """Returns the exported program of a module, its operators in the forms that runtimes compute fast.

    Args:
        module: takes the inputs.
        inputs: that it is traced with.
        open_axes: for each input, axis -> its name and range; None fixes all shapes.

    Raises:
        FleetflowError: where an axis cannot be open.
    """
    with torch.no_grad(), reference(), for_runtimes(), symbols.patch(backed_size_oblivious=True):  # pyright: ignore
        try:
            return torch.export.export(
                module.eval(),
                inputs,
                dynamic_shapes=open_axes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except UserError as error:  # of a network that computes with its sizes in Python
            reason = next((line for line in str(error).splitlines() if line.startswith("  - ")), str(error))
            raise FleetflowError(
                f"the network cannot be traced with open sizes ({' '.join(reason.split())[:200]}); give --size HEIGHT WIDTH"
            ) from error


def traced(model: FlowModel, sizes: Sizes, iterations: int | None) -> ExportedProgram:
    """Returns the graph of a network that `plain` has prepared.

    Raises:
        FleetflowError: where the network cannot take pictures of such sizes.
    """
    if sizes.size and min(sizes.size) < 1:
        raise FleetflowError(f"the size is {sizes.height} {sizes.width}; expected a height and a width in pixels")
    axes = {}
    if sizes.batch is None:
        axes[0] = Dim("batch", min=1, max=LARGEST_BATCH)
    if not sizes.fixed:
        axes[1] = Dim("height", min=sizes.least, max=LARGEST_SIDE)
        axes[2] = Dim("width", min=sizes.least, max=LARGEST_SIDE)
    picture = torch.randint(0, 256, (*sizes.example(), 3), dtype=torch.uint8)
    return trace(Graph(model, iterations), (picture, picture.flip(0, 1)), (axes, axes) if axes else None)
