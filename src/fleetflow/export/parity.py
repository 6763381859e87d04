"""The proof that an exported file computes what the network computes; a file that does not is removed."""

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fleetflow.export.calibration import generated
from fleetflow.export.graph import Sizes
from fleetflow.export.session import Session
from fleetflow.io.images import read_image
from fleetflow.models.base import FlowModel
from fleetflow.types import FleetflowError

ODD = ((133, 171), (190, 251))  # heights and widths, multiples of nothing, for files that take any
SEEN = 1e-3  # pixels, mean length: a network whose flow is shorter predicts zero, and proves nothing of its file
FILMED = ("pan",)  # the class of footage that files are tried on: everything moves, through a camera and a codec


class Limit(NamedTuple):
    """How far flows may be apart, in pixels: the largest distance, and the mean over a pair."""

    largest: float
    mean: float


LIMITS = {
    "fp32": Limit(1e-2, 1e-3),
    "half": Limit(float("inf"), 0.05),  # float16 in convolutions
    "bf16": Limit(float("inf"), 0.2),  # stated: 8 bits in convolutions alone move long flows by up to 0.1 px
    "int8": Limit(float("inf"), 0.5),  # stated; FastFlowNet's EPE on real pairs grows by 0.04 px (docs/exported.md)
}


class Row(NamedTuple):
    """One comparison: a pair or a batch, in one call of the session.

    Attributes:
        pair: what was compared.
        size: pairs, height, width.
        call: number of the call with these pictures, from 1 on.
        flow: mean length of the network's flow, pixels.
        largest, p999, mean: distance of the flows, pixels; p999 is the 99.9th percentile.
        epe: end-point error of the exported file against the truth, less that of the network; None without truth.
    """

    pair: str
    size: tuple[int, int, int]
    call: int
    flow: float
    largest: float
    p999: float
    mean: float
    epe: float | None


