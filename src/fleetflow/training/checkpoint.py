"""What a run keeps on disk: what was asked of it (`Run`), where it stands (`Checkpoint`), which files are its own."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fleetflow.inference.device import Precision
from fleetflow.io.atomic import lock_folder, reason, remove_leftovers, write_atomically
from fleetflow.models import weights
from fleetflow.models.spec import ModelSpec
from fleetflow.registry import unknown
from fleetflow.training.dataloader import on_data
from fleetflow.training.recipe import Recipe, changed
from fleetflow.training.recipes import recipe
from fleetflow.training.recipes.finetune import FINETUNE, finetune
from fleetflow.types import FleetflowError

NOTE = "run.json"  # in the folder of a run: what was asked, and the names of the files that are its own


@dataclass(frozen=True)
class Run:
    """What was asked of a run and decides its numbers. Its checkpoint keeps it, and a resumed run may not differ."""

    recipe: str
    stage: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    start: tuple[str, ...] = ()
    root: str | None = None
    data: str | None = None
    textures: str | None = None
    precision: Precision | None = None
    seed: int | None = None
    gradient_accumulation: int | None = None
    start_samples: int | None = None  # what the start says of itself, for the header of the weights: a resumed run
    start_licenses: tuple[str, ...] | None = None  # needs its start no more

    def plan(self) -> Recipe:
        """Returns the recipe, or the one stage of it that is trained, with the settings and the data of the run."""
        kind, _, network = self.recipe.partition(":")
        plan = finetune(network) if kind == FINETUNE else recipe(self.recipe)
        plan = changed(_only(plan, self.stage) if self.stage else plan, self.settings)
        return on_data(plan, self.data) if self.data else plan

    def continued(self, known: dict[str, Any], folder: Path) -> "Run":
        """Returns what a run goes on with: what its checkpoint knows, and what is asked for where that says nothing.

        A data folder may be named anew where the old one is gone, and a single stage may be given another length.

        Raises:
            FleetflowError: anything else that is asked for differs.
        """
        run = replace(self, **known)
        plan = run.plan()
        moved = [key for key in ("root", "textures") if getattr(self, key) and _is_gone(getattr(run, key))]
        run = replace(run, **{key: getattr(self, key) for key in moved})
        asked = {key: value for key, value in vars(self).items() if value not in (None, ()) and key != "settings"}
        differences = [(key, getattr(run, key), value) for key, value in asked.items() if value != getattr(run, key)]
        free = ("steps", "validate_every") if len(plan.stages) == 1 else ("validate_every",)
        for name, value in self.settings.items():
            if name not in free and replace(run, settings={**run.settings, name: value}).plan() != plan:
                differences.append((name, run.settings.get(name, "as in the recipe"), value))
        if differences:
            what, before, new = differences[0]
            raise FleetflowError(
                f"the run in {folder} has {what} {'none' if before in (None, ()) else before}, not {new}; resume it as "
                "it is, or begin another --folder (--start takes its weights)"
            )
        return replace(run, settings={**run.settings, **self.settings})

    def with_start(self) -> "Run":
        """Returns the run with what the headers of its start say: pairs seen and licenses."""
        said = [_said(one) for one in self.start]
        seen = [one.get("samples", "") for one in said]
        samples = sum(int(count) for count in seen if count.isdecimal())
        licenses = tuple(sorted({one.get("license", "unknown") for one in said}))
        return replace(
            self,
            start_samples=samples if self.start_samples is None else self.start_samples,
            start_licenses=licenses if self.start_licenses is None else self.start_licenses,
        )


@dataclass
class Best:
    """The lowest validation EPE of a run so far, and the averaged weights that have it."""

    start: float  # the EPE before the first step
    epe: float
    step: int
    weights: dict[str, Tensor]


@dataclass
class Checkpoint:
    """All that a run needs to go on exactly: what was asked, and the state of everything that changes."""

    run: dict[str, object]  # fields of `Run`
    step: int
    skipped: int  # steps that were not learned from
    recent: list[list[float]]  # loss and EPE of the last steps
    random: Tensor  # the state of torch's generator, for networks that draw numbers
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    scaler: dict[str, object]
    optimizers: list[dict]
    best: dict | None = None

    def save(self, path: Path) -> None:
        """Writes the checkpoint: temporary file, then rename."""
        write_atomically(path, partial(save_archive, vars(self)))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Returns the checkpoint in a file; nothing in it is executed, and no more memory is taken than it is long.

        Raises:
            FleetflowError: it is damaged, or something else; the message says what.
        """
        state: Any = None
        try:
            state = read_archive(path)
            lacks = _lacks(state)
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, OSError, ...
            lacks = reason(error)[:80]
        if lacks:
            raise damaged(path, lacks)
        return cls(**{key: state[key] for key in _KINDS if key in state})

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the network."""
        return {key.removeprefix("module."): value for key, value in self.average.items() if key != "n_averaged"}


_TEXT, _COUNT = (str, type(None)), (int, type(None))
_RUN_KINDS = {
    "recipe": str, "stage": _TEXT, "settings": dict, "start": (list, tuple), "root": _TEXT, "data": _TEXT,
    "textures": _TEXT, "precision": _TEXT, "seed": _COUNT, "gradient_accumulation": _COUNT, "start_samples": _COUNT,
    "start_licenses": (list, tuple, type(None)),
}  # fmt: skip
_KINDS = {
    "run": dict, "step": int, "skipped": int, "recent": list, "random": Tensor, "model": dict, "average": dict,
    "scaler": dict, "optimizers": list, "best": (dict, type(None)),
}  # fmt: skip


def _lacks(state: object) -> str | None:
    """Says what the content of a file lacks as a checkpoint, or returns None and makes its lists tuples of `Run`."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    for key, kind in _KINDS.items():
        if key not in state and key != "best":
            return f"it has no {key}"
        if not isinstance(state.get(key), kind):
            return f"its {key} is a {type(state[key]).__name__}"
    if problem := _run_lacks(state["run"]):
        return problem
    numbers = [number for row in state["recent"] for number in (row if isinstance(row, list | tuple) else [None])]
    if not all(isinstance(number, float) for number in numbers) or len(numbers) != 2 * len(state["recent"]):
        return "its recent losses are no numbers"
    tensors = [*state["model"].values(), *state["average"].values()]
    if not all(isinstance(value, Tensor) for value in tensors) or state["step"] < 0 or state["skipped"] < 0:
        return "its weights are no tensors or its step is below 0"
    best = state.get("best")
    if best is not None and set(best) != {item.name for item in dataclasses.fields(Best)}:
        return "its best weights are not whole"
    state["run"] = _with_tuples(state["run"])
    return None


