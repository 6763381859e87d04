"""The Predictor: uint8 pictures in, flow in pixels out, on any device."""

import copy
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial
from numbers import Real
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn

from fleetflow.deq import remove_norm
from fleetflow.inference.cuda_graphs import Graphed
from fleetflow.inference.device import Precision, autocast, choose_device, choose_dtype
from fleetflow.inference.exported import open_network
from fleetflow.inference.fused import available, fuse
from fleetflow.inference.memory import (
    FIXED,
    Budget,
    bytes_per_pixel,
    fits_nothing,
    hand_back_if_varied,
    in_words,
    keep_freed,
    limit_model,
    resident,
)
from fleetflow.inference.memory import available as available_memory
from fleetflow.inference.tiles import SMALLEST, tiled
from fleetflow.io.arrays import as_array
from fleetflow.io.images import read_image
from fleetflow.models.base import Clip, FlowModel, known_in_range
from fleetflow.ops.constant import constant
from fleetflow.ops.kernels import is_reference
from fleetflow.ops.resize import resize
from fleetflow.types import FleetflowError, Prediction, Size, checked_size, size_of

Picture = np.ndarray | str | os.PathLike  # uint8 [H, W, 3] RGB (gray [H, W] and RGBA work too), or a file
BATCH_PIXELS = 2**21  # of the frames that are predicted at once in a list of pairs: 4 pairs of 448x1024


