"""The switch between an operator's definition (plain torch, in `ops`) and its fast version (in this folder).

A definition wears the decorator `accelerated`; the fast version is the function of the same name in the module of
this folder that is called like the definition's module (`ops/warp.py: warp` -> `ops/kernels/warp.py: warp`). Tensors
on a CUDA device take the kernel of that name in `ops/triton` instead, where there is one and Triton can be used.
`with reference():` forces the definitions; the parity tests compare them with the others.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

_reference = ContextVar("fleetflow_reference", default=False)


def _answered_while_compiling(function: Callable) -> Callable:
    """Returns the function, which `torch.compile` will call once instead of looking inside.

    That is `torch.compiler.assume_constant_result`, which however imports the compiler: 2 s for those who have no use
    for it.
    """
    function._dynamo_marked_constant = True
    return function


@contextmanager
def reference() -> Iterator[None]:
    """Runs the block with the plain definition of every operator (slow, exact); it nests and is thread-local."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


@_answered_while_compiling
def is_reference() -> bool:
    """Returns True inside `with reference():`; what `torch.compile` makes keeps the answer it was made with."""
    return _reference.get()


def accelerated(definition: Callable) -> Callable:
    """Returns `definition`, replaced by its fast version at every call outside `reference()`."""
    module, name = definition.__module__.replace(".ops.", ".ops.kernels."), definition.__name__
    versions: dict[bool, Callable] = {}  # for CUDA tensors (True) and for others, as far as there were any

    @_answered_while_compiling
    def find(gpu: bool) -> None:
        if gpu not in versions:
            versions[gpu] = (gpu and _on_gpu(module, name)) or getattr(importlib.import_module(module), name)

    @functools.wraps(definition)
    def operator(*arguments, **keywords):
        if is_reference():
            return definition(*arguments, **keywords)
        first = arguments[0] if arguments else next(iter(keywords.values()))
        gpu = (first[0] if isinstance(first, tuple) else first).is_cuda
        find(gpu)
        return versions[gpu](*arguments, **keywords)

    return operator


def _on_gpu(module: str, name: str) -> Callable | None:
    """The twin in `ops/triton` of function `name` of a module of this folder, if there is one and it can be used."""
    twin = module.replace(".kernels.", ".triton.")
    if find_spec(twin) is None or not importlib.import_module("fleetflow.ops.triton").usable():
        return None
    return getattr(importlib.import_module(twin), name, None)
