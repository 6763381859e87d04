"""The commands `fleetflow batch`: many clips, once each, on all cores or on a Ray cluster; `run` need not be named."""

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.cli.console import bar
from fleetflow.cli.console import table as show
from fleetflow.cli.options import Format, Positional, Precision, Several, flat
from fleetflow.types import FleetflowError

Output = Annotated[str, tyro.conf.arg(aliases=["-o"])]


def run(
    manifest: Positional[str],
    /,
    output: Output = "batch",
    do: Literal["predict", "motion", "track", "evaluate"] = "predict",
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    format: Annotated[Several[Format], tyro.conf.arg(aliases=["-f"])] = (),
    size: tuple[int, int] | None = None,
    scale: float | None = None,
    iterations: int | None = None,
    warm_start: bool = False,
    split: int = 1000,
    grid: int = 32,
    dataset: str = "pairs",
    on: Literal["local", "ray"] = "local",
    workers: int = 0,
    threads: int = 1,
    tries: int = 5,
    device: str = "auto",
    precision: Precision = "auto",
    memory: str | None = None,
    json: Path | None = None,
) -> None:
    """Do a list of clips, each exactly once in effect; after any crash the same command goes on.

    Each clip gets a folder OUTPUT/ID with its results and record.json: input, settings, weights, files, all with their
    hashes. Other commands: `fleetflow batch manifest FOLDER` makes a list, `fleetflow batch status OUTPUT` shows how
    far it is, `fleetflow batch retry OUTPUT` tries anew what failed.

    Args:
        manifest: a clip a line; or .csv or .parquet with a column input, and perhaps id and frames. Local, or an address
            that fsspec knows.
        output: a folder, or an address that fsspec knows.
        do: what to do with each clip; motion scores it, track follows points, evaluate takes folders of pairs with truth.
        model: a network, NETWORK:CHECKPOINT, or a file that `fleetflow export` wrote.
        format: what predict writes, as of `fleetflow predict`.
        size: height and width at which the network sees the frames.
        scale: pixels of motion shown at full color.
        iterations: refinement iterations of RAFT, GMA, DEQ-Flow.
        warm_start: let each pair start from where the one before it ended (RAFT, GMA, DEQ-Flow).
        split: pairs in a range of a long clip, each done by itself and then joined; 0: clips are not split.
        grid: of track: pixels between the points in the first frame.
        dataset: of evaluate: how the pairs lie in each folder.
        on: local processes, or Ray: the cluster of RAY_ADDRESS, or one of this machine.
        workers: 0 takes one a GPU, or one for so many cores as --threads says.
        threads: of each worker on the CPU.
        tries: how often a worker may begin with a clip before it counts as failed.
        device: auto, cpu, cuda, mps, ...; with several GPUs each worker gets its own.
        precision: of the convolutions.
        memory: what each worker may take, such as 4G.
        json: a file for the summary.

    Examples:
        fleetflow batch clips.txt -o out -m fastflownet -f npz
        fleetflow batch clips.parquet -o out --on ray --json summary.json
    """
    from fleetflow.batch import run as job
    from fleetflow.batch.manifest import read_manifest
    from fleetflow.batch.task import Settings

    clips = (item.input for item in read_manifest(manifest))
    _make_room(output, chain([manifest, *_weights(model)], clips), json)
    formats = flat(format) if format else Settings.format
    ways = {
        "scale": scale,
        "iterations": iterations,
        "warm_start": warm_start,
        "split": split,
        "grid": grid,
        "dataset": dataset,
    }
    ways |= {"device": device, "precision": precision, "memory": memory}
    settings = Settings(do, model, formats, size, **ways)
    with bar(f"{do} {manifest}", unit="clips") as progress:
        summary = job.batch(
            manifest, output, settings, on=on, workers=workers, threads=threads, tries=tries, progress=progress
        )
    _show(summary, output, json)


def manifest(
    folder: Positional[str], /, output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("clips.csv")
) -> None:
    """List the clips below a folder: videos, and folders of pictures.

    Args:
        folder: a path, or an address that fsspec knows.
        output: the list, .csv or .parquet.

    Examples:
        fleetflow batch manifest clips -o clips.csv
        fleetflow batch manifest s3://bucket/clips -o clips.parquet
    """
    from fleetflow.batch.manifest import clips_in, write_manifest

    print(f"{output}: {write_manifest(clips_in(folder), output)} clips")