class Predictor:
    """A network ready to predict: device, precision and memory layout chosen once.

        predictor = fleetflow.Predictor("fastflownet")
        flow = predictor("frame1.png", "frame2.png")            # float32 [H, W, 2] pixels
        flows = predictor([(image1, image2), (image2, image3)])  # several pairs at once

    It works on a copy: the model it was given stays as it is, and changes of that model do not change it. It can be
    copied, pickled, and used by several threads at once. On the CPU the process keeps up to 1 GiB of freed memory from
    then on (`fleetflow.inference.memory`).
    """

    def __init__(
        self,
        model: FlowModel | str,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        iterations: int | None = None,
        size: Size | None = None,
        memory: int | None = None,
    ):
        """Makes the network ready.

        Args:
            model: a network, or what `fleetflow.load` takes, such as "fastflownet".
            device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
            precision: of the convolutions; "auto" takes bfloat16 where the device is faster in it.
            iterations: refinement iterations, for networks that refine; None takes the network's own.
            size: height and width to which frames are resized for the network, and the flow back; None: as they are.
            memory: bytes that this process may take, on a GPU of its memory; large frames are predicted in tiles then,
                and large correlations computed anew instead of stored. None: no limit.

        Raises:
            FleetflowError: for a device, precision, number of iterations, size or memory that cannot be.
        """
        network = open_network(model) if isinstance(model, str | os.PathLike) else copy.deepcopy(model)
        if not isinstance(getattr(network, "_orig_mod", network), FlowModel):  # of `torch.compile`, too
            raise FleetflowError(f'model is a {type(model).__name__}; expected a network, or its name: "fastflownet"')
        self.iterations = network.iterations_of(iterations)
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        self.size = None if size is None else checked_size(size)
        if memory is not None and not (isinstance(memory, Real) and 1 <= memory < math.inf):
            raise FleetflowError(f"memory is {memory!r}; expected a number of bytes, such as {4 << 30}")
        network = network.eval().requires_grad_(False)
        self._sha256 = _hash(network)  # before its convolutions are fused, after which it has no state
        network = network.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model: FlowModel = _ready(network, self.device, self.dtype)
        self._run = Graphed(self.model) if self.device.type == "cuda" else self.model
        self._prepare_process()
        self._budget: Budget | None = None
        if memory is not None:
            limit_model(self.model, memory, self.device)
            per_pixel = self._bytes_per_pixel()  # the first prediction: from now on the process is as large as it is
            self._budget = Budget(memory, memory - resident(self.device) - FIXED, per_pixel)
            self._budget.pixels(1, 1)  # raises where not even a picture of one pixel fits

    def _bytes_per_pixel(self) -> float:
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return bytes_per_pixel(lambda *frames: self.model(*frames, None, self.iterations), self.device)

    def _prepare_process(self) -> None:
        if self.device.type == "cpu":
            keep_freed()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._prepare_process()

    @overload
    def __call__(self, image1: Picture, image2: Picture) -> np.ndarray: ...
    @overload
    def __call__(self, image1: Sequence[tuple[Picture, Picture]]) -> list[np.ndarray]: ...

    def __call__(self, image1, image2=None):
        """Returns the flow from image1 to image2, or the flows of a list of pairs.

        Args:
            image1: uint8 [H, W, 3] RGB (gray [H, W] and RGBA work too), from 1x1 up, or the path of a picture; or a
                list of pairs of such, which may have different sizes.
            image2: of the size of image1; left out for a list.

        Returns:
            float32 [H, W, 2] in pixels; for a list of pairs a list of them.
        """
        if image2 is not None:
            return _array(self.predict(image1, image2).flow)[0]
        if isinstance(image1, np.ndarray | str | os.PathLike | Tensor):
            raise FleetflowError("one picture was given; expected two, or a list of pairs")
        if not isinstance(image1, Iterable):
            raise FleetflowError(f"image1 is a {type(image1).__name__}; expected two pictures, or a list of pairs")
        return [flow for batch in self._batches(image1) for flow in _array(self.predict_frames(*batch).flow)]

    def predict(
        self, image1: Picture, image2: Picture, previous: Prediction | None = None, iterations: int | None = None
    ) -> Prediction:
        """Returns all the network has to say about the pair, as tensors of a batch of one on the device.

        Args:
            image1: as of a call.
            image2: as of a call.
            previous: what it said about the last pair of a video, for networks that can start from there; or, without
                a state, what another network said about this pair.
            iterations: in place of those the Predictor was made with.
        """
        return self.predict_frames(*self._frames(image1, image2), previous, iterations)

    def label(self) -> dict[str, str]:
        """Returns what its results depend on, for a note beside them: the network, its weights, device and precision.

        The weights are those it had when the Predictor was made.
        """
        label = {
            "network": type(self.model).__name__,
            "sha256": self._sha256,
            "fit": self.model.fit,
            "iterations": str(self.iterations),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }
        return label if self.size is None else {**label, "size": "x".join(map(str, self.size))}

    def predict_frames(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None = None,
        iterations: int | None = None,
        clip: Clip | None = None,
        size: Size | None = None,
    ) -> Prediction:
        """Returns the prediction for frames [N, 3, H, W] in [0, 1] on the device, as `frame` makes them.

        Args:
            previous, iterations: as of `predict`.
            clip: for pairs of a clip, see `models.base.Clip`.
            size: in place of the one the Predictor was made with.
        """
        if previous is not None and not isinstance(previous, Prediction):
            raise FleetflowError(f"previous is a {type(previous).__name__}; expected what `predict` returned, or None")
        iterations = self.iterations if iterations is None else iterations
        size = size or self.size
        if self.device.type == "cpu":
            hand_back_if_varied(tuple(frame1.shape), limited=self._budget is not None)
            if fits_nothing(*(size or size_of(frame1)), len(frame1)):
                raise FleetflowError(self._what_would_fit(frame1))
        plain = self._budget is None and (size is None or size == size_of(frame1))
        run = self._run if plain else partial(self._at_size, size)
        rest = () if clip is None else (clip,)
        try:
            with torch.inference_mode(), autocast(self.device, self.dtype):
                return run(frame1, frame2, previous, iterations, *rest)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        raise FleetflowError(self._what_would_fit(frame1))

    def _within_memory(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None,
        iterations: int | None,
        clip: Clip | None = None,
    ) -> Prediction:
        """The prediction of frames as they are, in tiles where they are too large."""
        whole = frame1[0, 0].numel() * (2 if clip is not None and clip.both_ways else 1)
        pixels = whole if self._budget is None else self._budget.pixels(whole, SMALLEST)
        if whole <= pixels:
            return self._run(frame1, frame2, previous, iterations, *(() if clip is None else (clip,)))
        if previous is not None:
            raise FleetflowError(
                f"frames of {frame1.shape[2]}x{frame1.shape[3]} take tiles in this memory, which cannot start from "
                "another prediction; leave --warm-start out, or give more memory or a smaller size"
            )
        ways = ((frame1, frame2), (frame2, frame1)) if clip is not None and clip.both_ways else ((frame1, frame2),)
        there, *back = (tiled(lambda *tiles: self._run(*tiles, None, iterations), *way, pixels) for way in ways)
        return there._replace(backward=back[0].flow) if back else there

    def _at_size(
        self,
        size: Size | None,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None,
        iterations: int | None,
        clip: Clip | None = None,
    ) -> Prediction:
        """The prediction of frames at the size that the network is to see."""
        whole = size_of(frame1)
        if size is None or size == whole:
            return self._within_memory(frame1, frame2, previous, iterations, clip)
        frame1, frame2 = _resized(frame1, size), _resized(frame2, size)
        if previous is not None and previous.state is None:
            previous = _flows_resized(previous, size)
        found = self._within_memory(frame1, frame2, previous, iterations, clip)
        return _flows_resized(found, whole)._replace(
            **{
                name: resize(plane[:, None].float(), whole)[:, 0]
                for name in ("residual", "uncertainty", "occlusion")
                if (plane := getattr(found, name)) is not None
            },
        )

    def _what_would_fit(self, frame: Tensor) -> str:
        """The message of a prediction that ran out of memory."""
        height, width = self.size or size_of(frame)
        text = f"out of memory at {height}x{width} with {type(self.model).__name__}"
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
        try:
            needed = self._bytes_per_pixel()
        except (MemoryError, RuntimeError):
            free = None
        if free is None:
            return (
                f"{text}; take a smaller --size, a limit such as --memory 2G, or a smaller network such as fastflownet"
            )
        factor = min((free / (needed * height * width)) ** 0.5, 0.9)
        small = [max(int(side * factor) // 64 * 64, 64) for side in (height, width)]
        memory = in_words(resident(self.device) + max(free * 0.8, 1))
        return (
            f"{text}, which takes {in_words(needed * height * width)}; --memory {memory} predicts in tiles, "
            f"--size {small[0]} {small[1]} fits, or take a smaller network such as fastflownet"
        )

    def _batches(self, pairs: Iterable[tuple[Picture, Picture]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the frames of consecutive pairs of one size, [N, 3, H, W] twice, in their order."""
        waiting: list[tuple[Tensor, Tensor]] = []
        for k, pair in enumerate(pairs):
            if isinstance(pair, str | os.PathLike) or not isinstance(pair, Sized) or len(pair) != 2:
                raise FleetflowError(f"entry {k} of the list is no pair; expected two pictures")
            frames = self._frames(*pair)
            pixels = frames[0][0, 0].numel()
            full = self._budget is not None or (len(waiting) + 1) * pixels > BATCH_PIXELS
            if waiting and (waiting[0][0].shape != frames[0].shape or full):
                yield _stacked(waiting)
                waiting = []
            waiting.append(frames)
        if waiting:
            yield _stacked(waiting)

    def _frames(self, image1: Picture, image2: Picture) -> tuple[Tensor, Tensor]:
        frame1, frame2 = self.frame(image1, "image1"), self.frame(image2, "image2")
        if frame1.shape != frame2.shape:
            sizes = " and ".join(f"{frame.shape[2]}x{frame.shape[3]}" for frame in (frame1, frame2))
            which = " and ".join(str(image) for image in (image1, image2) if not isinstance(image, np.ndarray))
            raise FleetflowError(
                f"{which or 'the images'} are {sizes}; both must have the same size: crop or resize one"
            )
        return frame1, frame2

    def frame(self, image: Picture, name: str = "the frame") -> Tensor:
        """Returns a picture as networks take it, [1, 3, H, W] float32 in [0, 1] on the device; `name` is for errors."""
        image = as_rgb(image, name)
        image = np.require(image, requirements=("C", "W"))  # torch warns at what it must not write into
        frame = torch.from_numpy(image).to(self.device)[None]
        return known_in_range(frame.permute(0, 3, 1, 2).float().div_(255))  # channels-last, as the picture was


def as_rgb(image: Picture, name: str) -> np.ndarray:
    """Returns a picture or its file as uint8 [H, W, 3] RGB; raises FleetflowError for others, by `name`."""
    expected = "uint8 [H, W, 3] RGB"
    image = read_image(image) if isinstance(image, str | os.PathLike) else as_array(image, name, expected)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected {expected}")
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3]


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it says so: by its type, or, from torch's allocator of the CPU, in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _array(flow: Tensor) -> np.ndarray:
    """The flow [N, 2, H, W] as float32 [N, H, W, 2]."""
    return flow.permute(0, 2, 3, 1).float().cpu().numpy()


def _stacked(frames: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*frames)
    return torch.cat(first), torch.cat(second)


def _resized(frame: Tensor, size: Size) -> Tensor:
    """The frame [N, 3, H, W] at another size; made smaller, it is smoothed first."""
    return nn.functional.interpolate(frame, size=size, mode="bilinear", align_corners=False, antialias=True)


def _flows_resized(found: Prediction, size: Size) -> Prediction:
    back = found.backward
    return found._replace(
        flow=_resized_flow(found.flow, size), backward=None if back is None else _resized_flow(back, size)
    )


def _resized_flow(flow: Tensor, size: Size) -> Tensor:
    """The flow [N, 2, H, W] for frames of another size, in their pixels."""
    factors = constant((size[1] / flow.shape[3], size[0] / flow.shape[2]), flow.float())
    return resize(flow.float(), size) * factors[:, None, None]


def _hash(model: nn.Module) -> str:
    """The SHA-256 of the names and values of the model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _ready(model: FlowModel, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The model with weights computed once, in `dtype` where they are convolutions', on the CPU packed and fused.

    A compiled one is not fused: its compiler fuses, and cannot look into packed convolutions.
    """
    if is_reference():
        return model
    remove_norm(model)
    if device.type == "cpu" and available(dtype) and not hasattr(model, "_orig_mod"):
        fuse(model, dtype)
    for layer in model.modules():
        if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
            layer.to(dtype)
    return model
