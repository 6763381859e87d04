"""Weights: load a network by name, from the package, or from a published or our own checkpoint; save; never execute.

Our format is safetensors with a header that says everything needed to use the weights: the network, where they come
from, their license and their scores.
"""

import json
import pickle
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleetflow.io.atomic import write_atomically
from fleetflow.models.base import FlowModel
from fleetflow.models.caffe import read_caffemodel
from fleetflow.registry import models
from fleetflow.types import FleetflowError

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".caffemodel")  # of a name that is a bare path
FLOW_SCALE = 20  # pixels per unit of flow in which published networks are trained, unless a checkpoint says otherwise


def load(name: str | Path, *, weights: bool = True) -> FlowModel:
    """Returns a network in evaluation mode.

    name: "fastflownet" takes our own weights from the package; "fastflownet:PATH" reads a checkpoint (.safetensors,
    .caffemodel, or whatever torch.save wrote); a bare path to one of our .safetensors files works too: its header
    names the network.
    weights: False returns the network with fresh random weights.
    Raises FleetflowError for an unknown name, a missing or damaged file, and a checkpoint that does not fit.
    """
    name = str(name)
    if "+" in name and all(part.partition(":")[0] in models for part in name.split("+")):
        raise FleetflowError(f"{name} names several networks; blends are gone (docs/weights.md): name one")
    variant, _, path = name.partition(":")
    if name.endswith(SUFFIXES) and (not path or Path(name).is_file()):
        path = name
        variant = header(path).get("network", "") if path.endswith(".safetensors") else ""
        if not variant:
            raise FleetflowError(f"{path} does not name its network; call it as NETWORK:{path}")
    model = models[variant]()
    if weights:
        file = path or shipped(variant)
        state = _without_prefix(read_state(file))
        _check_fits(model, variant, state, str(file))
        model.load_state_dict(_translated(model, state))
    elif path:
        raise FleetflowError(f"weights=False and a checkpoint ({path}) were both asked for; drop one")
    return model.eval()


def shipped(variant: str) -> Path:
    """Returns the path of the package's own weights for a network; raises FleetflowError where there are none."""
    path = Path(str(resources.files("fleetflow") / "weights" / f"{variant}.safetensors"))
    if not path.is_file():
        raise FleetflowError(
            f"the package has no weights for {variant}; give a checkpoint as {variant}:PATH, train some (`fleetflow recipes`), "
            "or take random ones (weights=False in Python)"
        )
    return path


def save(model: nn.Module, path: str | Path, header: dict[str, object], dtype: torch.dtype = torch.float16) -> None:
    """Writes the model's weights in our format: temporary file, then rename.

    header: at least "network" and "license"; values that are not strings are stored as JSON.
    """
    for key in ("network", "license"):
        if key not in header:
            raise FleetflowError(f'the header of {path} lacks "{key}"; weights must say what they are')
    # Cloned: RAFT's residual blocks hold one tensor under two published names, and safetensors shares no memory.
    state = {
        key: value.detach()
        .to("cpu", dtype if value.is_floating_point() else value.dtype)
        .clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=text))


def header(path: str | Path) -> dict[str, str]:
    """Returns the header of a .safetensors file; raises FleetflowError if it is none."""
    with _open(path) as file:
        return dict(file.metadata() or {})


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, in float32; code in the file is never executed.

    Reads .safetensors, what `torch.save` wrote (a state dictionary, bare or under "state_dict" or "model"), and
    .caffemodel, whose arrays are called by their layer and a number: "conv1.0", its weights, "conv1.1", its bias.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with _open(path) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
    elif path.suffix == ".caffemodel":
        layers = read_caffemodel(path)
        state = {f"{layer}.{k}": torch.from_numpy(array) for layer in layers for k, array in enumerate(layers[layer])}
    else:
        state = _read_torch(path)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _open(path: str | Path):
    if not Path(path).is_file():
        raise FleetflowError(f"there is no file {path}; give the path of a checkpoint")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FleetflowError(f"{path} is no complete .safetensors file ({error}); fetch it again") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FleetflowError(f"there is no file {path}; give the path of a checkpoint")
    try:
        with torch.serialization.safe_globals([(_Dropped, name) for name in DROPPED]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FleetflowError(
            f"{path} is no plain checkpoint, it is damaged or carries code, which fleetflow never runs; "
            "save its state_dict() alone with torch.save"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FleetflowError(
            f"{path} cannot be read as a checkpoint ({reason}); expected what torch.save wrote"
        ) from None
    flow_scale = content.get("div_flow") if isinstance(content, dict) else None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, content.items())):
        raise FleetflowError(f"{path} holds no state dictionary; expected names with dense tensors of real numbers")
    if isinstance(flow_scale, int | float) and flow_scale != FLOW_SCALE:
        content = {**content, "div_flow": torch.tensor(float(flow_scale))}
    return content


class _Dropped:
    """Stands for an object that a checkpoint carries beside its tensors: its contents are thrown away."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# Scores of numpy's types and the arguments of a command line; in place of these classes `_Dropped` is made.
DROPPED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


def _is_named_tensor(item: tuple) -> bool:
    key, value = item
    if not (isinstance(key, str) and isinstance(value, Tensor)):
        return False
    odd = value.is_meta or value.is_quantized or value.is_nested or value.is_complex()
    return value.layout == torch.strided and not odd


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the "module." that DataParallel puts before every name."""
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def differences(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Returns one phrase for each name or shape in which the checkpoint differs from the network."""
    own = model.state_dict()
    found = [f"{key} is missing" for key in own if key not in state]
    found += [f"{key} is not of this network" for key in state if key not in own]
    found += [
        f"{key} is {list(state[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return found


def _translated(model: FlowModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a checkpoint with the names of the network."""
    return state if model.translate is None else type(model).translate(state)


def _check_fits(model: FlowModel, variant: str, state: dict[str, Tensor], path: str) -> None:
    """Raises FleetflowError with the likely network and the first three differences unless the checkpoint fits."""
    found = differences(model, _translated(model, state))
    if not found:
        return
    near = {}
    for name in models:
        with torch.device("meta"):
            other = models[name]()
        near[name] = len(differences(other, _translated(other, state)))
    best = min(near, key=near.get)
    guess = "no network here"
    if near[best] < len(state) / 2 and best != variant:
        guess = best
    elif best == variant and near[best] < len(state) / 2:
        guess = f"{variant}, changed"
    raise FleetflowError(
        f"{path} does not fit {variant} ({len(found)} differences: {'; '.join(found[:3])}); it looks like {guess}"
    )
