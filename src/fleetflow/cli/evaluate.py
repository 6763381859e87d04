"""The command `fleetflow evaluate`."""

import os
from pathlib import Path

from fleetflow.cli.console import bar, table
from fleetflow.cli.options import Positional, Precision, Several, flat
from fleetflow.types import FleetflowError


def evaluate(
    model: Positional[str],
    dataset: Positional[str],
    /,
    root: Path | None = None,
    options: Several[str] = (),
    without: Several[str] = (),
    iterations: int | None = None,
    warm_start: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    json: Path | None = None,
    csv: Path | None = None,
    html: Path | None = None,
) -> None:
    """Measure a network on a data set, per image and pooled: by set, speed, occlusion, distance to boundaries, ...

    Args:
        model: a network, NETWORK:CHECKPOINT, dis, farneback or deepflow (OpenCV); a Python file with a function
            predict(image1, image2) -> flow, or predict(image1, image2, name); or a folder of saved flow files
            (./NAME where it is called like a network).
        dataset: such as pairs; footage is generated and needs no folder.
        root: the folder of the data set; for footage one of photographs, if any.
        options: name=value of the data set, such as render=clean split=val.
        without: names of pairs to leave out.
        iterations: refinement iterations of the network; if not given those its authors took on the data set, else its own.
        warm_start: let each pair start from where the one before it in its scene ended (RAFT, GMA, DEQ-Flow).
        device: auto, cpu, cuda, cuda:1, mps, xpu, npu, hpu, ... as torch has them here.
        precision: of the convolutions.
        threads: 0 takes all.
        json: a file for all numbers with their protocol.
        csv: a file for a line per pair.
        html: a file for a report with curves and the worst and best pairs; it needs no other file.

    Examples:
        fleetflow evaluate fastflownet pairs --root data --json scores.json
        fleetflow evaluate fastflownet sintel --root Sintel --options render=clean split=training --html report.html
    """
    from fleetflow.cli.outputs import file_of, make_room
    from fleetflow.data.dataset import open_files
    from fleetflow.evaluation import plots, records, report
    from fleetflow.evaluation.baselines import CLASSICAL
    from fleetflow.evaluation.evaluate import measure
    from fleetflow.evaluation.protocol import open_model
    from fleetflow.evaluation.saved_flows import is_folder, saved_flows
    from fleetflow.evaluation.warm_start import Warm
    from fleetflow.inference.device import use_threads
    from fleetflow.registry import models as networks

    chosen, left_out = flat(options), flat(without)
    use_threads(threads)
    saved = Path(os.path.expanduser(model)) if is_folder(model, (*CLASSICAL, *networks)) else None
    make_room(json, csv, html, inputs=[file_of(model)], folders=[root, saved])
    if html:
        plots.require()
    files = open_files(dataset, root, options=chosen, without=left_out)
    ways = {"iterations": iterations, "device": device, "precision": precision}
    if saved is not None:
        if warm_start or list(ways.values()) != [None, "auto", "auto"]:
            raise FleetflowError(f"{model} holds saved flows, so nothing is computed; leave out how to compute it")
        predict = saved_flows(saved, files)
        files = predict.files
        print(*predict.summary(), sep="\n")
    else:
        predict = open_model(model, dataset, **ways)
    predict = Warm(predict, files.pairs) if warm_start else predict
    with bar(f"{model} on {dataset}") as progress:
        name = " ".join((dataset, *chosen))
        result = measure(predict, files, model=model, dataset=name, progress=lambda *state: progress(state))
    _show(result)
    if json:
        records.as_json(result, json)
    if csv:
        records.as_csv(result, csv)
    if html:
        report.write_report(result, predict, files, html)
        print(html)


def _show(result) -> None:
    """Prints the tables of an evaluation."""
    from fleetflow.evaluation import tables

    table(
        f"{result.model} on {result.dataset} ({len(result.pairs)} pairs)",
        tables.SET_COLUMNS,
        tables.rows_by_set(result),
    )
    if rows := tables.rows_of_clips(result):
        table("still pixels, boundaries of motion, occlusion, flicker", tables.CLIP_COLUMNS, rows)
    table("all pixels together", ["error", "value", "pixels"], tables.rows_pooled(result))
    print(f"protocol: {tables.protocol_line(result)}")
    for line in tables.left_out(result):
        print(line)
