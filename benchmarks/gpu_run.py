"""One command for a machine with a GPU: checks the kernels, times the networks, trains until the clock ends.

    python benchmarks/gpu_run.py prepare CARRY --photographs FOLDER    (here, with a network connection)
    python benchmarks/gpu_run.py run OUT --carry CARRY                 (there; torch and this repository are enough)
    python benchmarks/gpu_run.py run OUT --dry-run                     (anywhere: every step on the CPU, in two minutes)

`prepare` shrinks photographs to at most 20 MB and fetches the wheels that a machine with nothing but torch lacks. `run`
takes at most `--minutes` and leaves in OUT: gpu_run.json (what every phase found, written anew after each), gpu_run.log
(all that was printed) and weights.safetensors (at most 16 MB). Every phase is a process of its own with a time of its
own; one that fails or takes too long is recorded, and the next one begins.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE, HERE = ROOT / "src", ROOT / "benchmarks"
CARRIED = 20_000_000  # bytes of photographs
WEIGHTS = 16_000_000  # bytes that may come back as one file
SIDE, QUALITY = 320, 80  # of a shrunk photograph: its shorter side in pixels, and of the JPEG
# All that fleetflow imports and pytest, without torch and numpy, which a machine for torch has.
WHEELS = "pillow av safetensors tyro rich jinja2 markupsafe typeguard docstring-parser shtab typing-extensions \
markdown-it-py mdurl pygments pytest iniconfig pluggy packaging".split()
PYTHON = "3.12"  # of that machine
SPARE = 20.0  # seconds at the end for what is written last


class Phase(NamedTuple):
    """A part of the run: what is started, and for how long at most."""

    name: str
    command: list[str]
    seconds: float
    variables: dict[str, str] = {}


# ---- before: what the machine is given ----


def prepare(carry: Path, photographs: Path) -> None:
    """Fills the folder CARRY with small photographs and with wheels."""
    print(f"{shrink(photographs, carry / 'photographs') / 1e6:.1f} MB of photographs")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), "-d", str(carry / "wheels"), *WHEELS], check=True)


def shrink(source: Path, target: Path, limit: int = CARRIED) -> int:
    """Writes small copies of the pictures below a folder, under their names, until the limit is reached.

    The names stay, as they say what a picture may be used for (`data/generate/held_out.py`).

    Returns:
        The bytes that were written.
    """
    from PIL import Image

    target.mkdir(parents=True, exist_ok=True)
    total = 0
    for path in sorted(source.rglob("*"), key=lambda path: (path.suffix != ".png", path.name)):  # cut-outs are few
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        with Image.open(path) as picture:
            factor = SIDE / min(picture.size)
            if factor < 1:
                picture = picture.resize([round(side * factor) for side in picture.size], Image.Resampling.LANCZOS)
            copy = target / path.name
            picture.save(copy, **({} if path.suffix == ".png" else {"quality": QUALITY}))
        total += copy.stat().st_size
        if total > limit:
            total -= copy.stat().st_size
            copy.unlink()
            break
    return total


# ---- there: the phases ----


def phases(out: Path, carry: Path | None, start: str, dry: bool) -> list[Phase]:
    """Returns what is run, in its order; training, the last but one, takes the time that is left."""
    python = sys.executable
    checks = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "triton_checks.py")]
    bars = [python, str(HERE / "gpu_kernels.py"), str(out)]
    own = [python, str(HERE / "gpu_run.py")]
    found = []
    if carry and (carry / "wheels").is_dir():
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(out / "site")]
        found.append(Phase("install", [*install, *map(str, sorted((carry / "wheels").glob("*.whl")))], 60))
    few = ["-k", "nothing_gives_nothing or warp_to_one_place"] if dry else []
    found.append(Phase("checks", checks + few, 110, {"TRITON_INTERPRET": "1"} if dry else {}))
    size = ["--size", "64", "64"] if dry else []
    for part, seconds in (("networks", 80), ("kernels", 60)):
        most = 12 if dry else seconds  # after it no measurement begins
        found.append(Phase(part, [*bars, "--part", part, "--seconds", str(most), *size], seconds + 20))
    where = ["--carry", str(carry)] if carry else []
    kind = ["--dry-run"] if dry else []
    found.append(Phase("train", [*own, "train", str(out), "--start", start, *where, *kind], 0))
    found.append(Phase("score", [*own, "score", str(out), "--start", start, *where, *kind], 150 if dry else 40))
    return found


def run(out: Path, carry: Path | None, start: str, minutes: float, dry: bool) -> dict[str, object]:
    """Runs all phases and returns what they found; OUT/gpu_run.json has it after each of them."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {"dry_run": dry, "python": sys.version.split()[0], "minutes": minutes, "phases": {}}
    todo = phases(out, carry, start, dry)
    later = {phase.name: sum(each.seconds for each in todo[k + 1 :]) for k, phase in enumerate(todo)}
    for phase in todo:
        left = 60 * minutes - (time.monotonic() - began) - SPARE - later[phase.name]
        seconds = min(phase.seconds or left, left)
        if seconds < 1:
            results["phases"][phase.name] = {"failed": "no time was left"}
        else:
            results["phases"][phase.name] = run_phase(phase, seconds, out)
        write_json(out / "gpu_run.json", results)
    weights = out / "weights.safetensors"
    results["weights_bytes"] = weights.stat().st_size if weights.exists() else 0
    if results["weights_bytes"] > WEIGHTS:
        results["weights"] = f"larger than {WEIGHTS} bytes"
    for scratch in ("site", "run", "triton"):
        shutil.rmtree(out / scratch, ignore_errors=True)
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(out / "gpu_run.json", results)
    return results