def status(
    output: Positional[str], /, check: bool = False, json: Path | None = None, table: Path | None = None
) -> None:
    """Show how far a batch is: clips by outcome, reasons of failures, and the workers of the run that is at it.

    Args:
        output: the folder of the batch.
        check: compare all results with the sizes and hashes in their records.
        json: a file for the same.
        table: a file .csv, .json or .parquet with a row for each clip that ended: its record, and what motion found.

    Examples:
        fleetflow batch status out
        fleetflow batch status out --check --table results.csv
    """
    from fleetflow.batch import run as job
    from fleetflow.io.table import check_table, write_table

    _make_room(output, job.sources(output), json, table)
    if table:
        check_table(table)
    found = job.status(output, check=check)
    if table:
        write_table(table, list(job.rows(output)))
    rows = [["done", f"{found['done']}"], *([f"failed: {why}", f"{count}"] for why, count in found["failed"].items())]
    show(f"{output}: {found['items']} clips", ["clips", "number"], [*rows, ["missing", f"{found['missing']}"]])
    if running := found.get("running"):
        left = running["seconds_left"]
        when = "" if left is None else f", {left / 60:.1f} minutes left"
        print(f"running: {running['ended']} of {running['items']}, {60 * running['rate']:.1f} clips a minute{when}")
        for worker in running["workers"]:
            print(f"  process {worker['pid']}: {worker['item'] or 'waits'}")
    for id, names in found.get("damaged", {}).items():
        print(f"damaged: {id}: {', '.join(names)}")
    if json:
        _write(json, found)
    if found.get("damaged"):
        raise FleetflowError(
            f"{len(found['damaged'])} clips have damaged results; remove their folders and run it again"
        )


def retry(
    output: Positional[str],
    /,
    on: Literal["local", "ray"] | None = None,
    workers: int = 0,
    threads: int = 1,
    tries: int = 5,
    json: Path | None = None,
) -> None:
    """Try anew the clips of a batch that failed, and do those that are missing.

    Args:
        output: the folder of the batch, which knows its list and its settings.
        on: where; as the batch was begun if not given.
        workers: as of `fleetflow batch`.
        threads: of each worker on the CPU.
        tries: how often a worker may begin with a clip before it counts as failed.
        json: a file for the summary.

    Examples:
        fleetflow batch retry out
        fleetflow batch retry out --workers 1
    """
    from fleetflow.batch import run as job
    from fleetflow.batch.records import Store

    model = Store(output).settings()["settings"]["model"]
    _make_room(output, chain(_weights(model), job.sources(output)), json)
    with bar(f"retry {output}", unit="clips") as progress:
        summary = job.retry(output, on=on, workers=workers, threads=threads, tries=tries, progress=progress)
    _show(summary, output, json)


def _show(summary, output: str, json: Path | None) -> None:
    """Prints what became of the clips; raises FleetflowError unless all have results."""
    from dataclasses import asdict

    if json:
        _write(json, asdict(summary))
    rate = f", {summary.frames / summary.seconds:.1f} frames/s" if summary.frames else ""
    rows = [["done", f"{summary.done}"], ["skipped: results were there", f"{summary.skipped}"]]
    rows += [[f"failed: {why}", f"{count}"] for why, count in summary.failed.items()]
    title = f"{output}: {summary.items} clips, {summary.seconds:.0f} s, {summary.workers} workers{rate}"
    show(title, ["clips", "number"], [*rows, ["missing", f"{summary.missing}"]])
    if summary.stopped:
        raise FleetflowError(f"{summary.stopped} (the same command goes on with the {summary.missing} missing clips)")
    if summary.failed:
        raise FleetflowError(
            f"{summary.items_failed()} of {summary.items} clips failed; fleetflow batch retry {output} tries them anew"
        )


def _make_room(output: str, sources: Iterable[str], *files: Path | None) -> None:
    """Raises FleetflowError for a file that the batch reads, or that lies in one of its folders: a result, a record.

    sources: the list and its clips. What is written into a folder of pictures changes the clip.
    """
    from fleetflow.batch.manifest import local
    from fleetflow.batch.records import Store
    from fleetflow.cli.outputs import make_room

    given = [file for file in files if file is not None]
    places = {file: Path(os.path.realpath(file)) for file in given}
    store = Store(output)
    root = Path(os.path.realpath(store.root))
    for file, place in places.items() if store.local else ():
        if file.exists() and place.parent != root and root in place.parents:
            raise FleetflowError(f"{file} belongs to the batch, and would be replaced; choose another output")
    around = {above: file for file, place in places.items() for above in (place, *place.parents)}
    for source in map(local, sources if given else ()):
        if source is not None and (file := around.get(source)):
            raise FleetflowError(f"{file} is or lies in {source}, which this batch reads; choose another output")
    make_room(*given)


def _weights(model: str) -> list[str]:
    """The file of a network, or the folder with its parts; nothing of a name alone: results may lie in ./NETWORK."""
    from fleetflow.cli.outputs import file_of

    file = file_of(model)
    return [str(file)] if file.is_file() or (file / "parity.json").is_file() else []


def _write(path: Path, content: dict) -> None:
    import json

    from fleetflow.io.atomic import write_atomically

    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
