"""An exported file as a network, so that whatever takes a network takes it, too."""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from fleetflow.export.session import Result, Session
from fleetflow.models.base import FlowModel
from fleetflow.models.spec import EXPORTED
from fleetflow.models.weights import load
from fleetflow.types import Prediction


class ExportedModel(FlowModel):
    """A file that `fleetflow export` wrote; it runs on the CPU, in its own runtime, whatever the precision asked for.

    Attributes:
        session: the open file.
    """

    stride = 1
    fit = "pad"

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self.session = Session(path, threads=torch.get_num_threads())
        self.iterations = self.session.about["iterations"] if self.session.parts else None
        file = self.session.path
        files = sorted(file.glob("*")) if self.session.parts else [file]
        digest = hashlib.sha256(b"".join(each.read_bytes() for each in files)).digest()
        self.register_buffer("file", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def __deepcopy__(self, _) -> "ExportedModel":
        return self  # nothing of it changes

    def __reduce__(self):
        return ExportedModel, (self.session.path,)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return frame1, frame2

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        pictures = ((255 * frame).round().clamp(0, 255).to(torch.uint8) for frame in (frame1, frame2))
        image1, image2 = (picture.permute(0, 2, 3, 1).contiguous().cpu().numpy() for picture in pictures)
        if len(image1) == 2 and self.session.about["sizes"]["batch"] == 1:  # both directions, of a file for one
            flows = [
                self.session.predict(*pair, iterations=iterations).flow
                for pair in zip(image1[:, None], image2[:, None])
            ]
            return Prediction(torch.from_numpy(np.concatenate(flows)).permute(0, 3, 1, 2).to(frame1.device))
        last = None
        if previous is not None and previous.state is not None:
            last = Result(previous.flow.numpy(), tuple(part.numpy() for part in previous.state))
        found = self.session.predict(image1, image2, last, iterations=iterations)
        state = None if found.state is None else tuple(map(torch.from_numpy, found.state))
        return Prediction(torch.from_numpy(found.flow).permute(0, 3, 1, 2).to(frame1.device), state=state)


def is_exported(name: str | os.PathLike) -> bool:
    """Returns whether a name means an exported file, or a folder with the parts of a network."""
    parts = os.path.join(os.path.expanduser(name), "parity.json")
    return (str(name).endswith(EXPORTED) and ":" not in str(name)) or os.path.isfile(parts)


def open_network(name: str | os.PathLike, *, weights: bool = True) -> FlowModel:
    """Returns what `fleetflow.load` returns, or an exported file as a network."""
    return ExportedModel(name) if is_exported(name) else load(os.fspath(name), weights=weights)
