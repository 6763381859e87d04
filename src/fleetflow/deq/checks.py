"""What an argument must be. Each check returns nothing, or raises one line that names the argument."""

import operator
from collections.abc import Callable
from typing import Any

import torch


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless the value is a whole number, `least` or more."""
    _need(name, value, lambda number: operator.index(number) >= least, f"a whole number, {least} or more")


def number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """Raises ValueError unless the value is a number that fits; `wanted` says which, as in "above 0"."""
    _need(name, value, fits, f"a number {wanted}")


def flag(name: str, value: object) -> None:
    """Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def able(name: str, value: object, method: str, wanted: str) -> None:
    """Raises TypeError unless the value is an object with that method; a class is none."""
    if torch.compiler.is_compiling():
        return  # the compiler knows no attributes of functions
    if isinstance(value, type) or not hasattr(value, method):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")


def rising(name: str, values: Any, last: int) -> None:
    """Raises ValueError unless the values are whole numbers that rise within 1 to `last`."""
    try:
        numbers = [operator.index(values[k]) for k in range(len(values))]
    except TypeError:
        numbers = [0]
    if any(k < 1 or k > last for k in numbers) or sorted(set(numbers)) != numbers:
        raise ValueError(f"{name} is {values!r}; it must be whole numbers that rise within 1 to {last}")


def _need(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    try:
        good = not isinstance(value, bool) and bool(fits(value))
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
