"""The catalog of networks: what each costs, which checkpoints it reads, under which licenses, from which paper.

`fleetflow models` prints it. `python -m fleetflow.models.catalog docs/networks.md` writes that page and
`multiply_adds.json`, so that the command need not count the operations of all networks again; a test checks both.
"""

import inspect
import json
import re
import sys
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fleetflow.models.weights import header, shipped, without_memory
from fleetflow.ops.kernels import reference
from fleetflow.registry import models
from fleetflow.types import FleetflowError

COUNTED = Path(__file__).with_name("multiply_adds.json")  # name -> multiply-adds
SIZE = (448, 1024)  # height and width of the frames for which operations are counted
FEW = 3  # refinement iterations that are counted; each of the others costs as much as the last of these


class Row(NamedTuple):
    """What the catalog says of one network; "" and None where there is nothing to say."""

    name: str
    parameters: int
    multiply_adds: int  # of a pair of frames of SIZE, at the published number of iterations
    iterations: int | None  # the published number of refinement iterations
    grid: int | None  # stride of the flow that the network computes
    weights: str  # size and license of our weights in the package
    reads: str  # whose checkpoints
    license: str  # of the published code and checkpoints
    paper: str


def rows(fresh: bool = False) -> list[Row]:
    """Returns one row for each registered network, by name; `fresh` counts the multiply-adds of all of them anew."""
    return [row(name, fresh) for name in models]


def row(name: str, fresh: bool = False) -> Row:
    """Returns the row of one network; its multiply-adds are those that are stored, or `fresh` ones."""
    model = without_memory(name)
    summary = inspect.cleandoc(models[name].__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return Row(
        name=name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        multiply_adds=count(name) if fresh else multiply_adds(name),
        iterations=model.iterations,
        grid=model.grid,
        weights=_weights(name),
        reads=summary.partition("reads ")[2].removeprefix("the ").removesuffix("."),
        license=model.license,
        paper=model.paper,
    )


def _weights(name: str) -> str:
    try:
        path = shipped(name)
    except FleetflowError:
        return ""
    return f"{path.stat().st_size / 1e6:.1f} MB, {header(path)['license']}"


def multiply_adds(name: str) -> int:
    """Returns the multiply-adds that are stored for a network; counts those of one for which none are."""
    stored = json.loads(COUNTED.read_text()) if COUNTED.is_file() else {}
    return stored[name] if name in stored else count(name)


def count(name: str) -> int:
    """Returns the multiply-adds of one prediction for frames of SIZE, without computing it.

    Counted are convolutions, matrix products and correlations (which are defined as means of products); left out are
    interpolation, normalization and activations.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # these two take seconds to import
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode():  # tensors with a shape and a device but without data
        model = models[name]().eval()
        frame = torch.zeros(1, 3, *SIZE)

        def cost(iterations: int | None) -> int:
            counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mean: _mean})
            with counter, _Yes(), reference(), torch.no_grad():
                model(frame, frame, iterations=iterations)
            return counter.get_total_flops() // 2

        if model.iterations is None or model.iterations <= FEW:
            return cost(model.iterations)
        few = cost(FEW)
        return few + (model.iterations - FEW) * (few - cost(FEW - 1))


def _mean(shape: torch.Size, *arguments, out_shape: torch.Size) -> int:
    return 2 * prod(shape)


class _Yes(TorchDispatchMode):
    """Answers 1 when the host asks for a value that does not exist: all is finite, something is left to do."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        return function(*arguments, **(keywords or {}))


COLUMNS = (
    "network",
    "parameters",
    "G multiply-adds",
    "iterations",
    "stride",
    "our weights",
    "reads",
    "license",
    "paper",
)


def cells(row: Row) -> tuple[str, ...]:
    """Returns the row as text, one cell for each of COLUMNS."""
    billions = row.multiply_adds / 1e9
    return (
        row.name,
        f"{row.parameters:,}",
        f"{billions:.1f}" if billions >= 10 else f"{billions:.2f}",
        str(row.iterations or ""),
        str(row.grid or "?"),
        row.weights,
        row.reads or "none published",
        row.license or "?",
        row.paper or "?",
    )


def as_json(rows: list[Row]) -> str:
    """Returns the rows as JSON: a list of objects with the fields of Row."""
    return json.dumps([row._asdict() for row in rows], indent=2)


PAGE = """# Networks

`fleetflow models` prints this table; `python -m fleetflow.models.catalog docs/networks.md` writes it.

* *Multiply-adds* are those of one pair of {0}x{1} at the published number of refinement iterations: convolutions, matrix
  products and correlations. Interpolation, normalization and activations are left out, as is the enlargement of flows
  that nobody reads (RAFT's before the last step). Published "FLOPs" often are multiply-adds, too.
* *Stride* is that of the flow which the network computes before it is enlarged to the size of the frames.
* *Our weights* come with the package, under the license named.
* *Reads*: `fleetflow.load("NETWORK:PATH")` takes these checkpoints. *License* is that of their authors' code and, where
  it differs, of the checkpoints; the code here is written anew, under Apache-2.0.

"""


def page(rows: list[Row]) -> str:
    """Returns the catalog as a page of Markdown, papers linked to arXiv."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|--:|--:|--:|--:|---|---|---|---|"]
    for row in rows:
        name, *middle, paper = cells(row)
        paper = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
        lines.append("| " + " | ".join((f"`{name}`", *middle, paper)) + " |")
    return PAGE.format(*SIZE) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    counted = rows(fresh=True)
    COUNTED.write_text(json.dumps({row.name: row.multiply_adds for row in counted}, indent=2) + "\n")
    Path(sys.argv[1]).write_text(page(counted))
