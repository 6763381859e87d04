"""Stream: the flow of frames that arrive one after another, each pair helped by the one before it."""

import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.inference.device import Precision
from fleetflow.inference.exported import ExportedModel
from fleetflow.inference.pace import Effort, Pace
from fleetflow.inference.predictor import Picture, Predictor, as_rgb
from fleetflow.io.live import Newest
from fleetflow.layers.warm_start import reduced
from fleetflow.models.base import Clip, FlowModel
from fleetflow.motion.confidence import confidence_of, judged
from fleetflow.motion.cuts import CutState, is_cut
from fleetflow.motion.splatting import splat_tensors
from fleetflow.ops.constant import constant
from fleetflow.ops.resize import resize
from fleetflow.types import FleetflowError, Prediction, Size, size_of

CARRIED = 8  # pixels: of so coarse a grid is the last flow, when it is moved along by itself


@dataclass(frozen=True)
class Step:
    """What a stream says about a frame and the one before it.

    Attributes:
        flow: float32 [H, W, 2] pixels, from the frame before to this one: right, down.
        backward: the same from this frame to the one before, where the stream was asked for what needs it.
        occlusion: float32 [H, W], the probability that this frame does not show a pixel of the one before, if asked for.
        uncertainty: float32 [H, W] pixels: nine of ten pixels are off by less than this, if asked for.
        time: seconds on the clock of the source, of this frame; not-a-number where it has none.
        interval: seconds since the frame before; not-a-number where frames have no times.
        cut: the two frames are of different shots; the flow means little, and nothing of the past was used.
        dropped: frames that came in between and were left out, as the stream was not ready for them.
        warm: the search began with the last flow.
        iterations: refinement iterations, None for networks without.
        size: height and width at which the network saw the frames.
        latency: seconds that it took.
        prediction: the same as tensors of a batch of one on the device.
    """

    flow: np.ndarray
    backward: np.ndarray | None
    occlusion: np.ndarray | None
    uncertainty: np.ndarray | None
    time: float
    interval: float
    cut: bool
    dropped: int
    warm: bool
    iterations: int | None
    size: tuple[int, int]
    latency: float
    prediction: Prediction


class _Last(NamedTuple):
    """What is kept of a frame until the next one comes."""

    frame: Tensor  # [1, 3, H, W]
    time: float
    size: Size | None = None  # at which the network saw it
    features: Any = None  # what the network saw in it
    found: Prediction | None = None  # for this frame and the one before it; None behind a cut and for the first one