def run_phase(phase: Phase, seconds: float, out: Path) -> dict[str, object]:
    """Runs one phase; returns its seconds, the JSON lines it printed, and how it failed, if it did."""
    began = time.monotonic()
    paths = [str(out / "site"), str(SOURCE), str(HERE), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PHASE_SECONDS": f"{seconds:.0f}"}
    environment |= {"TRITON_CACHE_DIR": str(out / "triton"), "PYTHONUNBUFFERED": "1", **phase.variables}
    with (out / "gpu_run.log").open("a") as log:
        log.write(f"\n==== {phase.name}, at most {seconds:.0f} s: {' '.join(phase.command)}\n")
        log.flush()
        at = log.tell()
        with subprocess.Popen(
            phase.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process:
            try:
                process.wait(seconds)
                late = False
            except subprocess.TimeoutExpired:
                late = True
                _end(process)
    printed = (out / "gpu_run.log").read_bytes()[at:].decode(errors="replace").splitlines()
    found: dict[str, object] = {"seconds": round(time.monotonic() - began, 1)}
    found["rows"] = [json.loads(line) for line in printed if line.startswith('{"') and line.endswith("}")]
    said = [line for line in printed if line.strip() and not line.startswith("{")]
    if late:
        found["failed"] = f"it took longer than {seconds:.0f} s"
    elif process.returncode:
        found["failed"] = f"exit status {process.returncode}: {' / '.join(said[-3:])[:600]}"
    elif said:
        found["said"] = said[-1][:200]
    return found


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def write_json(path: Path, content: dict[str, object]) -> None:
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


# ---- in the processes of the phases ----


def train(out: Path, carry: Path | None, start: str, dry: bool) -> None:
    """Trains fastflownet on pairs that the GPU generates; prints what it reached, leaves OUT/weights.safetensors.

    A short run first says how many steps fit, so that the learning rate has come down when the time ends.
    """
    from fleetflow.training.loop import train as learn

    began, seconds = time.monotonic(), float(os.environ["PHASE_SECONDS"])
    photographs = carry / "photographs" if carry and (carry / "photographs").is_dir() else None
    settings = {"batch": "2", "height": "64", "width": "64"} if dry else {}
    how = {"start": (start,), "textures": photographs, "threads": 1 if dry else 0}
    trial = learn(
        "fastflownet_gpu", folder=out / "run" / "trial", settings=settings | {"steps": "1000000"},
        steps=2 if dry else None, minutes=0.5, checkpoint_every=10**6, **how,
    )  # fmt: skip
    rate = trial.step / (time.monotonic() - began)  # with the start, so rather few
    left = seconds - (time.monotonic() - began) - 15
    steps = str(4 if dry else max(4, int(0.9 * rate * left)))
    print(json.dumps({"name": "trial", "steps_per_second": round(rate, 3), "steps_planned": int(steps)}), flush=True)
    reached = learn(
        "fastflownet_gpu", folder=out / "run" / "main", settings=settings | {"steps": steps}, minutes=left / 60,
        checkpoint_every=500, **how,
    )  # fmt: skip
    shutil.copy(reached.weights, out / "weights.safetensors")
    print(json.dumps({"name": "train", "step": reached.step, "steps": reached.steps, "epe": round(reached.epe, 3)}))


def score(out: Path, carry: Path | None, start: str, dry: bool) -> None:
    """Prints EPE and % over 3 px on the validation part of footage: of the weights that were there, and of the new."""
    from fleetflow.data.datasets.footage import footage
    from fleetflow.evaluation.evaluate import evaluate
    from fleetflow.inference.predictor import Predictor
    from fleetflow.models.weights import load

    photographs = carry / "photographs" if carry and (carry / "photographs").is_dir() else None
    few = {"classes": "moving+still", "size": "64x96"} if dry else {"size": "288x512"}
    files = footage(photographs, split="validation", limit=1 if dry else 2, **few)
    for name in (start, str(out / "weights.safetensors")):
        table = evaluate(Predictor(load(name)), files)["mean of sets"]
        row = {"name": Path(name).name, "epe": round(table["epe"], 3), "out3": round(table["out3"], 2)}
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "train", "score"))
    parser.add_argument("folder", type=Path, help="OUT, or CARRY for prepare")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs, for prepare")
    parser.add_argument("--carry", type=Path, help="what prepare has made")
    parser.add_argument("--start", default="fastflownet", help="a network, or NETWORK:CHECKPOINT, to start from")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    out, carry = given.folder.resolve(), given.carry and given.carry.resolve()
    if given.what == "prepare":
        prepare(out, given.photographs)
    elif given.what == "run":
        print(json.dumps(run(out, carry, given.start, given.minutes, given.dry_run), indent=1))
    else:
        {"train": train, "score": score}[given.what](out, carry, given.start, given.dry_run)


if __name__ == "__main__":
    main()
