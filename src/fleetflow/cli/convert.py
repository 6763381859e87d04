"""The command `fleetflow convert`."""

from pathlib import Path
from typing import Literal

from fleetflow.cli.options import Positional
from fleetflow.types import FleetflowError


def convert(
    checkpoint: Positional[Path],
    variant: Positional[str],
    output: Positional[Path],
    /,
    license: str = "unknown",
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write a published checkpoint in our format, .safetensors with a header.

    Args:
        checkpoint: the published file; nothing in it is executed.
        variant: the network it belongs to, such as fastflownet.
        output: the file to write.
        license: of the weights, as their author states it.
        precision: of the stored weights.

    Examples:
        fleetflow convert raft-things.pth raft raft.safetensors --license BSD-3-Clause
        fleetflow convert fastflownet.pth fastflownet fastflownet.safetensors --precision fp16
    """
    import torch

    from fleetflow.cli.outputs import make_room
    from fleetflow.models.weights import load, save

    if output.suffix != ".safetensors":
        raise FleetflowError(f"{output} does not end in .safetensors; name the output so")
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise FleetflowError(f"{output} is the checkpoint itself; choose another output")
    make_room(output)
    model = load(f"{variant}:{checkpoint}")
    header = {"network": variant, "license": license, "source": checkpoint.name}
    save(model, output, header, dtype=torch.float32 if precision == "fp32" else torch.float16)
    print(output)