class Stream:
    """The flow of frames that arrive one after another::

        stream = fleetflow.Stream("fastflownet", occlusion=True, budget_ms=40)
        for frame in fleetflow.read_video("clip.mp4"):
            step = stream(frame)  # None for the first frame
            if step is not None:
                print(step.time, step.flow.mean((0, 1)), step.occlusion.mean())

    What a network sees in a frame is computed once, for both of its pairs. Memory does not grow. Several threads may
    use one stream; frames count in the order in which they come.
    """

    def __init__(
        self,
        network: Predictor | FlowModel | str,
        *,
        occlusion: bool = False,
        uncertainty: bool = False,
        backward: bool = False,
        warm_start: bool = True,
        warm_iterations: int | None = None,
        budget_ms: float | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        iterations: int | None = None,
        size: tuple[int, int] | None = None,
        memory: int | None = None,
    ):
        """Makes the network ready.

        Args:
            network: a `Predictor`, or what makes one, for which the last five arguments are.
            occlusion, uncertainty, backward: say so with each step. All need the flow back, which is predicted in the
                same batch: a step takes nearly twice as long.
            warm_start: begin each search with the last flow, moved along by itself, in networks that gain by it: RAFT,
                GMA, DEQ-Flow. Behind a cut the search begins anew.
            warm_iterations: refinement iterations of a search that begins with the last flow, which needs fewer; None: as
                many as others.
            budget_ms: milliseconds that a step should take. Where it takes longer, refinement iterations become fewer
                first, then the frames that the network sees smaller; where there is time, they grow again, up to what
                was asked for. Each step says what it was given. None: no limit.
            device, precision, iterations, size, memory: as of `Predictor`.

        Raises:
            FleetflowError: for a budget that is not above 0, and for what `Predictor` refuses.
        """
        if budget_ms is not None and not (isinstance(budget_ms, Real) and 0 < budget_ms < math.inf):
            raise FleetflowError(f"budget_ms is {budget_ms!r}; expected milliseconds above 0, or None for no limit")
        if not isinstance(network, Predictor):
            network = Predictor(
                network, device=device, precision=precision, iterations=iterations, size=size, memory=memory
            )
        elif (device, precision, iterations, size, memory) != ("auto", "auto", None, None, None):
            raise FleetflowError(
                "a Predictor has its own device, precision, iterations, size and memory; leave them out"
            )
        self.predictor = network
        self.dropped = 0  # of all steps so far
        self._asked = {"occlusion": occlusion, "uncertainty": uncertainty}
        self.both_ways = occlusion or uncertainty or backward
        maps = occlusion or uncertainty
        self._confidence = confidence_of(network.label()["sha256"]) if maps else None
        self._shares = network.model.shares_features
        if warm_iterations is not None:
            warm_iterations = network.model.iterations_of(warm_iterations)
        self._warm, self._warm_iterations = warm_start, warm_iterations
        self._budget = None if budget_ms is None else budget_ms / 1000
        self._pace: Pace | None = None
        self._last: _Last | None = None
        self._cuts = CutState()
        self._closed = False
        self._lock = threading.RLock()
        self._sources: set[Newest] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on from the last frame with a lock of its own; what reads frames ahead stays behind."""
        with self._lock:
            return {**self.__dict__, "_lock": None, "_sources": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __call__(self, frame: Picture, *, iterations: int | None = None, dropped: int = 0) -> Step | None:
        """Returns what there is to say about this frame and the one before it; None for the first frame.

        Args:
            frame: uint8 [H, W, 3] RGB or what else `Predictor` takes; its `time`, where it has one, goes into the step.
            iterations: in place of the stream's own, for this step.
            dropped: frames that were left out before this one.

        Raises:
            FleetflowError: for a frame of another size than the one before (`reset` first), and once it is closed.
        """
        if not isinstance(dropped, Integral) or dropped < 0:
            raise FleetflowError(f"dropped is {dropped!r}; expected how many frames were left out, 0 or more")
        with self._lock:
            if self._closed:
                raise FleetflowError("the stream is closed; make a new one")
            began = time.perf_counter()
            picture, moment = as_rgb(frame, "the frame"), float(getattr(frame, "time", math.nan))
            last, now = self._last, _Last(self.predictor.frame(picture), moment)
            if last is not None and last.frame.shape != now.frame.shape:
                old, new = ("x".join(map(str, one.frame.shape[2:])) for one in (last, now))
                raise FleetflowError(f"a frame of {new} follows one of {old}; resize it, or call reset() first")
            cut, self._cuts = is_cut(picture, CutState() if last is None else self._cuts)
            self.dropped += dropped
            if last is None:
                self._last = now
                return None
            effort = self._effort(now.frame, iterations)
            same = last.size == effort.size
            start = self._start(last.found) if self._warm and same and last.found is not None and not cut else None
            if start is not None and self._warm_iterations is not None and effort.iterations is not None:
                effort = effort._replace(iterations=min(self._warm_iterations, effort.iterations))
            found = self._predicted(last.frame, now.frame, last.features if same else None, start, effort)
            step = self._step(found, last, now, began, cut, start is not None, dropped, effort)
            kept = None if cut or not bool(found.flow.isfinite().all()) else found._replace(features=None)
            self._last = now._replace(size=effort.size, features=found.features, found=kept)
            if self._pace is not None:
                self._pace.took(step.latency, effort)
            return step

    def reset(self) -> None:
        """Forgets the past: the next frame is a first one. What was learned about time stays."""
        with self._lock:
            self._last = None

    def follow(self, source: Iterable[np.ndarray]) -> Iterator[Step]:
        """Yields a step for each frame of a live source that the stream is ready for.

        Frames are read by a thread of their own. Of those that come while a step is computed, the newest is taken, and
        the others are counted (`Step.dropped`): the flow stays up to date, whatever the network costs. The source is
        closed at the end, also by `close` in another thread::

            with fleetflow.Stream("fastflownet") as stream:
                for step in stream.follow(fleetflow.read_video("rtsp://camera/stream")):
                    print(step.time, step.dropped, step.latency)
        """
        one_by_one = isinstance(source, Iterable) or hasattr(source, "__getitem__")  # as `for` takes them
        if not one_by_one or isinstance(source, str):
            raise FleetflowError(
                f"source is a {type(source).__name__}; expected frames one after another, such as of fleetflow.read_video"
            )
        with Newest(source) as newest:
            self._sources.add(newest)
            try:
                for frame, dropped in newest:
                    if self._closed:
                        return
                    step = self(frame, dropped=dropped)
                    if step is not None:
                        yield step
            finally:
                self._sources.discard(newest)

    def close(self) -> None:
        """Ends the stream and lets go of its sources; safe from any thread, waits for the step at work."""
        for source in list(self._sources):
            source.close()
        with self._lock:
            self._closed, self._last = True, None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _effort(self, frame: Tensor, iterations: int | None) -> Effort:
        """What the next step may cost."""
        size = self.predictor.size or size_of(frame)
        whole = Effort(size, self.predictor.iterations if iterations is None else iterations)
        if self._budget is None:
            return whole
        if self._pace is None or self._pace.efforts[0] != whole:
            self._pace = Pace(self._budget, whole)
        return self._pace.effort

    def _predicted(
        self, frame1: Tensor, frame2: Tensor, features: Any, start: Prediction | None, effort: Effort
    ) -> Prediction:
        """The prediction, in both directions if there is need. features: of frame1, if they are known."""
        clip = Clip(features, self.both_ways) if self.both_ways or self._shares else None
        found = self.predictor.predict_frames(frame1, frame2, start, effort.iterations, clip, effort.size)
        if self._confidence is None:
            return found
        found = judged(found, frame1, frame2, self._confidence)
        asked = {"occlusion": found.occlusion, "uncertainty": found.uncertainty}
        return found._replace(**{name: value if self._asked[name] else None for name, value in asked.items()})

    def _start(self, known: Prediction) -> Prediction | None:
        """Where a search begins: the network's own state, or the last flow (both, if both are wanted) moved along."""
        if known.state is not None and not self.both_ways:
            return Prediction(known.flow, state=known.state)
        if self.predictor.model.iterations is None or isinstance(self.predictor.model, ExportedModel):
            return None
        back = known.backward if self.both_ways else None  # leads where the surface came from; it goes on the other way
        return Prediction(
            moved_along(known.flow, known.flow), backward=None if back is None else moved_along(back, -back)
        )

    def _step(
        self,
        found: Prediction,
        last: _Last,
        now: _Last,
        began: float,
        cut: bool,
        warm: bool,
        dropped: int,
        effort: Effort,
    ) -> Step:
        arrays = {}
        for name in ("flow", "backward", "occlusion", "uncertainty"):
            value = getattr(found, name)
            if value is not None:
                value = value[0].float().movedim(0, -1) if value.ndim == 4 else value[0].float()
                value = value.contiguous().cpu().numpy()
            arrays[name] = value
        return Step(
            **arrays,
            time=now.time,
            interval=now.time - last.time,
            cut=cut,
            dropped=dropped,
            warm=warm,
            iterations=effort.iterations,
            size=effort.size,
            latency=time.perf_counter() - began,
            prediction=found._replace(features=None),
        )


@torch.inference_mode()
def moved_along(flow: Tensor, motion: Tensor) -> Tensor:
    """Returns the flow [N, 2, H, W] where `motion` [N, 2, H, W] takes it, smooth: on a grid of 8 pixels and back.

    Where two meet, the faster one counts: what moves passes before what does not, more often than behind it. Places
    that nothing reaches keep what they had.
    """
    size = size_of(flow)
    grid = (-(-size[0] // CARRIED), -(-size[1] // CARRIED))
    coarse, way = reduced(flow, grid), reduced(motion, grid)
    moved, reached = splat_tensors(coarse, way, 4 * way.norm(dim=1, keepdim=True))
    moved = torch.where(reached[:, None], moved, coarse)
    return resize(moved, size) * constant((size[1] / grid[1], size[0] / grid[0]), moved)[:, None, None]
