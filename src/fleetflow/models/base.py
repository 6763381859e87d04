"""FlowModel, the contract every network keeps: checks and fits the frames, then asks the network for its estimate."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.ops.constant import constant
from fleetflow.types import FleetflowError, Prediction

FITS = ("pad", "pad_bottom", "scale")


class FlowModel(nn.Module, ABC):
    """An optical-flow network. Subclasses are final; they write `prepare`, `estimate` and their parts, nothing else.

    stride: frames reach `estimate` with height and width divisible by it.
    fit: how they get there, as the published system does it: "pad" (edge pixels repeated on all sides, cut off again),
        "pad_bottom" (as "pad", but nothing above the frame) or "scale" (bilinear resize and back). A network that pads
        may be told which way: RAFT and its descendants take `model.fit = "pad_bottom"` for KITTI.
    iterations: the published number of refinement iterations, None for a network without refinement.
    translate: published checkpoint -> names of this network, where they differ; "module." is gone before it is called.
    grid, paper, license: for the catalog: stride of the flow that the network computes, before it is enlarged; whose
        paper it is, where it appeared; license of the published code and checkpoints.
    """

    stride: ClassVar[int]
    fit: Literal["pad", "pad_bottom", "scale"]
    iterations: int | None = None
    translate: ClassVar[Callable[[dict[str, Tensor]], dict[str, Tensor]] | None] = None
    grid: ClassVar[int | None] = None
    paper: ClassVar[str] = ""
    license: ClassVar[str] = ""

    @abstractmethod
    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both frames in the network's own color order, mean and range (before they are fitted)."""

    @abstractmethod
    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        """Returns the prediction for prepared frames whose size is a multiple of `stride`.

        With fit = "scale" its flow may be on a coarser grid (in pixels of these frames); it is resized in one go.
        """

    def iterations_of(self, iterations: int | None) -> int | None:
        """Returns the number of refinement iterations where `iterations` is asked for; None takes the network's own.

        Raises FleetflowError for a network without refinement, and for less than one.
        """
        if iterations is not None and self.iterations is None:
            raise FleetflowError(f"{type(self).__name__} has no refinement iterations; leave iterations out")
        iterations = self.iterations if iterations is None else iterations
        if iterations is not None and iterations < 1:
            raise FleetflowError(f"iterations is {iterations}; it must be at least 1")
        return iterations

    def forward(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None = None, iterations: int | None = None
    ) -> Prediction:
        """Returns the flow from frame1 to frame2.

        frame1, frame2: [N, 3, H, W] float in [0, 1], RGB, any H and W >= 1. In training, networks that pad want
            multiples of `stride`, and those that scale return no intermediate flows for other sizes: only the flow can be judged.
        previous: for networks that refine, where to begin: their own prediction for the pair before this one; or a
            prediction without a state, such as FastFlowNet's for this very pair, whose flow [N, 2, H, W] they refine.
        iterations: number of refinement iterations, for networks that refine; None takes the network's own.
        Raises FleetflowError for frames of other shapes, types or ranges.
        """
        _check(frame1, frame2)
        if (
            previous is not None
            and previous.state is None
            and previous.flow.shape != (len(frame1), 2, *frame1.shape[2:])
        ):
            raise FleetflowError(
                f"the flow to begin with is {list(previous.flow.shape)}; expected "
                f"{[len(frame1), 2, *frame1.shape[2:]]}: resize it"
            )
        iterations = self.iterations_of(iterations)
        if self.fit not in FITS:
            raise FleetflowError(f'fit is "{self.fit}"; expected {", ".join(FITS[:-1])} or {FITS[-1]}')
        height, width = frame1.shape[-2:]
        new_height, new_width = (-(-size // self.stride) * self.stride for size in (height, width))
        exact = (height, width) == (new_height, new_width)
        if self.training and not exact and self.fit != "scale":
            raise FleetflowError(
                f"frames are {height}x{width}; {type(self).__name__} trains on multiples of {self.stride}: "
                f"crop to {max(height // self.stride, 1) * self.stride}x{max(width // self.stride, 1) * self.stride}"
            )
        frame1, frame2 = self.prepare(frame1, frame2)
        if self.fit == "scale":
            if not exact:
                frame1, frame2 = (resize(frame, (new_height, new_width)) for frame in (frame1, frame2))
            prediction = self.estimate(frame1, frame2, previous, iterations)
            if exact and prediction.flow.shape[-2:] == (height, width):
                return prediction
            flow = resize(prediction.flow.float(), (height, width))
            factors = constant((width / new_width, height / new_height), flow)
            return prediction._replace(
                flow=flow * factors[:, None, None],
                intermediate_flows=prediction.intermediate_flows if exact else (),  # else they are of the scaled frames
                **_maps(prediction, lambda plane: resize(plane[:, None], (height, width))[:, 0]),
            )
        if exact:
            return self.estimate(frame1, frame2, previous, iterations)
        left = (new_width - width) // 2
        top = 0 if self.fit == "pad_bottom" else (new_height - height) // 2
        sides = (left, new_width - width - left, top, new_height - height - top)
        if previous is not None and previous.state is None:
            previous = previous._replace(flow=F.pad(previous.flow, sides, mode="replicate"))
        prediction = self.estimate(
            F.pad(frame1, sides, mode="replicate"), F.pad(frame2, sides, mode="replicate"), previous, iterations
        )
        window = (..., slice(top, top + height), slice(left, left + width))
        return prediction._replace(flow=prediction.flow[window], **_maps(prediction, lambda plane: plane[window]))


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the picture [N, C, h, w], bilinearly resized to `size` (height, width), pixel edges aligned."""
    if picture.shape[1] <= 2:
        picture = picture.contiguous()  # a flow as two planes: three times faster than as pairs
    return F.interpolate(picture, size=size, mode="bilinear", align_corners=False)


def _maps(prediction: Prediction, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The maps [N, h, w] that the prediction has besides its flow, changed alike."""
    maps = {name: getattr(prediction, name) for name in ("residual", "uncertainty", "occlusion")}
    return {name: change(plane) for name, plane in maps.items() if plane is not None}


def _check(frame1: Tensor, frame2: Tensor) -> None:
    """Raises FleetflowError unless both frames are [N, 3, H, W] float in [0, 1] and of one size."""
    for name, frame in (("frame1", frame1), ("frame2", frame2)):
        if frame.ndim != 4 or frame.shape[1] != 3 or min(frame.shape) < 1:
            raise FleetflowError(f"{name} is {list(frame.shape)}; expected [N, 3, H, W]: add a batch axis or convert")
        if not frame.is_floating_point():
            raise FleetflowError(f"{name} is {frame.dtype}; expected float in [0, 1]: divide uint8 frames by 255")
    if frame1.shape != frame2.shape:
        raise FleetflowError(
            f"frames are {list(frame1.shape)} and {list(frame2.shape)}; both must have the same size: resize one"
        )
    if frame1.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # reading a value would stop the GPU or the trace
    high = max(frame1.amax().item(), frame2.amax().item())
    if high > 1.5:  # a bright frame is 1.0; resampling may overshoot a little; 255 is the mistake to catch
        raise FleetflowError(f"frames reach {high:.4g}; expected values in [0, 1]: divide uint8 frames by 255")
