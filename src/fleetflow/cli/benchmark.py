"""Measure speed on this machine: of networks (speed), of reading a data set (data), of DEQ-Flow on video (video)."""

from pathlib import Path

from fleetflow.cli.console import table
from fleetflow.cli.options import Positional, Precision, Several, flat
from fleetflow.types import FleetflowError


def speed(
    models: Positional[tuple[str, ...]] = ("fastflownet",),
    /,
    size: tuple[int, int] = (448, 1024),
    batch: int = 1,
    iterations: int | None = None,
    device: str = "cpu",
    threads: int = 0,
    precision: Precision = "auto",
    seconds: float = 20.0,
    peers: Several[str] = (),
    training: bool = True,
    root: Path | None = None,
    dataset: str | None = None,
    options: Several[str] = (),
    without: Several[str] = (),
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time networks on this machine, beside their reference implementations and OpenCV's DIS, in one process.

    Args:
        models: networks, NETWORK:CHECKPOINT, or files of ours.
        size: height and width of the frames.
        batch: pairs predicted at once; times are of one pair, the peers take single ones.
        iterations: refinement iterations of the networks; their own if not given.
        device: cpu, cuda, auto, mps, xpu, npu, hpu, ... as torch has them here.
        threads: 0 takes all.
        precision: of the convolutions.
        seconds: how long to measure each network.
        peers: default dis; dis, farneback, deepflow, or a Python file with a function predict(image1, image2) -> flow.
        training: also measure training steps (on the CPU).
        root: a folder of pairs with truth, to measure the accuracy of networks and peers on.
        dataset: what lies in --root; pairs if not given. Data sets that are generated need no --root.
        options: name=value of the data set, such as render=clean.
        without: names of pairs to leave out.
        json: a file to which one line of JSON per network is added, with the machine.
        plot: a picture of accuracy against speed; needs --root or --dataset.

    Examples:
        fleetflow benchmark speed fastflownet raft_small --size 448 1024
        fleetflow benchmark speed fastflownet --root data --json speed.jsonl
    """
    from fleetflow.cli.outputs import file_of, make_room
    from fleetflow.data.dataset import open_files
    from fleetflow.evaluation import plots, speed_tables
    from fleetflow.evaluation.machine import in_line
    from fleetflow.evaluation.records import append
    from fleetflow.evaluation.speed import benchmark
    from fleetflow.training.speed import training_speed

    chosen, left_out = flat(options), flat(without)
    accuracy = root is not None or dataset is not None
    if plot and not accuracy:
        raise FleetflowError("--plot shows accuracy against speed; give --root DIR, a folder of pairs with truth")
    if plot and plot.suffix.lower() != ".png":
        raise FleetflowError(f'{plot} has the suffix "{plot.suffix}"; expected .png')
    if not accuracy and (options or without):
        raise FleetflowError("--options and --without choose pairs with truth; give --root DIR with them")
    make_room(json, plot, inputs=map(file_of, (*models, *flat(peers))), folders=[root])
    if plot:
        plots.require()
    dataset = dataset or "pairs"
    files = open_files(dataset, root, options=chosen, without=left_out) if accuracy else None
    reports = []
    for report in benchmark(
        models, *size, device=device, threads=threads, precision=precision, iterations=iterations, seconds=seconds,
        peers=flat(peers) or ("dis",), training=training_speed if training else None, pairs=files, dataset=dataset,
        batch=batch,
    ):  # fmt: skip
        reports.append(report)
        place = f"{report.device}, {report.precision}, {report.threads} threads"
        rows = speed_tables.table(report)
        table(f"{report.network}: one pair of {size[0]}x{size[1]}, {place}", speed_tables.COLUMNS, rows)
        for line in (*speed_tables.facts(report), *(f"warning: {line}" for line in report.unsteady())):
            print(line)
        if json:
            append([speed_tables.row(report)], json)
    print(in_line(reports[0].machine))
    if plot:
        plots.pareto(reports, plot)
        print(plot)


def data(
    dataset: Positional[str],
    /,
    root: Path | None = None,
    options: Several[str] = (),
    without: Several[str] = (),
    seconds: float = 20.0,
    threads: int = 0,
    json: Path | None = None,
) -> None:
    """Time how many pairs of a data set are read a second, without worker processes and with 1, 2, 4, ...

    Args:
        dataset: such as sintel.
        root: the folder of the data set; one that is generated needs none.
        options: name=value of the data set, such as render=clean.
        without: names of pairs to leave out.
        seconds: how long to measure all together.
        threads: of the process without workers; 0 takes all.
        json: a file to which a line of JSON per number of workers is added, with the machine.

    Examples:
        fleetflow benchmark data pairs --root data
        fleetflow benchmark data pairs --root data --seconds 5 --json reading.jsonl
    """
    from fleetflow.cli.outputs import make_room
    from fleetflow.data.dataset import open_files
    from fleetflow.data.speed import reading_speeds
    from fleetflow.evaluation.machine import in_line, machine
    from fleetflow.evaluation.records import append
    from fleetflow.evaluation.speed import prepare

    chosen, left_out = flat(options), flat(without)
    make_room(json, folders=[root])
    prepare(threads, seconds=seconds)
    files = open_files(dataset, root, options=chosen, without=left_out)
    speeds = reading_speeds(files, seconds)
    alone = speeds[0].samples_per_second
    rows = [[str(count), f"{speed:.1f}", f"{speed / alone:.2f}"] for count, speed in speeds]
    table(f"reading {dataset}, {len(files)} pairs", ["workers", "samples/s", "x none"], rows)
    if json:
        what = {"dataset": " ".join((dataset, *chosen)), "pairs": len(files), "machine": machine()}
        append([{**what, **speed._asdict()} for speed in speeds], json)
    print(in_line(machine()))


def video(
    models: Positional[tuple[str, ...]] = ("deq_flow_tiny",),
    /,
    clips: Several[Path] = (),
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    threads: int = 0,
    json: Path | None = None,
) -> None:
    """Count the evaluations that DEQ-Flow saves along a clip by starting from the last fixed point.

    And with which solver, each from a cold start, it reaches the residual of plain iteration.

    Args:
        models: networks of the DEQ-Flow family, or NETWORK:CHECKPOINT.
        clips: videos or folders of frames; generated clips if not given.
        size: height and width of the generated clips; 128 160 if not given.
        device: cpu, cuda, auto, mps, xpu, npu, hpu, ... as torch has them here.
        threads: 0 takes all.
        json: a file to which a line of JSON per row of the tables is added, with the machine.

    Examples:
        fleetflow benchmark video
        fleetflow benchmark video deq_flow_tiny --clips clip.mp4
    """
    from fleetflow.cli.outputs import file_of, make_room
    from fleetflow.evaluation import video_reuse as job
    from fleetflow.evaluation.calls import has_weights, load_any
    from fleetflow.evaluation.machine import in_line, machine
    from fleetflow.evaluation.records import append
    from fleetflow.evaluation.speed import prepare
    from fleetflow.inference.device import choose_device

    if clips and size:
        raise FleetflowError("--size is that of generated clips; leave it out with --clips")
    make_room(json, inputs=(*map(file_of, models), *flat(clips)), folders=flat(clips))
    prepare(threads, size or (1, 1))
    place = choose_device(device)
    networks = {name: job.checked(load_any(name).to(place)) for name in models}
    frames = job.read_clips(flat(clips)) if clips else job.generated_clips(3, 4, *(size or (128, 160)))
    frames = {clip: [frame.to(place) for frame in found] for clip, found in frames.items()}
    for name, model in networks.items():
        rows = job.video_reuse(model, frames)
        columns = ["clip", "pairs", "residual", "cold", "warm", "warm / cold"]
        table(f"{name}: evaluations", columns, [job.reuse_cells(row) for row in rows])
        race = job.solver_race(model, {clip: found[:2] for clip, found in frames.items()})
        columns = ["solver", "pairs", "evaluations", f"of {job.PICARD}"]
        table(f"to the residual of {job.PICARD} plain ones", columns, [job.race_cells(row) for row in race])
        if not has_weights(name):
            print("weights are random: this says how the solver behaves, not what a trained network saves")
        if json:
            weights = "trained" if has_weights(name) else "random"
            what = {"network": name, "weights": weights, "device": place.type, "machine": machine()}
            append([{**what, **row._asdict()} for row in (*rows, *race)], json)
    print(in_line(machine()))