def _run_lacks(run: dict) -> str | None:
    """Says what is wrong with the fields of a `Run` as they were read from a file, or returns None."""
    for key in ("recipe", "seed", "gradient_accumulation"):
        if key not in run:
            return f"it has no {key}"
    for key, value in run.items():
        if key not in _RUN_KINDS or not isinstance(value, _RUN_KINDS[key]) or isinstance(value, bool):
            return f"its {key} is a {type(value).__name__}"
    words = [*run.get("start", ()), *(run.get("start_licenses") or ())]
    words += [word for pair in run.get("settings", {}).items() for word in pair]
    return None if all(isinstance(word, str) for word in words) else "its start or settings are no words"


def _with_tuples(run: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in run.items()}


def read_archive(path: Path) -> Any:
    """Returns what `torch.save` wrote into a file, on the CPU; nothing is executed.

    The sizes of its parts are held against the length of the file before memory is taken for them.

    Raises:
        ValueError: it is no archive, or claims more than it holds. torch raises much else for damaged files.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError("it is not what torch.save writes")
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > path.stat().st_size:
        raise ValueError("it claims more than it holds")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_archive(state: object, path: Path) -> None:
    """Writes with torch.save, by way of memory, so that a full disk is an OSError; torch itself raises RuntimeError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())


