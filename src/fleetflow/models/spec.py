"""What a user's string asks for: the only place where NETWORK, NETWORK:PATH and a path by itself are read."""

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fleetflow.registry import models, unknown
from fleetflow.types import FleetflowError

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".caffemodel")
EXPORTED = (".onnx", ".xml", ".pt2", ".pte")  # of files that `fleetflow export` writes


@dataclass(frozen=True)
class ModelSpec:
    """A network and where its weights come from, or an exported file.

    Attributes:
        network: registered name; "" where only the file says which network it is.
        path: checkpoint or exported file; None takes the weights of the package.
    """

    network: str = ""
    path: Path | None = None

    @classmethod
    def parse(cls, text: str | PathLike) -> "ModelSpec":
        """Returns what is asked for.

        Args:
            text: "fastflownet" (the weights of the package), "fastflownet:PATH" (a checkpoint), a path by itself (a
                checkpoint that names its network or can be recognized, or an exported file: .onnx, .xml, .pt2, .pte).
                "~" is the home folder.

        Raises:
            FleetflowError: for an unknown name, several names, and a file that is not there.
        """
        if not isinstance(text, str | PathLike | ModelSpec):
            raise FleetflowError(
                f'the name is a {type(text).__name__}; expected that of a network, such as "fastflownet"'
            )
        text = str(text)
        if "+" in text and all(part.partition(":")[0] in models for part in text.split("+")):
            raise FleetflowError(f"{text} names several networks; blends are gone (docs/weights.md): name one")
        network, colon, path = text.partition(":")
        if colon and network in models:
            return cls(network, _existing(path, text))
        if text in models:
            return cls(text)
        is_file = os.path.isfile(os.path.expanduser(text))
        if text.endswith((*CHECKPOINTS, *EXPORTED)) or is_file:
            if colon and "/" not in network and not is_file:  # NETWORK:PATH, misspelled
                raise unknown("network", network, list(models))
            return cls(path=_existing(text, text))
        raise unknown("network", network, list(models))

    @property
    def exported(self) -> bool:
        """Whether it is a file that `fleetflow export` wrote, which `fleetflow.Session` runs."""
        return self.path is not None and not self.network and self.path.suffix in EXPORTED

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.network, self.path) if part)


def _existing(path: str, text: str) -> Path:
    if not path:
        raise FleetflowError(f'"{text}" ends with a colon; expected the path of a checkpoint behind it')
    found = Path(os.path.expanduser(path))
    if found.is_dir():
        raise FleetflowError(f"{found} is a folder; expected the file of a checkpoint")
    if not found.is_file():
        raise FleetflowError(f"there is no file {found}; give the path of a checkpoint")
    return found
