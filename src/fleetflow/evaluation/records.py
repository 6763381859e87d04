"""Numbers in files for other programs: an evaluation as JSON and as CSV, rows of a benchmark as lines of JSON."""

import csv
import json
import math
from pathlib import Path

from fleetflow.evaluation.evaluate import Evaluation
from fleetflow.evaluation.metrics import SPEED_EDGES, Mean, ause, quantile
from fleetflow.evaluation.tables import QUANTILES, protocol_line
from fleetflow.io.atomic import write_atomically, writing


def as_json(evaluation: Evaluation, path: Path) -> None:
    """Writes protocol, machine, score, pooled errors, quantiles, curves and all pairs as JSON.

    A number with nothing to measure is null; an infinite one is the string "infinite".
    """
    curves, histogram = evaluation.curves(), evaluation.histogram()
    speeds = [Mean(total, int(count)) for total, count in evaluation.speeds().T.tolist()]
    content = {
        **{key: getattr(evaluation, key) for key in ("model", "dataset", "protocol", "machine", "skipped")},
        "score": evaluation.score(),
        "pooled": {name: _numbers(sums) for name, sums in evaluation.pooled().items()},
        "quantiles": {str(share): quantile(histogram, share) for share in QUANTILES},
        "epe_by_speed": [
            {"from": low, "to": high, "value": mean.value, "pixels": mean.count}
            for low, high, mean in zip(SPEED_EDGES, SPEED_EDGES[1:], speeds)
        ],
        "ause": None if curves is None else ause(curves),
        "ause_left_out": evaluation.unsorted(),
        "sparsification": None if curves is None else curves.tolist(),
        "pairs": [{"set": pair.group, "pair": pair.name, **_numbers(pair.sums)} for pair in evaluation.pairs],
    }
    whole = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(whole))


def as_csv(evaluation: Evaluation, path: Path) -> None:
    """Writes one line per pair: set, pair, known pixels, every error of `pixel_sums`, and quantiles of the error.

    Each line ends with the model, the data set and the protocol, so that files can be joined.
    """
    whole = [evaluation.model, evaluation.dataset, protocol_line(evaluation)]
    names = list(dict.fromkeys(key for pair in evaluation.pairs for key in pair.sums))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            table = csv.writer(file)
            shares = [f"q{100 * share:g}" for share in QUANTILES]
            table.writerow(["set", "pair", "pixels", *names, *shares, "ause", "model", "dataset", "protocol"])
            for pair in evaluation.pairs:
                values = [pair.sums[name].value if name in pair.sums else math.nan for name in names]
                values += [quantile(pair.histogram, share) for share in QUANTILES]
                values.append(math.nan if pair.curves is None else ause(pair.curves))
                cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
                table.writerow([pair.group, pair.name, pair.sums["epe"].count, *cells, *whole])

    write_atomically(path, write)


def _numbers(sums: dict[str, Mean]) -> dict[str, dict[str, float]]:
    return {name: {"value": mean.value, "pixels": mean.count} for name, mean in sums.items()}


def plain(value):
    """Returns the value for JSON: not-a-number becomes null, an infinite number "infinite"."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite"
    return value


def append(rows: list[dict], path: Path) -> None:
    """Adds a line of JSON to a file for each row; not-a-number becomes null, an infinite number "infinite"."""
    with writing(path), path.open("a") as file:
        file.writelines(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
