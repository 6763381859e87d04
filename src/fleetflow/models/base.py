"""FlowModel, the contract every network keeps: checks and fits the frames, then asks the network for its estimate."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fleetflow.layers.small_frames import enlarged, reduced_flow
from fleetflow.ops.constant import constant
from fleetflow.ops.kernels import is_captured
from fleetflow.ops.resize import resize
from fleetflow.types import FleetflowError, Prediction, Size, size_of

FITS = ("pad", "pad_bottom", "scale")
LOWEST, HIGHEST = -0.5, 1.5  # of a pixel: black is 0, white is 1, and resampling may overshoot
_NOTE = "_fleetflow_in_range"  # attribute of a frame: its address, and how often it had been written into
SPARSE = 32  # pixels: one of so many rows and columns is looked at first, to see whether a pair may show no motion


class Clip(NamedTuple):
    """How a pair stands in a clip.

    Attributes:
        features: what the pair before has said of the frame that is now frame1 (`Prediction.features`), so that it is
            not looked at twice; None: nothing. It must come from the same network, and frames of the same size.
        both_ways: also predict the flow back (`Prediction.backward`), in the same batch. Such a prediction has no state.
    """

    features: Any = None
    both_ways: bool = False


class FlowModel(nn.Module, ABC):
    """An optical-flow network. Subclasses are final; they write `prepare`, `estimate` and their parts, nothing else.

    Attributes:
        stride: frames reach `estimate` with height and width divisible by it.
        fit: how they get there, as the published system does it: "pad" (edge pixels repeated on all sides, cut off
            again), "pad_bottom" (as "pad", but nothing above the frame) or "scale" (bilinear resize and back). A
            network that pads may be told which way: RAFT and its descendants take `model.fit = "pad_bottom"` for KITTI.
        iterations: the published number of refinement iterations, None for a network without refinement.
        translate: published checkpoint -> names of this network, where they differ; "module." is gone before that.
        keeps_features: False where `prepare` looks at both frames, as for their common mean: what a network sees in a
            frame holds for the pair then, and not for the next one.
        grid, paper, license: for the catalog: stride of the flow that the network computes, before it is enlarged;
            whose paper it is, where it appeared; license of the published code and checkpoints.
    """

    stride: ClassVar[int]
    fit: Literal["pad", "pad_bottom", "scale"]
    iterations: int | None = None
    translate: ClassVar[Callable[[dict[str, Tensor]], dict[str, Tensor]] | None] = None
    keeps_features: ClassVar[bool] = True
    grid: int | None = None
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

    def frame_features(self, frame: Tensor) -> Any:
        """Returns what the network sees in one prepared frame, without the other one: tensors [N, ...], in any form.

        None: it looks at both frames at once. A network that has features takes those of both frames as a fifth
        argument of `estimate`, None where they are not known.
        """
        return None

    @property
    def shares_features(self) -> bool:
        """True where what the network sees in a frame serves both pairs of a clip that the frame is in."""
        return self.keeps_features and type(self).frame_features is not FlowModel.frame_features

    def seen(self, frame1: Tensor, frame2: Tensor, features: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """Returns the features of both prepared frames: those given, or new ones, computed as one batch."""
        if features is not None:
            return features
        parts, form = tree_flatten(self.frame_features(torch.cat((frame1, frame2))))
        first, second = zip(*(part.tensor_split(2) for part in parts))
        return tree_unflatten(first, form), tree_unflatten(second, form)

    def iterations_of(self, iterations: int | None) -> int | None:
        """Returns the number of refinement iterations where `iterations` is asked for; None takes the network's own.

        Raises:
            FleetflowError: for a network without refinement, and for less than one iteration.
        """
        if iterations is not None and self.iterations is None:
            raise FleetflowError(f"{type(self).__name__} has no refinement iterations; leave iterations out")
        iterations = self.iterations if iterations is None else iterations
        if iterations is not None and (not isinstance(iterations, Integral) or iterations < 1):
            raise FleetflowError(f"iterations is {iterations!r}; it must be a whole number, at least 1")
        return iterations

    def forward(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None = None,
        iterations: int | None = None,
        clip: Clip | None = None,
    ) -> Prediction:
        """Returns the flow from frame1 to frame2.

        In evaluation the flow is zero where nothing can have been seen to move: in a pair of identical frames, and in
        one of which a frame has a single color.

        Args:
            frame1, frame2: [N, 3, H, W] float in [0, 1], RGB, any H and W >= 1. In training, networks that pad want
                multiples of `stride`, and those that scale return no intermediate flows for other sizes: only the flow
                can be judged.
            previous: for networks that refine, where to begin: their own prediction for the pair before this one; or a
                prediction without a state, such as FastFlowNet's for this very pair, whose flow [N, 2, H, W] they
                refine.
            iterations: number of refinement iterations, for networks that refine; None takes the network's own.
            clip: for pairs of a clip: the prediction then has the features of frame2 for the pair behind it.

        Raises:
            FleetflowError: for frames of other shapes or types; on the CPU also for values that are not finite or far
                from [0, 1]. On a GPU and in exported models values are not looked at, as that would stop it.
        """
        _check(frame1, frame2)
        _check_start(previous, frame1)
        both_ways = clip is not None and clip.both_ways
        if both_ways and previous is not None:
            previous = _as_batch(previous)
        iterations = self.iterations_of(iterations)
        if self.fit not in FITS:
            raise FleetflowError(f'fit is "{self.fit}"; expected {", ".join(FITS[:-1])} or {FITS[-1]}')
        size = size_of(frame1)
        fitted = rounded_up(size, self.stride)
        # A size that is a symbol (torch.export) is fitted always, which changes nothing where it is exact.
        exact = not any(isinstance(side, torch.SymInt) for side in size) and size == fitted
        if self.training and not exact and self.fit != "scale":
            crop = "x".join(str(max(side // self.stride, 1) * self.stride) for side in size)
            raise FleetflowError(
                f"frames are {size[0]}x{size[1]}; {type(self).__name__} trains on multiples of {self.stride}: "
                f"crop to {crop}"
            )
        one, two = self.prepare(frame1, frame2)
        estimate = self.estimate if clip is None else partial(self._in_clip, clip)
        if self.fit == "scale":
            if not exact:
                one, two = _scaled(one, fitted), _scaled(two, fitted)
            prediction = _scaled_back(estimate(one, two, previous, iterations), size, fitted, exact)
        elif exact:
            prediction = estimate(one, two, previous, iterations)
        else:
            sides = _sides(size, fitted, self.fit)
            one, two = (F.pad(frame, sides, mode="replicate") for frame in (one, two))
            prediction = _cut_back(estimate(one, two, _padded(previous, sides), iterations), size, sides)
        if both_ways:
            prediction = _as_ways(prediction)
        return prediction if self.training else _still(frame1, frame2, prediction)

    def _in_clip(
        self, clip: Clip, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        """`estimate`, with features that are computed once for each frame, and for both directions if asked for."""
        second, known = None, ()
        if self.keeps_features or clip.both_ways:
            second = self.frame_features(frame2)
        if second is not None:
            kept = clip.features if self.keeps_features else None
            known = (self.frame_features(frame1) if kept is None else kept, second)
        if clip.both_ways:
            frame1, frame2 = torch.cat((frame1, frame2)), torch.cat((frame2, frame1))
            known = tuple(tree_map(lambda *parts: torch.cat(parts), *order) for order in (known, known[::-1]) if known)
        found = self.estimate(frame1, frame2, previous, iterations, *((known,) if known else ()))
        return found._replace(features=second if self.keeps_features else None)


class RefiningModel(FlowModel):
    """A network that improves its flow step by step, in three pure parts; the loop over `step` is not theirs.

    A state is a pair (hidden [N, C, h, w], flow [N, 2, h, w] in pixels of its grid of stride 8). Features are all that
    the frames tell, a tuple of tensors that stay what they are in all steps. Subclasses are final.
    """

    stride = 8
    grid = 8
    fnet: nn.Module

    def frame_features(self, frame: Tensor) -> Tensor:
        """Returns the features [N, C, h, w] that are correlated, for prepared frames of any size."""
        return self.fnet(enlarged(frame))

    @abstractmethod
    def encode(
        self, frame1: Tensor, frame2: Tensor, features: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Returns all that `step` needs to know, and the state at rest, for prepared frames of at least 128 pixels a
        side, whose `features` may be known."""

    @abstractmethod
    def step(self, features: Any, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the next state."""

    @abstractmethod
    def decode(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the flow of a state, [N, 2, H, W] pixels of the frames that `encode` saw."""

    @abstractmethod
    def search(
        self,
        step: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
        rest: tuple[Tensor, Tensor],
        previous: Prediction | None,
        iterations: int,
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]:
        """Returns the states to be decoded, the result last, and other fields of the prediction, on the coarse grid.

        `step` and `rest` are those of `encode`; `previous` says where to begin instead.
        """

    def estimate(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None,
        iterations: int | None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction:
        """Returns the prediction; in training its intermediate flows are those of all states that `search` returns."""
        assert iterations is not None  # `forward` has put in the network's own
        size = size_of(frame1)
        known, rest = self.encode(enlarged(frame1), enlarged(frame2), features)
        states, others = self.search(partial(self.step, known), rest, previous, iterations)
        flows = [reduced_flow(self.decode(state), size) for state in states]
        if "residual" in others:
            others["residual"] = resize(others["residual"][:, None], size)[:, 0]
        return Prediction(flows[-1], tuple(flows) if self.training else (), **others)


def rounded_up(size: Size, stride: int) -> Size:
    """Returns the size with both sides rounded up to multiples of `stride`, without negative divisions."""
    height, width = size
    return (height + stride - 1) // stride * stride, (width + stride - 1) // stride * stride


def _scaled(frame: Tensor, size: Size) -> Tensor:
    """The frame at `size`; in reduced precision the same to the last bit for any number of threads.

    torch has two kernels for three channels, one for a single thread, but one for four. They differ by 1e-7, of which
    rounding to bfloat16 makes up to 0.04 px.
    """
    if frame.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return resize(frame, size)
    four = torch.cat((frame, frame[:, :1]), 1).contiguous(memory_format=torch.channels_last)
    return resize(four, size)[:, :3]


def _scaled_back(prediction: Prediction, size: Size, fitted: Size, exact: bool) -> Prediction:
    """The prediction for frames of size `fitted`, or of a coarser grid of theirs, for those of `size`."""
    if exact and size_of(prediction.flow) == size:
        return prediction
    flow = prediction.flow
    flow = resize(flow.to(torch.promote_types(flow.dtype, torch.float32)), size)
    factors = constant((size[1] / fitted[1], size[0] / fitted[0]), flow)
    return prediction._replace(
        flow=flow * factors[:, None, None],
        intermediate_flows=prediction.intermediate_flows if exact else (),  # else they are of the scaled frames
        **_maps(prediction, lambda plane: resize(plane[:, None], size)[:, 0]),
    )


def _sides(size: Size, fitted: Size, fit: str) -> tuple[int, int, int, int]:
    """How many pixels are added left, right, above and below."""
    left, top = (fitted[1] - size[1]) // 2, (fitted[0] - size[0]) // 2
    if fit == "pad_bottom":
        top = 0
    return left, fitted[1] - size[1] - left, top, fitted[0] - size[0] - top


def _padded(previous: Prediction | None, sides: tuple[int, int, int, int]) -> Prediction | None:
    """A flow to begin with, padded as the frames are; states stay what they are."""
    if previous is None or previous.state is not None:
        return previous
    return previous._replace(flow=F.pad(previous.flow, sides, mode="replicate"))


def _cut_back(prediction: Prediction, size: Size, sides: tuple[int, int, int, int]) -> Prediction:
    """The prediction without what was added to the frames."""
    left, _, top, _ = sides
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    return prediction._replace(flow=prediction.flow[window], **_maps(prediction, lambda plane: plane[window]))


def _maps(prediction: Prediction, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The maps [N, h, w] that the prediction has besides its flow, changed alike."""
    maps = {name: getattr(prediction, name) for name in ("residual", "uncertainty", "occlusion")}
    return {name: change(plane) for name, plane in maps.items() if plane is not None}


def _still(frame1: Tensor, frame2: Tensor, prediction: Prediction) -> Prediction:
    """The prediction with a flow of zero for pairs that show no motion: identical frames, or one of a single color.

    What networks see there is their habit: the largest flow that explains nothing is none. Almost always a few pixels
    are enough to see that a pair is another one.
    """
    if frame1.device.type == "cpu" and not is_captured():
        few = (frame[..., ::SPARSE, ::SPARSE] for frame in (frame1, frame2))
        if not bool(_shows_no_motion(*few).any()):
            return prediction
    still = _shows_no_motion(frame1, frame2)[:, None, None, None]
    back = prediction.backward
    return prediction._replace(
        flow=prediction.flow.masked_fill(still, 0), backward=None if back is None else back.masked_fill(still, 0)
    )


def _shows_no_motion(frame1: Tensor, frame2: Tensor) -> Tensor:
    """Returns [N] bool. Largest values in place of comparisons of pixels, which exported graphs take long for."""
    differences = (frame1 - frame2, frame1 - frame1[..., :1, :1], frame2 - frame2[..., :1, :1])
    return torch.stack([each.abs().amax((1, 2, 3)) == 0 for each in differences]).any(0)


def _check(frame1: Tensor, frame2: Tensor) -> None:
    """Raises FleetflowError unless both frames are [N, 3, H, W] float in [0, 1] and of one size."""
    for name, frame in (("frame1", frame1), ("frame2", frame2)):
        if not isinstance(frame, Tensor):
            what = type(frame).__name__
            raise FleetflowError(f"{name} is a {what}; expected a tensor [N, 3, H, W], or give pictures to a Predictor")
        if frame.ndim != 4 or frame.shape[1] != 3 or any(side < 1 for side in frame.shape):
            raise FleetflowError(f"{name} is {list(frame.shape)}; expected [N, 3, H, W]: add a batch axis or convert")
        if not frame.is_floating_point():
            raise FleetflowError(f"{name} is {frame.dtype}; expected float in [0, 1]: divide uint8 frames by 255")
    if frame1.shape != frame2.shape:
        raise FleetflowError(
            f"frames are {list(frame1.shape)} and {list(frame2.shape)}; both must have the same size: resize one"
        )
    if frame1.device.type != "cpu" or is_captured():
        return  # reading a value would stop the GPU or the trace
    for name, frame in (("frame1", frame1), ("frame2", frame2)):
        if _is_known_in_range(frame):
            continue
        low, high = frame.amin().item(), frame.amax().item()  # aminmax takes ten times as long on channels-last
        if low >= LOWEST and high <= HIGHEST:
            continue
        if not (low > float("-inf") and high < float("inf")):  # neither holds for NaN
            raise FleetflowError(
                f"{name} has values that are not finite; expected values in [0, 1]: look at its source"
            )
        advice = (
            "divide uint8 frames by 255" if low >= LOWEST else "undo the normalization, the networks have their own"
        )
        raise FleetflowError(f"frames reach {high if low >= LOWEST else low:.4g}; expected values in [0, 1]: {advice}")


def known_in_range(frame: Tensor) -> Tensor:
    """Returns the frame with a note that its values are in [0, 1], so that `forward` does not look at them.

    The note holds until something is written into the frame; slices and copies have none.
    """
    if not frame.is_inference():  # those do not count what is written into them
        setattr(frame, _NOTE, (frame.data_ptr(), frame._version))
    return frame


def _is_known_in_range(frame: Tensor) -> bool:
    note = getattr(frame, _NOTE, None)
    return note is not None and note == (frame.data_ptr(), frame._version)


def _as_batch(previous: Prediction) -> Prediction:
    """A start for both directions, as one for twice as many pairs."""
    if previous.state is not None or previous.backward is None:
        raise FleetflowError("the start has no flow back; both directions take a prediction of flow and backward alone")
    return Prediction(torch.cat((previous.flow, previous.backward)))


def _as_ways(prediction: Prediction) -> Prediction:
    """The prediction for N pairs whose backward flow it is, made of that for N pairs and N in the other order."""
    flow, backward = prediction.flow.tensor_split(2)
    maps = _maps(prediction, lambda plane: plane.tensor_split(2)[0])
    return Prediction(flow, backward=backward, features=prediction.features)._replace(**maps)


def _check_start(previous: Prediction | None, frame1: Tensor) -> None:
    """Raises FleetflowError unless what to begin with is a prediction, whose flow has the size of the frames."""
    if previous is not None and not isinstance(previous, Prediction):
        raise FleetflowError(
            f"previous is a {type(previous).__name__}; expected what the network predicted before, or None"
        )
    expected = [frame1.shape[0], 2, *frame1.shape[2:]]
    if previous is not None and previous.state is None and list(previous.flow.shape) != expected:
        raise FleetflowError(f"the initial flow is {list(previous.flow.shape)}; expected {expected}: resize it")