def pairs(sizes: Sizes) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields name, image1, image2 (uint8 [N, H, W, 3]) and the true flow [N, H, W, 2] where it is known.

    The example of the package and pairs of footage, at two sizes and two numbers of pairs where those are open.
    """
    folder = Path(str(resources.files("fleetflow") / "example"))
    example = [read_image(folder / f"frame{k}.png") for k in (1, 2)]
    for k, size in enumerate([sizes.size] if sizes.size else ODD):
        image1, image2 = (_cut(image, *size)[None] for image in example)
        yield "example", image1, image2, None
        several = generated(size, sizes.batch or 2 + k, FILMED)
        image1, image2, truth = (np.concatenate(parts) for parts in zip(*several))
        yield "footage", image1, image2, truth


def _cut(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture, repeated and cut to a size."""
    rows, columns = -(-height // image.shape[0]), -(-width // image.shape[1])
    return np.ascontiguousarray(np.tile(image, (rows, columns, 1))[:height, :width])


def compare(session: Session, model: FlowModel, sizes: Sizes, iterations: int | None) -> list[Row]:
    """Returns how far the session's flows are from those of the network in float32, each pair twice in one session."""
    rows = []
    for name, image1, image2, truth in pairs(sizes):
        if sizes.batch == 1:
            image1, image2, truth = image1[:1], image2[:1], None if truth is None else truth[:1]
        frames = [torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255 for image in (image1, image2)]
        with torch.inference_mode():
            expected = model(*frames, iterations=iterations).flow.permute(0, 2, 3, 1).float().numpy()
        length = float(np.linalg.norm(expected, axis=-1).mean())
        for call in (1, 2):
            found = session(image1, image2)
            apart = np.linalg.norm(found - expected, axis=-1)
            apart = np.where(np.isfinite(apart), apart, np.inf)
            change = None if truth is None else float(_epe(found, truth) - _epe(expected, truth))
            largest, p999 = float(apart.max()), float(np.quantile(apart, 0.999))
            rows.append(Row(name, image1.shape[:3], call, length, largest, p999, float(apart.mean()), change))
    return rows


def _epe(flow: np.ndarray, truth: np.ndarray) -> float:
    return np.linalg.norm(flow - truth, axis=-1).mean()


def passes(rows: list[Row], limit: Limit) -> bool:
    """Returns whether all rows keep the limit."""
    return all(row.largest <= limit.largest and row.mean <= allowed(row, limit) for row in rows)


def allowed(row: Row, limit: Limit) -> float:
    """Returns the largest mean distance in pixels: less for flows under a pixel, to which a file of zeros would be near."""
    return limit.mean * min(1.0, row.flow)


COLUMNS = ["pair", "size", "call", "flow, px", "largest", "99.9 %", "mean", "EPE, change"]


def cells(row: Row) -> list[str]:
    """Returns the row as text, one cell for each of COLUMNS."""
    numbers = [f"{row.flow:.2g}", *(f"{value:.2e}" for value in (row.largest, row.p999, row.mean))]
    epe = "" if row.epe is None else f"{row.epe:+.1e}"
    return [row.pair, "x".join(map(str, row.size)), str(row.call), *numbers, epe]


def check(
    path: Path, model: FlowModel, sizes: Sizes, iterations: int | None, kind: str, where: Callable[[str], str | None]
) -> list[Row]:
    """Returns the rows of a file that is equal to the network, and writes them beside it as NAME.parity.json.

    Args:
        path: the file, or the folder with three parts.
        model: the network, in float32.
        sizes: of the pictures that the file takes.
        iterations: of refinement.
        kind: "fp32", "half", "bf16" or "int8", which choose the limit.
        where: asked for the first layer that differs on a pair; None where the runtime cannot tell.

    Raises:
        FleetflowError: where it is not equal, and where the network's own flow is zero. The caller removes the file.
    """
    rows = compare(Session(path, precision="bf16" if kind == "bf16" else None), model, sizes, iterations)
    limit = LIMITS[kind]
    if any(row.flow < SEEN for row in rows):
        least = min(rows, key=lambda row: row.flow)
        raise FleetflowError(
            f"the network's own flow is {least.flow:.2g} px in the mean ({least.pair}), so any file of zeros would equal "
            f"it; expected {SEEN:g} px or more: give trained weights; nothing was written"
        )
    if not passes(rows, limit):
        worst = max(rows, key=lambda row: max(row.largest / limit.largest, row.mean / allowed(row, limit)))
        layer = where(worst.pair)
        raise FleetflowError(
            f"{path.name} is not equal to the network: {worst.largest:.3g} px apart at most, {worst.mean:.3g} in the mean "
            f"({worst.pair}, {'x'.join(map(str, worst.size))}); allowed are {limit.largest:g} and {allowed(worst, limit):.3g}"
            f"{f'; the first layer that differs is {layer}' if layer else ''}; nothing was written"
        )
    return rows


def as_json(rows: list[Row], about: dict, kind: str) -> str:
    """Returns the table as JSON, with what was compared and the limits."""
    limit = {name: value for name, value in LIMITS[kind]._asdict().items() if value != float("inf")}
    return json.dumps({"about": about, "limit": limit, "rows": [row._asdict() for row in rows]}, indent=1) + "\n"


def first_difference(program, onnx: Path, pictures: list[np.ndarray], tolerance: float = 1e-2) -> str | None:
    """Returns the first convolution or activation at which an ONNX file leaves its program, None where there is none.

    Both name their values alike: the file is given the values of all these layers as further outputs.
    """
    import onnx as library
    import onnxruntime

    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor) and ("conv" in node.name or "relu" in node.name):
                values[node.name] = value.numpy().copy()  # what follows may write into it
            return value

    module = program.run_decompositions({}).module()  # the names that the exporter gives
    with torch.inference_mode():
        Recorder(module).run(*(torch.from_numpy(picture) for picture in pictures))
    model = library.load(str(onnx))
    known = {name for node in model.graph.node for name in node.output}
    names = [name for name in values if name in known]
    model.graph.output.extend(library.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Any = session.run(names, dict(zip(("image1", "image2"), pictures)))
    for name, value in zip(names, found):
        scale = max(float(np.abs(values[name]).max()), 1e-6)
        if value.shape != values[name].shape or float(np.abs(value - values[name]).max()) > tolerance * scale:
            return name
    return None