def damaged(path: Path, why: str) -> FleetflowError:
    """Returns the error for a checkpoint that cannot be used."""
    start = path.with_name("weights.safetensors")
    return FleetflowError(
        f"{path} is no whole checkpoint of a run ({why}); put a copy there, or begin another --folder "
        f"with --start NETWORK:{start}"
    )


def _only(plan: Recipe, name: str) -> Recipe:
    """The recipe with the stage called `name` alone; one that follows another starts from given weights."""
    names = [stage.name for stage in plan.stages]
    if name not in names:
        raise unknown("stage of this recipe", name, names)
    stage = plan.stages[names.index(name)]
    return replace(plan, stages=(replace(stage, needs_weights=stage.needs_weights or stage is not plan.stages[0]),))


def _is_gone(folder: str | None) -> bool:
    return folder is not None and not Path(folder).exists()


def _said(start: str) -> dict[str, str]:
    """What weights given as a start say of themselves; nothing where they are no file of ours."""
    try:
        spec = ModelSpec.parse(start)
        return weights.header(spec.path or weights.shipped(spec.network))
    except FleetflowError:
        return {}


# ---- the folder of a run ----


@contextmanager
def own_folder(folder: Path, what: str) -> Iterator[None]:
    """Locks the folder of a run, and takes away what killed runs left in it; one that stays empty is not left behind."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetflowError(f"{folder} cannot be a folder ({reason(error)}); choose another --folder") from None
    try:
        with lock_folder(folder, what):
            remove_leftovers(folder)
            yield
    finally:
        if new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def asked_before(folder: Path) -> dict[str, object] | None:
    """Returns the fields of `Run` from the note of a run that has no checkpoint yet; None where there is no note."""
    note = _note(folder)
    return None if note is None else note["run"]


def claim(folder: Path, run: Run, plan: Recipe, world: int, *, begun: bool) -> None:
    """Writes the note that says which files of the folder are those of the run.

    Args:
        folder: of the run.
        run: what was asked.
        plan: its recipe.
        world: the number of processes.
        begun: there is a checkpoint of the run.

    Raises:
        FleetflowError: a file has the name of one that the run will write, and no run wrote it.
    """
    names = ["checkpoint.pt", "log.jsonl", "weights.safetensors"]
    names += [f"{stage.name}.safetensors" for stage in plan.stages] if len(plan.stages) > 1 else []
    names += [f"bad_batch-{rank}.pt" for rank in range(world)]
    note = _note(folder)
    known = names if begun and note is None else note["files"] if note else []
    for name in (NOTE, *names):
        path = folder / name
        if path.is_symlink() or path.exists():
            own = note is not None if name == NOTE else name in known and _looks_own(path, run)
            if not own:
                raise FleetflowError(
                    f"{path} is there, and no run of {run.recipe} wrote it; move it away, or choose another --folder"
                )
    content = {"command": "train", "run": dataclasses.asdict(run), "files": sorted({*known, *names})}
    text = json.dumps(content, indent=1)
    write_atomically(folder / NOTE, lambda temporary: temporary.write_text(text))


def _note(folder: Path) -> dict | None:
    """The note in a folder; None where there is none, or another file of this name."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        note = json.loads((folder / NOTE).read_text())
        if note["command"] == "train" and _run_lacks(note["run"]) is None:
            return {"run": _with_tuples(note["run"]), "files": [str(name) for name in note["files"]]}
    return None


def _looks_own(path: Path, run: Run) -> bool:
    """Whether the content of a file may be that of the run; what was put in the place of its file is not."""
    if path.suffix == ".safetensors":
        with suppress(FleetflowError):
            return weights.header(path).get("recipe") == run.recipe
        return False
    if path.name == "log.jsonl":
        with suppress(OSError, ValueError, TypeError):
            with path.open(errors="replace") as file:
                line = file.readline()
            return not line.endswith("\n") or "step" in json.loads(line)
        return False
    return path.is_file()


def is_written(path: Path, step: int) -> bool:
    """Whether a file holds whole weights of this step."""
    with suppress(FleetflowError):
        return weights.header(path).get("step") == str(step)
    return False
