"""What a benchmark found as rows of text and as lines of JSON."""

from fleetflow.evaluation.machine import in_line
from fleetflow.evaluation.speed import DIS_NAME, REFERENCE, Report

COLUMNS = ["", "p50 ms", "p95 ms", "runs", "x DIS", "x reference", "EPE px"]  # of `table`; x: times as long as that


def table(report: Report) -> list[list[str]]:
    """Returns the timings as text, a row for each timing, with COLUMNS."""
    rows = []
    for timing in report.timings:
        values = [report.times(timing, DIS_NAME), report.times(timing, REFERENCE), timing.epe]
        cells = ["-" if value is None else _digits(value) for value in values]
        rows.append([timing.name, f"{timing.p50:.1f}", f"{timing.p95:.1f}", str(timing.runs), *cells])
    return rows


def _digits(value: float) -> str:
    """The value with three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def facts(report: Report) -> list[str]:
    """Returns what else was found, one line each."""
    ours = report.timings[0]
    dis, reference = report.times(ours, DIS_NAME), report.times(ours, REFERENCE)
    latency = f"latency: {_digits(dis)} times that of DIS; " if dis else ""
    lines = [f"{latency}speed-up over the reference implementation: {_digits(1 / reference)}"] if reference else []
    if report.batch > 1:
        lines.append(f"batches of {report.batch}, as tensors; milliseconds are of one pair, peers take single ones")
    if report.iterations:
        lines.append(f"{report.iterations} refinement iterations")
    adds = report.multiply_adds_448x1024
    cost = "" if adds is None else f", {adds / 1e9:.1f} G multiply-adds at 448x1024"
    lines.append(f"{report.parameters:,} parameters{cost}")
    memory = "could not be measured" if report.memory is None else f"{report.memory:.0f} MB"
    lines.append(f"memory of a {'prediction' if report.batch == 1 else 'batch'}: {memory}")
    lines.append(f"mean difference to float32: {report.difference:.4f} px")
    if report.training:
        lines.append(f"training at 256x320, batch 8: {report.training:.1f} samples/s")
    if report.weights == "random":
        lines.append("weights are random: no accuracy is measured, and the difference is that of random weights")
    if report.epe is not None:
        lines.append(f"EPE, mean of the sets, {report.pairs} pairs: {report.epe:.2f} px")
        lines.append(f"protocol: {in_line(report.protocol)}")
    return lines


def row(report: Report) -> dict:
    """Returns the row of JSON of a report: its fields, and our latency as a multiple of two others."""
    ours = report.timings[0]
    return {
        **report._asdict(),
        "times_dis": report.times(ours, DIS_NAME),
        "times_reference": report.times(ours, REFERENCE),
        "timings": [timing._asdict() for timing in report.timings],
    }
