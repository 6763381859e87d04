"""The switch between an operator's definition (plain torch, in `ops`) and its fast version (in this folder).

A definition wears the decorator `accelerated`; the fast version is the function of the same name in the module of
this folder that is called like the definition's module (`ops/warp.py: warp` -> `ops/kernels/warp.py: warp`).
`with reference():` forces the definitions; the parity test compares the two.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_reference = ContextVar("fleetflow_reference", default=False)


@contextmanager
def reference() -> Iterator[None]:
    """Runs the block with the plain definition of every operator (slow, exact); it nests and is thread-local."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


def is_reference() -> bool:
    """Returns True inside `with reference():`."""
    return _reference.get()


def accelerated(definition: Callable) -> Callable:
    """Returns `definition`, replaced by its fast version at every call outside `reference()`."""
    module = definition.__module__.replace(".ops.", ".ops.kernels.")

    @functools.wraps(definition)
    def operator(*arguments, **keywords):
        if _reference.get():
            return definition(*arguments, **keywords)
        return getattr(importlib.import_module(module), definition.__name__)(*arguments, **keywords)

    return operator
