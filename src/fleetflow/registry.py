"""Name -> function, with "did you mean". One registry for each kind of thing a user calls by name."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator

from fleetflow.types import FleetflowError


def unknown(kind: str, name: str, known: list[str]) -> FleetflowError:
    """Returns the error for a name that is not among the known ones: the nearest name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known) or 'none'}"
    return FleetflowError(f'no {kind} is called "{name}"; {hint}')


class Registry:
    """The functions of one package that carry the decorator `register`, by function name.

    Modules of the package are imported at the first look-up, so registering costs nothing at import.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self._package = package
        self._functions: dict[str, Callable] = {}
        self._complete = False

    def register(self, function: Callable) -> Callable:
        """Adds `function` under its own name; returns it unchanged."""
        self._functions[function.__name__] = function
        return function

    def names(self) -> list[str]:
        """Returns all registered names, sorted."""
        self._fill()
        return sorted(self._functions)

    def __getitem__(self, name: str) -> Callable:
        """Returns the function called `name`; raises FleetflowError with the nearest name."""
        self._fill()
        if name not in self._functions:
            raise unknown(self.kind, name, self.names())
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._functions

    def _fill(self) -> None:
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, self._package + "."):
                importlib.import_module(module.name)
            self._complete = True


models = Registry("network", "fleetflow.models")
