"""The command `fleetflow doctor`."""

from pathlib import Path
from typing import Literal

from fleetflow.cli.console import table
from fleetflow.cli.options import Positional
from fleetflow.types import FleetflowError


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

    Examples:
        fleetflow doctor dataset sintel Sintel
        fleetflow doctor dataset pairs data --samples 20
    """
    from fleetflow.data import doctor as job

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
