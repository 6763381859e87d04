"""Predictions on a CUDA device as replays of recorded CUDA graphs.

A network is hundreds of small kernels, and a small network waits for the processor to launch them. A graph, recorded
once for frames of one size, launches all of them at once. Only what reads no value back and sends none to the device
can be recorded; everything else runs as always.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from fleetflow.ops.kernels import is_reference


class Recording(NamedTuple):
    """A graph, the tensors that it reads and those that it writes."""

    graph: Any
    arguments: tuple
    result: Any


class Graphed:
    """A function of tensors, called by replaying graphs of it where that is possible; always the same results.

    The first call with arguments of a shape runs as always, which warms up; the second records a graph. Calls on other
    devices than CUDA, or with gradients, run as always. If the recording fails, a warning says why, and calls with
    such arguments go on as always.

    Args:
        function: a network in evaluation, or another function that depends on its arguments and on tensors that stay
            where they are in memory (their values may change).
        keep: graphs kept, one for each shape of arguments (the least recently used goes first); they share their
            memory.
    """

    def __init__(self, function: Callable, *, keep: int = 4):
        self.function = function
        self.keep = keep
        self._known: OrderedDict[tuple, Recording | str] = OrderedDict()  # or what to do: "record" or "run"
        self._pool = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _again, (self.function, self.keep)  # a copy records graphs of its own

    def __call__(self, *arguments):
        if not _possible(arguments):
            return self.function(*arguments)
        key = _shape(arguments)
        with self._lock:
            known = self._known.get(key)
            if known == "record":
                known = self._known[key] = self._recorded(arguments)
            if isinstance(known, Recording):
                self._known.move_to_end(key)
                return _replayed(known, arguments)
        result = self.function(*arguments)
        with self._lock:
            self._known.setdefault(key, "record")
            self._known.move_to_end(key)
            while len(self._known) > self.keep:
                self._known.popitem(last=False)
        return result

    def _recorded(self, arguments: tuple) -> Recording | str:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.device_of(next(leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor))):
                return record(self.function, arguments, self._pool)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
            warnings.warn(f"this cannot be recorded as a CUDA graph ({reason}); it runs as always", stacklevel=3)
            return "run"


def _again(function: Callable, keep: int) -> Graphed:
    return Graphed(function, keep=keep)


def record(function: Callable, arguments: tuple, pool) -> Recording:
    """Returns the graph of function(*arguments) on the current CUDA device; raises RuntimeError where there is none."""
    arguments = tree_map_only(Tensor, Tensor.clone, arguments)
    before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(before)
    with torch.cuda.stream(aside), _autocast():  # what is done once only, such as choosing algorithms, is done here
        function(*arguments)
    before.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"), _autocast():
            result = function(*arguments)
    finally:
        torch.cuda.set_stream(before)  # a failed recording leaves its own one behind
    return Recording(graph, arguments, result)


def _replayed(recording: Recording, arguments: tuple):
    """Returns what the graph makes of the arguments, in memory of its own."""
    for own, given in zip(tree_flatten(recording.arguments)[0], tree_flatten(arguments)[0], strict=True):
        if isinstance(own, Tensor):
            own.copy_(given)
    recording.graph.replay()
    return tree_map_only(Tensor, Tensor.clone, recording.result)


def _possible(arguments: tuple) -> bool:
    leaves = tree_flatten(arguments)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves)
    return bool(tensors) and others and not torch.is_grad_enabled() and _on_cuda(tensors)


def _on_cuda(tensors: list[Tensor]) -> bool:
    return all(tensor.is_cuda for tensor in tensors) and not torch.cuda.is_current_stream_capturing()


def _shape(arguments: tuple) -> tuple:
    """All that a graph depends on besides the values of the tensors."""
    leaves, form = tree_flatten(arguments)
    mode = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled()
    shapes = (
        (leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride()) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    return str(form), mode, is_reference(), *shapes


def _autocast():
    """The autocast that is on, without its cache: a graph must not read converted weights that are gone by then."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
