"""Weights: load a network by name, from the package, or from a published or our own checkpoint; save; never execute.

Our format is safetensors with a header that says everything needed to use the weights: the network, where they come
from, their license, their scores and a checksum.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleetflow.io.atomic import write_atomically
from fleetflow.io.names import check_utf8
from fleetflow.models.base import FlowModel
from fleetflow.models.caffe import read_caffemodel
from fleetflow.models.spec import EXPORTED, ModelSpec
from fleetflow.models.torch_files import Ignored, Stored, TorchFile, module_state
from fleetflow.registry import models
from fleetflow.types import FleetflowError

FLOW_SCALE = 20  # pixels per unit of flow in which published networks are trained, unless a checkpoint says otherwise
CHECKSUM = "sha256"  # in the header: of names, types, shapes and numbers, see `checksum`
DEPTH = 4  # of dictionaries in dictionaries that are looked through for weights
FEW = 4  # members of a list that may be state dictionaries
WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"


def load(name: str | Path | ModelSpec, *, weights: bool = True) -> FlowModel:
    """Returns a network in evaluation mode.

    Args:
        name: what `ModelSpec.parse` reads: "fastflownet" takes our own weights from the package; "fastflownet:PATH"
            reads a checkpoint (.safetensors, .caffemodel, or whatever torch.save wrote); a path by itself works where
            the file names its network (ours do) or can be recognized.
        weights: False returns the network with fresh random weights.

    Raises:
        FleetflowError: for an unknown name, a missing or damaged file, and a checkpoint that does not fit.
    """
    spec = name if isinstance(name, ModelSpec) else ModelSpec.parse(name)
    if spec.exported:
        kinds = ", ".join(EXPORTED)
        raise FleetflowError(f"{spec.path} is an exported model ({kinds}); open it with fleetflow.Session")
    if not weights:
        if spec.path:
            raise FleetflowError(f"weights=False and a checkpoint ({spec.path}) were both asked for; drop one")
        return models[spec.network]().eval()
    path = spec.path or shipped(spec.network)
    candidates = list(_candidates(path))
    variant = spec.network or _network_of(path, candidates)
    model = models[variant]()
    model.load_state_dict(_fitting(model, variant, candidates, path))
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FleetflowError(f"{path} is damaged: {key} has values that are not finite; get the file again")
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


def save(model: nn.Module, path: str | Path, header: Mapping[str, object], dtype: torch.dtype = torch.float16) -> None:
    """Writes the model's weights in our format: temporary file, then rename.

    Args:
        header: at least "network" and "license"; values that are not strings are stored as JSON. A checksum is added.
    """
    if not isinstance(model, nn.Module) or not isinstance(header, Mapping):
        given = f"model is a {type(model).__name__} and header a {type(header).__name__}"
        raise FleetflowError(f"{given}; expected a network, and what is to be said of its weights by name")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FleetflowError(f"dtype is {dtype!r}; expected torch.float16, torch.float32 or another of floating point")
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
    text = {key: _in_utf8(value if isinstance(value, str) else json.dumps(value)) for key, value in header.items()}
    text[CHECKSUM] = checksum(state)
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=text))


def _in_utf8(text: str) -> str:
    """The text; of the name of a file whose bytes are not UTF-8, these as \\xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def checksum(state: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of names, types, shapes and numbers, in hexadecimal."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def header(path: str | Path) -> dict[str, str]:
    """Returns the header of a .safetensors file; raises FleetflowError if it is none."""
    with _open(path) as file:
        return dict(file.metadata() or {})


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors: its name says so, unless what `torch.save` writes is in it, or its bytes."""
    if not path.is_file():
        return path.suffix == ".safetensors"
    with path.open("rb") as file:
        begin = file.read(10)
    if path.suffix == ".safetensors":
        return not begin.startswith(b"PK\x03\x04")
    return begin[8:] == b'{"'


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, in float32; code in the file is never executed.

    Reads .safetensors, what `torch.save` wrote, and .caffemodel, whose arrays are called by their layer and a number:
    "conv1.0", its weights, "conv1.1", its bias. Of a file that holds several state dictionaries the first is taken:
    "state_dict" and "model" come before averaged weights.
    """
    return next(_candidates(Path(path)))


def _candidates(path: Path) -> Iterator[dict[str, Tensor]]:
    """Yields the state dictionaries that a file holds, likeliest first, at least one."""
    if is_safetensors(path):
        with _open(path) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            told = (file.metadata() or {}).get(CHECKSUM)
        if told is not None and told != checksum(state):
            raise FleetflowError(f"{path} is damaged: its numbers do not have the checksum of its header; get it again")
        states = iter([state])
    elif path.suffix == ".caffemodel":
        layers = read_caffemodel(path)
        arrays = {f"{layer}.{k}": torch.from_numpy(array) for layer in layers for k, array in enumerate(layers[layer])}
        states = iter([arrays])
    else:
        states = _torch_states(path)
    for state in states:
        yield {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _open(path: str | Path):
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FleetflowError(f"there is no file {path}; give the path of a checkpoint")
    check_utf8(path, "safetensors")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FleetflowError(f"{path} is no complete .safetensors file ({error}); fetch it again") from None


def _torch_states(path: Path) -> Iterator[dict[str, Tensor]]:
    if not path.is_file():
        raise FleetflowError(f"there is no file {path}; give the path of a checkpoint")
    if path.name.endswith(".index.json"):
        raise FleetflowError(f"{path} only lists the parts of a checkpoint; join them, and save one file")
    file = TorchFile(path)
    content = file.content
    found = sorted(_dictionaries(content, (), DEPTH), key=lambda item: _rank(item[0]))
    if not found:
        code = "; it carries code, which fleetflow never runs" if _has_code(content) else ""
        code = "; its tensors have an order, but no names" if _has_no_names(content) else code
        raise FleetflowError(
            f"{path} holds no state dictionary{code}; expected names with dense tensors of real numbers, as "
            "torch.save(model.state_dict(), path) writes them"
        )
    scale = content.get("div_flow") if isinstance(content, dict) else None
    for _, stored in found:
        state = {key: file.tensor(value) for key, value in stored.items()}
        if isinstance(scale, int | float) and scale != FLOW_SCALE:
            state["div_flow"] = torch.tensor(float(scale))
        yield state


def _dictionaries(content: object, place: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields the dictionaries of names and tensors, however they are nested, with the keys that lead there."""
    if isinstance(content, list | tuple) and len(content) <= FEW:  # as (state, epoch)
        content = {str(k): value for k, value in enumerate(content) if isinstance(value, dict | Ignored)}
    if isinstance(content, Ignored):  # torch.save(model)
        content = module_state(content)
    if not isinstance(content, dict) or not content or depth == 0:
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Stored) and isinstance(key, str)}
    rest = [value for key, value in content.items() if key not in tensors]
    if len(tensors) > len(content) / 2 and all(isinstance(value, int | float | str | None) for value in rest):
        yield place, tensors
        return
    for key, value in content.items():
        if not any(word in str(key).lower() for word in ("optim", "sched", "scaler")):
            yield from _dictionaries(value, (*place, str(key)), depth - 1)


def _rank(place: tuple[str, ...]) -> int:
    """Which dictionary comes first: the weights themselves, then others, then averaged ones."""
    text = ".".join(place).lower()
    if any(word in text for word in ("ema", "average", "swa")):
        return 2
    return 0 if not place or place[-1] in ("state_dict", "model", "model_state_dict", "net", "network") else 1


def _has_code(content: object) -> bool:
    values = content.values() if isinstance(content, dict) else [content]
    return any(isinstance(value, Ignored) for value in values)


def _has_no_names(content: object) -> bool:
    """Whether it is, or holds, a list of tensors, such as the "shadow_params" of averaged weights."""
    parts = [content, *(content.values() if isinstance(content, dict) else ())]
    return any(isinstance(part, list | tuple) and any(isinstance(each, Stored) for each in part) for part in parts)


def _spellings(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the state with its names as they are, then without what wrappers put before or between them.

    "module." is DataParallel's and AveragedModel's, which counts in "n_averaged"; "_orig_mod." is torch.compile's,
    "_fsdp_wrapped_module." FSDP's, "_checkpoint_wrapped_module." that of layers which save memory; a LightningModule
    calls the network as its author did, and may have other parts.
    """
    yield state
    state = {re.sub(rf"(^|\.)(?:{WRAPPERS})\.", r"\1", _once(key)): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key != "n_averaged"}
    yield state
    for _ in range(2):
        heads = [key.partition(".")[0] for key in state if "." in key]
        for head in sorted(dict.fromkeys(heads), key=lambda head: (_rank((head,)), -heads.count(head)))[:4]:
            inner = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(head + ".")}
            if len(inner) > 1:
                yield inner
        if not heads:
            return
        first = max(set(heads), key=heads.count)
        state = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(first + ".")}


def _once(key: str) -> str:
    """The key with doubled wrappers ("module.module.") made one."""
    return re.sub(rf"(?:(?:{WRAPPERS})\.)+", lambda found: found.group().split(".")[0] + ".", key)


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


def _read_as(model: FlowModel, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state with the names of the network, in the spelling that fits best, and what is left of differences."""
    best: tuple[dict[str, Tensor], list[str]] | None = None
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    translate = type(model).translate
    for spelling in _spellings(state):
        own = spelling if translate is None else translate(spelling)
        if counters and not counters.keys() & own.keys():  # files of torch before 0.4.1, which nobody needs
            own = {**own, **{key: torch.zeros_like(value, device="cpu") for key, value in counters.items()}}
        found = differences(model, own)
        if best is None or len(found) < len(best[1]):
            best = own, found
        if not found:
            break
    assert best is not None
    return best


def _fitting(model: FlowModel, variant: str, candidates: list[dict[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """The state that fits the network; raises FleetflowError with the likely network and the first differences."""
    read = [_read_as(model, state) for state in candidates]
    state, found = min(read, key=lambda each: len(each[1]))
    if not found:
        return state
    best, count = _nearest(candidates)
    guess = "no network here"
    if count < len(state) / 2:
        guess = best if best != variant else f"{variant}, changed"
    raise FleetflowError(
        f"{path} does not fit {variant} ({len(found)} differences: {'; '.join(found[:3])}); it looks like {guess}"
    )


def _nearest(candidates: list[dict[str, Tensor]]) -> tuple[str, int]:
    """The network that differs least from what a file holds, and by how much."""
    near = {name: min(len(_read_as(without_memory(name), state)[1]) for state in candidates) for name in models}
    best = min(near, key=lambda name: near[name])
    return best, near[best]


@cache
def without_memory(name: str) -> FlowModel:
    """Returns a network whose tensors have shapes and no values, the same one at each call."""
    with torch.device("meta"):
        return models[name]()


def _network_of(path: Path, candidates: list[dict[str, Tensor]]) -> str:
    """The network that a path by itself stands for: that of the header, or the one which the tensors fit."""
    named = header(path).get("network", "") if is_safetensors(path) else ""
    if named:
        return named
    best, count = _nearest(candidates)
    if count:
        raise FleetflowError(f"{path} does not name its network; call it as NETWORK:{path}")
    warnings.warn(f"{path} does not name its network; it is read as {best}", stacklevel=3)
    return best
