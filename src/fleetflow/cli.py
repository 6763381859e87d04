"""The command line: each command is a typed function, and its signature is its help. torch is imported by the jobs."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.terminal import bar, gathered, table
from fleetflow.types import FleetflowError

Positional = tyro.conf.Positional
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Format = Literal["flo", "kitti", "npy", "npz", "pfm", "flo5", "color", "side"]


def predict(
    inputs: Positional[tuple[Path, ...]],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("flow"),
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    format: Annotated[tuple[Format, ...] | None, tyro.conf.arg(aliases=["-f"])] = None,
    device: str = "auto",
    precision: Precision = "auto",
    steps: int | None = None,
    warm_start: bool = False,
    scale: float | None = None,
    again: bool = False,
) -> None:
    """Predict flow: between two pictures, along the pictures of a folder, or along a video.

    Args:
        inputs: two pictures, one folder, or one video.
        output: a folder, or for two pictures also a file such as flow.flo or flow.png.
        model: a network, NETWORK:CHECKPOINT, or a blend of several: fastflownet+deq_flow_tiny.
        format: what to write; "color" and "side" are pictures (of a video: an mp4). Default: flo color, or what the
            suffix of the output says.
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor has units for it.
        steps: refinement steps of RAFT, GMA, DEQ-Flow; their own if not given.
        warm_start: let each pair of a folder or video start from where the one before it ended (RAFT, GMA, DEQ-Flow).
        scale: pixels of motion shown at full colour; chosen from the clip if not given.
        again: compute anew what a former run has finished.
    """
    import warnings

    from fleetflow import predict as job
    from fleetflow.models.weights import load

    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is said in one line
    if len(inputs) not in (1, 2):
        raise FleetflowError(f"{len(inputs)} inputs were given; expected two pictures, one folder or one video")
    missing = [path for path in inputs if not path.exists()]
    if missing:
        raise FleetflowError(f"{missing[0]} does not exist; give two pictures, one folder or one video")
    if warm_start and len(inputs) == 2:
        raise FleetflowError("two pictures have no pair before them; leave --warm-start out, or give a folder or video")
    predictor = job.Predictor(load(model), device=device, precision=precision, steps=steps)
    problem = None
    if len(inputs) == 2:
        written = job.predict_pair(predictor, *inputs, output, format, scale=scale)
    else:
        work = job.predict_folder if inputs[0].is_dir() else job.predict_video
        with bar(f"flow of {inputs[0].name}") as progress:
            options = {"scale": scale, "warm_start": warm_start, "again": again}
            result = work(predictor, inputs[0], output, format, **options, progress=progress)
        written, problem = result if isinstance(result, tuple) else (result, None)
    for path in written if len(written) <= 4 else (*written[:2], "...", written[-1]):
        print(path)
    if problem:
        raise FleetflowError(f"{problem} (what could be read was written)")


def train(
    recipe: Positional[str],
    /,
    folder: Path | None = None,
    resume: bool = False,
    start: tuple[str, ...] = (),
    stage: str | None = None,
    set: tuple[str, ...] = (),
    root: Path | None = None,
    data: str | None = None,
    textures: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    repeat: int = 1,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    workers: int | None = None,
    parts: int | None = None,
    compile: bool = False,
    save_memory: bool = False,
    checkpoint_every: int = 250,
) -> None:
    """Train a recipe; the averaged weights lie in FOLDER/weights.safetensors.

    Args:
        recipe: such as fastflownet_synthetic; `fleetflow recipes` lists them.
        folder: where the run lives; default runs/RECIPE.
        resume: continue exactly where the last checkpoint left off, with what the run was begun with.
        start: a network or NETWORK:CHECKPOINT whose weights the run starts from (two for FlowNet2: --start A B).
        stage: train this stage of the recipe alone.
        set: name=value, in place of what the recipe says: learning_rate=1e-4 batch=4 steps=1000 ...
        root: the folder that holds the data sets, for recipes that use them.
        data: train on this data set instead, in the folder --root: folder, folder:split=train, sintel:render=final ...
        textures: a folder of photographs for the surfaces of generated pairs; default: procedural ones.
        minutes: stop after so long; the run can be resumed.
        steps: stop at this step; the run can be resumed.
        seed: of weights and data; default 0.
        repeat: so many runs with seeds from SEED on, in FOLDER/seed-N, with their mean and spread.
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
        threads: of the training process; 0 takes all.
        workers: processes that make or read pairs; default: 1, and for data sets as many as cores, up to 8.
        parts: parts of a batch, over which gradients are accumulated; default: one for each process.
        compile: use torch.compile, which needs a compiler and minutes before the first step.
        save_memory: compute activations again instead of keeping them.
        checkpoint_every: steps between checkpoints; a killed run loses at most so many.
    """
    from statistics import fmean, stdev

    from fleetflow import processes
    from fleetflow import train as job

    wrong = [text for text in set if "=" not in text]
    if wrong:
        raise FleetflowError(f'"{wrong[0]}" is not a setting; expected name=value, such as batch=4')
    if repeat < 1:
        raise FleetflowError(f"--repeat is {repeat}; expected a number of runs from 1 on")
    settings = dict(text.split("=", 1) for text in set)
    folder = folder or Path("runs") / recipe
    seeds = [seed] if repeat == 1 else [(seed or 0) + k for k in range(repeat)]
    first, outcomes = None, []
    for one in seeds:
        place = folder if repeat == 1 else folder / f"seed-{one}"
        like = first if resume and not (place / "checkpoint.pt").exists() else None  # begins as the first one did
        outcome = job.train(
            recipe, folder=place, resume=resume and not like, like=like, start=start, stage=stage, settings=settings,
            root=root, data=data, textures=textures, minutes=minutes, steps=steps, seed=one, device=device,
            precision=precision, threads=threads, workers=workers, parts=parts, compile=compile,
            save_memory=save_memory, checkpoint_every=checkpoint_every,
        )  # fmt: skip
        print(f"step {outcome.step} of {outcome.steps}, EPE of the last steps {outcome.epe:.2f} px")
        print(outcome.weights)
        outcomes.append(outcome.epe)
        first = first or outcome.checkpoint
    processes.leave()
    if repeat > 1:
        print(f"EPE of the last steps over {repeat} runs: {fmean(outcomes):.3f} px, spread {stdev(outcomes):.3f}")


def adapt(
    frames: Positional[Path],
    /,
    start: Annotated[str, tyro.conf.arg(name="from")] = "fastflownet",
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("weights.safetensors"),
    other: Annotated[str | None, tyro.conf.arg(name="with")] = None,
    steps: int = 300,
    batch: int = 2,
    size: tuple[int, int] = (256, 448),
    learning_rate: float = 0.002,
    occlusion: Literal["consistency", "range"] = "consistency",
    order: Literal[1, 2] = 1,
    measure_every: int = 25,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 0,
) -> None:
    """Fine-tune a network on a video or a folder of frames, without truth; the last fifth is only measured on.

    Args:
        frames: a video, or a folder of consecutive pictures.
        start: the network that is adapted, or NETWORK:CHECKPOINT.
        output: the file for the best weights, never worse than the start on the held-back frames.
        other: a second network that learns too; each teaches the other what it is sure of.
        steps: of training.
        batch: pairs in a step.
        size: height and width of the crops.
        learning_rate: of the inner convolutions (Muon).
        occlusion: how hidden pixels are found: flow there and back agree, or something comes from there.
        order: of the smoothness: 1 for constant flow, 2 for flow that is linear (roads, walls).
        measure_every: steps between measurements.
        seed: of crops and views.
        device: auto, cpu, cuda, ...
        precision: of the convolutions in training; all measuring is in fp32.
        threads: 0 takes all.
    """
    from fleetflow import adapt as job

    outcomes = job.adapt(
        job.read_pairs(frames), output, start=start, other=other, name=frames.name, steps=steps, batch=batch,
        size=size, learning_rate=learning_rate, occlusion=occlusion, order=order, measure_every=measure_every,
        seed=seed, device=device, precision=precision, threads=threads,
    )  # fmt: skip
    rows = []
    for outcome in outcomes:
        for when, error in (("start", outcome.start), (f"step {outcome.step}", outcome.best)):
            rows.append([outcome.network, when, f"{error.census:.3f}", f"{error.l1:.3f}", f"{error.length:.2f}"])
    table("held-back pairs", ["network", "weights of", "census %", "L1 (of 255)", "flow px"], rows)
    for outcome in outcomes:
        print(outcome.weights)


def evaluate(
    model: Positional[str],
    dataset: Positional[str],
    /,
    root: Path,
    options: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    steps: int | None = None,
    warm_start: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    json: Path | None = None,
    csv: Path | None = None,
    html: Path | None = None,
) -> None:
    """Measure a network on a data set, per image and pooled: by set, speed, occlusion, distance to boundaries, ...

    Args:
        model: a network, NETWORK:CHECKPOINT, dis, farneback or deepflow (OpenCV), or a Python file with a function
            predict(image1, image2) -> flow.
        dataset: such as pairs.
        root: the folder of the data set.
        options: name=value of the data set, such as render=clean split=val.
        without: names of pairs to leave out.
        steps: refinement steps of the network; if not given those its authors took on the data set, else its own.
        warm_start: let each pair start from where the one before it in its scene ended (RAFT, GMA, DEQ-Flow).
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
        json: a file for all numbers with their protocol.
        csv: a file for a line per pair.
        html: a file for a report with curves and the worst and best pairs; it needs no other file.
    """
    from fleetflow import evaluate as job
    from fleetflow import report

    job.make_room(json, csv, html)
    files = job.open_files(dataset, root, options=options, without=without)
    predict = job.open_model(model, dataset, steps=steps, device=device, precision=precision)
    predict = job.Warm(predict, files.pairs) if warm_start else predict
    with bar(f"{model} on {dataset}") as progress:
        what = {"model": model, "dataset": " ".join((dataset, *options))}
        result = job.measure(predict, files, **what, progress=lambda *state: progress(state))
    table(f"{model} on {result.dataset} ({len(result.pairs)} pairs)", job.SET_COLUMNS, job.rows_by_set(result))
    table("all pixels together", ["error", "value", "pixels"], job.rows_pooled(result))
    print(f"protocol: {job.protocol_line(result)}")
    for line in job.left_out(result):
        print(line)
    if json:
        report.as_json(result, json)
    if csv:
        report.as_csv(result, csv)
    if html:
        report.write_report(result, predict, files, html)
        print(html)


def submit(
    model: Positional[str],
    benchmark: Positional[Literal["sintel", "kitti2012", "kitti2015", "spring"]],
    /,
    root: Path,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("submission.zip"),
    steps: int | None = None,
    warm_start: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Predict the test frames of a public benchmark in its official layout, check every file, and zip them.

    An interrupted run continues by the same command. Nothing is uploaded.

    Args:
        model: a network, NETWORK:CHECKPOINT, dis, ..., a Python file with a function predict(image1, image2) -> flow;
            or a folder or .zip of finished files, which is only checked (./NAME where it is called like a network).
        benchmark: whose test frames and whose layout.
        root: the folder of the data set.
        output: the .zip to write; the files stay in the folder of the same name. Without .zip: that folder only.
        steps: refinement steps of the network; if not given those its authors took for the server, else its own.
        warm_start: let each pair start from where the one before it in its scene ended (RAFT, GMA, DEQ-Flow).
        device: auto, cpu, cuda, ...
        precision: of the convolutions.
    """
    from fleetflow import submit as job
    from fleetflow.evaluate import CLASSICAL, open_model
    from fleetflow.registry import models

    if job.is_finished(model, (*models, *CLASSICAL)):
        with bar(f"checking {model}") as progress:
            problems = job.problems(Path(model), benchmark, root, progress=lambda *state: progress(state))
        if problems:
            raise FleetflowError(f"{benchmark} would refuse {model}: {job.summary(problems)}")
        print(f"{model} is a whole submission to {benchmark}")
        return
    predict = open_model(model, benchmark, steps=steps, device=device, precision=precision, submission=True)
    label = {"model": model, **predict.label()}
    with bar(f"{model} on {benchmark}") as progress:
        options = {"warm_start": warm_start, "progress": lambda *state: progress(state)}
        written = job.submit(predict, benchmark, root, output, label, **options)
    print(written)
    print(job.next_step(benchmark, written))


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
    steps: int | None = None,
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
        steps: refinement steps of the networks; their own if not given.
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
    from fleetflow import benchmark as job
    from fleetflow.evaluate import in_line, make_room, open_files

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
        models, *size, device=device, threads=threads, precision=precision, steps=steps, seconds=seconds, peers=peers,
        training=training, pairs=files, dataset=dataset, batch=batch,
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

    from fleetflow import benchmark as job
    from fleetflow.data.loader import loading_speed
    from fleetflow.evaluate import in_line, machine, make_room, open_files

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
    from fleetflow import benchmark as job
    from fleetflow.evaluate import in_line, machine, make_room
    from fleetflow.predict import choose_device
    from fleetflow.video_reuse import PICARD, generated_clips, race_cells, reuse_cells, solver_race, video_reuse

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


