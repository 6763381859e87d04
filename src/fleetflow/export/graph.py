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
from fleetflow.export.channels import order_by_weights
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

    def __init__(self, model: FlowModel, iterations: int | None, as_bytes: bool):
        super().__init__()
        self.model, self.iterations, self.as_bytes = model, model.iterations_of(iterations), as_bytes

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        flow = self.model(*frames_of(image1, image2), iterations=self.iterations).flow.float().permute(0, 2, 3, 1)
        pictures = (image1, image2) if self.as_bytes else (image1.float(), image2.float())
        still = shows_no_motion(*pictures)[:, None, None, None]
        return flow.flatten(2)[:, None].masked_fill(still, 0).reshape(flow.shape)


def frames_of(*images: Tensor) -> list[Tensor]:
    """Returns pictures, uint8 [N, H, W, 3], as the frames that networks take, [N, 3, H, W] in [0, 1]."""
    return [(image.float() / 255).permute(0, 3, 1, 2) for image in images]


def shows_no_motion(image1: Tensor, image2: Tensor) -> Tensor:
    """Returns [N] bool, as `models.base` asks of frames: whether pictures [N, H, W, 3] are the same, or one has one color.

    Bytes are a quarter of the memory, and largest and smallest values of columns need no other layout.
    """
    count, height, width, channels = image1.shape
    one, two = (image.reshape(count, 1, height, width * channels) for image in (image1, image2))
    still = _everywhere(_everywhere(one == two, (1, 2), one.dtype), 1, one.dtype)
    for rows in (one, two):
        high, low = (ends.reshape(count, width, channels) for ends in (rows.amax((1, 2)), rows.amin((1, 2))))
        still = still | _everywhere(high.amax(1) == low.amin(1), 1, one.dtype)
    return still


def _everywhere(found: Tensor, axes: int | tuple[int, int], dtype: torch.dtype) -> Tensor:
    """As `found.all(axes)`, which becomes sums or products of whole numbers: a smallest value is faster."""
    return found.to(dtype).amin(axes) > 0


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


def trace(
    module: nn.Module, inputs: tuple[Tensor, ...], open_axes: tuple[dict[int, Dim], ...] | None, products: bool = False
) -> ExportedProgram:
    """Returns the exported program of a module, its operators in the forms that runtimes compute fast.

    Args:
        module: takes the inputs.
        inputs: that it is traced with.
        open_axes: for each input, axis -> its name and range; None fixes all shapes.
        products: of matrices are cheap in the runtime: channels are moved by them.

    Raises:
        FleetflowError: where an axis cannot be open.
    """
    with torch.no_grad(), reference(), for_runtimes(), symbols.patch(backed_size_oblivious=True):  # pyright: ignore
        try:
            program = torch.export.export(
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
    order_by_weights(program, products=products)
    return program


def traced(
    model: FlowModel, sizes: Sizes, iterations: int | None, *, products: bool = False, as_bytes: bool = False
) -> ExportedProgram:
    """Returns the graph of a network that `plain` has prepared.

    Args:
        model: the network.
        sizes: of the pictures.
        iterations: of refinement.
        products: as for `trace`.
        as_bytes: the runtime compares bytes, as OpenVINO does; others want floats made of them first, TensorRT for one.

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
    return trace(
        Graph(model, iterations, as_bytes), (picture, picture.flip(0, 1)), (axes, axes) if axes else None, products
    )
