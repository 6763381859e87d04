"""The command `fleetflow benchmark`."""

from pathlib import Path

from fleetflow.cli.console import table
from fleetflow.cli.options import Positional, Precision
from fleetflow.types import FleetflowError


def benchmark(
    models: Positional[tuple[str, ...]] = ("fastflownet",),
    /,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    device: str = "cpu",
    threads: int = 0,
    precision: Precision = "auto",
    seconds: float = 20.0,
    peers: tuple[str, ...] = ("dis",),
    training: bool = True,
    iterations: int | None = None,
    root: Path | None = None,
    dataset: str = "pairs",
    options: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    json: Path | None = None,
    plot: Path | None = None,
    video: bool = False,
    clips: tuple[Path, ...] = (),
) -> None:
    """Time networks on this machine, beside their plain definitions and OpenCV's DIS, in one process.

    Args:
        models: networks, NETWORK:CHECKPOINT, or files of ours; or "data" and a data set in --root, to time its reading.
        size: height and width of the frames; default 448 1024, of the generated clips of --video 128 160.
        batch: pairs predicted at once; times are of one pair, the peers take single ones.
        device: cpu, cuda, ...
        threads: 0 takes all.
        precision: of the convolutions.
        seconds: how long to measure each network.
        peers: dis, farneback, deepflow, or a Python file with a function predict(image1, image2) -> flow.
        training: also measure training steps (on the CPU).
        iterations: refinement iterations of the networks; their own if not given.
        root: a folder of pairs with truth, to measure the accuracy of networks and peers on.
        dataset: what lies in --root.
        options: name=value of the data set, such as render=clean.
        without: names of pairs to leave out.
        json: a file to which one line of JSON per network, or per row of a table, is added, with the machine.
        plot: a picture of accuracy against speed; needs --root.
        video: count the evaluations that DEQ-Flow saves by starting from the last fixed point, on generated clips.
        clips: videos or folders of frames to count them on instead.
    """
    given = dict(locals())
    from fleetflow.cli.outputs import make_room
    from fleetflow.data.dataset import open_files
    from fleetflow.evaluation import speed as job
    from fleetflow.evaluation.machine import in_line
    from fleetflow.training.speed import training_speed

    if models[:1] == ("data",):
        _refuse(given, "benchmark data", "threads", "seconds", "root", "options", "without", "json")
        return _benchmark_data(models[1:], root, options, without, seconds, threads, json)
    if video or clips:
        own = ("size", "video") if not clips else ("video", "clips")
        _refuse(given, "--clips" if clips else "--video", "device", "threads", "json", *own)
        return _benchmark_video(models, size or (128, 160), clips, device, threads, json)
    if plot and not root:
        raise FleetflowError("--plot shows accuracy against speed; give --root DIR, a folder of pairs with truth")
    if not root and (options or without or dataset != "pairs"):
        raise FleetflowError("--dataset, --options and --without choose pairs with truth; give --root DIR with them")
    make_room(json, plot)
    size = size or (448, 1024)
    files = open_files(dataset, root, options=options, without=without) if root else None
    reports = []
    for report in job.benchmark(
        models, *size, device=device, threads=threads, precision=precision, iterations=iterations, seconds=seconds, peers=peers,
        training=training_speed if training else None, pairs=files, dataset=dataset, batch=batch,
    ):  # fmt: skip
        reports.append(report)
        place = f"{report.device}, {report.precision}, {report.threads} threads"
        table(f"{report.network}: one pair of {size[0]}x{size[1]}, {place}", job.COLUMNS, job.table(report))
        for fact in job.facts(report):
            print(fact)
        if json:
            job.add_row(report, json)
    print(in_line(reports[0].machine))
    if plot:
        job.pareto(reports, plot)
        print(plot)


def _refuse(given: dict[str, object], what: str, *taken: str) -> None:
    """Raises FleetflowError for an option of `benchmark` that is given, but not taken where `what` is measured."""
    import inspect

    for name, parameter in inspect.signature(benchmark).parameters.items():
        if name not in ("models", *taken) and given[name] != parameter.default:
            option = f"--no-{name}" if given[name] is False else f"--{name}"
            raise FleetflowError(f"{what} takes no {option}; leave it out (it takes --{', --'.join(taken)})")


def _benchmark_data(
    names: tuple[str, ...], root: Path | None, options: tuple[str, ...], without: tuple[str, ...], seconds: float,
    threads: int, json: Path | None,
) -> None:  # fmt: skip
    """Prints how many pairs a second are read, without workers and with 1, 2, 4, ... up to the cores."""
    import os

    from fleetflow.cli.outputs import make_room
    from fleetflow.data.dataset import open_files
    from fleetflow.data.loader import loading_speed
    from fleetflow.evaluation import speed as job
    from fleetflow.evaluation.machine import in_line, machine

    if len(names) != 1 or root is None:
        raise FleetflowError("reading is timed for one data set; give its name and --root: benchmark data sintel ...")
    make_room(json)
    job.prepare(threads)
    files = open_files(names[0], root, options=options, without=without)
    counts = [0, *(2**k for k in range((os.cpu_count() or 1).bit_length()))]
    speeds = [(count, loading_speed(files, count, seconds=seconds / len(counts))) for count in counts]
    rows = [[str(count), f"{speed:.1f}", f"{speed / speeds[0][1]:.2f}"] for count, speed in speeds]
    table(f"reading {names[0]}, {len(files)} pairs", ["workers", "samples/s", "times none"], rows)
    if json:
        what = {"dataset": " ".join((*names, *options)), "pairs": len(files), "machine": machine()}
        job.append([{**what, "workers": count, "samples_per_second": speed} for count, speed in speeds], json)
    print(in_line(machine()))


def _benchmark_video(
    names: tuple[str, ...], size: tuple[int, int], paths: tuple[Path, ...], device: str, threads: int, json: Path | None
) -> None:
    """Prints how many evaluations reach a residual from a cold start and from the last pair's fixed point.

    And with which solver, each from a cold start, they reach the residual of plain iteration.
    """
    from fleetflow.cli.outputs import make_room
    from fleetflow.evaluation import speed as job
    from fleetflow.evaluation.machine import in_line, machine
    from fleetflow.evaluation.video_reuse import (
        PICARD,
        generated_clips,
        race_cells,
        reuse_cells,
        solver_race,
        video_reuse,
    )
    from fleetflow.inference.device import choose_device

    make_room(json)
    job.prepare(threads, size)
    place = choose_device(device)
    networks = {name: job.load_any(name).to(place) for name in names}
    clips = job.clips(paths) if paths else generated_clips(3, 4, *size)
    clips = {clip: [frame.to(place) for frame in frames] for clip, frames in clips.items()}
    for name, model in networks.items():
        rows = video_reuse(model, clips)
        columns = ["clip", "pairs", "residual", "cold", "warm", "warm / cold"]
        table(f"{name}: evaluations", columns, [reuse_cells(row) for row in rows])
        race = solver_race(model, {clip: frames[:2] for clip, frames in clips.items()})
        columns = ["solver", "pairs", "evaluations", f"of {PICARD}"]
        table(f"to the residual of {PICARD} plain ones", columns, [race_cells(row) for row in race])
        if not job.has_weights(name):
            print("weights are random: this says how the solver behaves, not what a trained network saves")
        if json:
            weights = "trained" if job.has_weights(name) else "random"
            what = {"network": name, "weights": weights, "device": place.type, "machine": machine()}
            job.append([{**what, **row._asdict()} for row in (*rows, *race)], json)
    print(in_line(machine()))