def demo(output: Path = Path("demo")) -> None:
    """Predict the flow of the example in the package, compare it with the truth, and draw it.

    Args:
        output: the folder for the picture.
    """
    from fleetflow import demo as job

    result = job.demo(output)
    print(f"fastflownet on a generated pair of {result.height}x{result.width} pixels: {result.milliseconds:.0f} ms")
    print(f"mean error {result.epe:.2f} px (frames held still: {result.still:.2f} px)")
    print(result.picture)


def models(json: bool = False) -> None:
    """List the networks: size and cost, whose checkpoints they read, licences, our weights in the package, papers.

    Args:
        json: as JSON instead of a table.
    """
    from fleetflow import catalog

    rows = catalog.rows()
    if json:
        print(catalog.as_json(rows))
        return
    height, width = catalog.SIZE
    cells = [catalog.cells(row) for row in rows]
    costs, names = slice(0, 6), catalog.COLUMNS  # all columns together are too wide for a terminal
    table(f"networks (multiply-adds for frames of {height}x{width})", names[costs], [row[costs] for row in cells])
    sources = [0, 6, 7, 8]
    table("checkpoints they read", [names[k] for k in sources], [[row[k] for k in sources] for row in cells])


def convert(
    checkpoint: Positional[Path],
    variant: Positional[str],
    output: Positional[Path],
    /,
    licence: str = "unknown",
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write a published checkpoint in our format, .safetensors with a header.

    Args:
        checkpoint: the published file; nothing in it is executed.
        variant: the network it belongs to, such as fastflownet.
        output: the file to write.
        licence: of the weights, as their author states it.
        precision: of the stored weights.
    """
    import torch

    from fleetflow.models.weights import load, save

    if output.suffix != ".safetensors":
        raise FleetflowError(f"{output} does not end in .safetensors; name the output so")
    model = load(f"{variant}:{checkpoint}")
    header = {"network": variant, "licence": licence, "source": checkpoint.name}
    save(model, output, header, dtype=torch.float32 if precision == "fp32" else torch.float16)
    print(output)


def recipes() -> None:
    """List the training recipes: whose schedule each is, and two lines for each of its stages.

    A stage: name, steps, batch x size, learning rate and its schedule, optimiser and weight decay, loss, data sets and
    how their pairs are augmented.
    """
    from fleetflow.plan import described
    from fleetflow.recipes import RECIPES

    for name, plan in RECIPES.items():
        print(f"{name}: {plan.network}; {plan.source}")
        for stage in plan.stages:
            print(f"    {described(stage)}")


def doctor(
    what: Positional[Literal["dataset"]],
    name: Positional[str],
    root: Positional[Path],
    /,
    samples: int = 8,
) -> None:
    """Examine a data set: what is there and what is missing, unknown pixels, and whether its flow fits its frames.

    Args:
        what: dataset.
        name: such as sintel.
        root: the folder of the data set.
        samples: how many pairs to open, spread over the set.
    """
    from fleetflow import doctor as job

    report = job.check(name, root, samples=samples)
    parts = [[part.options, "missing" if part.problem else f"{part.pairs:,}"] for part in report.parts]
    table(f"{name} in {root}", ["part", "pairs"], parts)
    pairs = [
        [pair.name, f"{pair.height}x{pair.width}", f"{100 * pair.unknown:.1f}", f"{pair.length:.1f}",
         f"{pair.longest:.0f}", pair.extras]
        for pair in report.opened
    ]  # fmt: skip
    table("opened", ["pair", "size", "% unknown", "mean px", "longest px", "also known"], pairs)
    readings = [[reading, f"{ratio:.2f}"] for reading, ratio in report.readings.items()]
    table("difference of the frames, were the flow", ["stored", "times as read"], readings)
    for remark in report.remarks:
        print(f"remark: {remark}")
    if report.problems:
        raise FleetflowError("; ".join(report.problems))
    print("no problem was found")


COMMANDS = {
    "predict": predict,
    "train": train,
    "adapt": adapt,
    "evaluate": evaluate,
    "submit": submit,
    "benchmark": benchmark,
    "demo": demo,
    "models": models,
    "convert": convert,
    "recipes": recipes,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 after one line on what is wrong."""
    try:
        given = gathered(sys.argv[1:] if arguments is None else arguments)
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fleetflow", args=given, description=__doc__)
    except (FleetflowError, OSError) as error:
        print(f"fleetflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fleetflow: stopped; run the same command again to continue (train: with --resume)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
