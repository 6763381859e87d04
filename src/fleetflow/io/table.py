"""Tables of results: .csv, .json, and .parquet where pyarrow is installed."""

import csv
import json
import math
import os
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from fleetflow.io.atomic import write_atomically
from fleetflow.types import FleetflowError

SUFFIXES = (".csv", ".json", ".parquet")
Value = str | int | float | bool | None


def check_table(path: str | os.PathLike) -> None:
    """Raises FleetflowError for a path that `write_table` is going to refuse, so that nobody works for nothing."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise FleetflowError(f'{path} has the suffix "{suffix}"; expected {", ".join(SUFFIXES)}')
    if suffix == ".parquet":
        _parquet()


def write_table(path: str | os.PathLike, rows: Sequence[dict[str, Value]]) -> None:
    """Writes rows that all have the same keys; what is not a number is empty in .csv, null in .json and .parquet.

    Args:
        path: the file, which ends in .csv, .json (a list of objects) or .parquet (needs the extra "batch").
        rows: one or more.

    Raises:
        FleetflowError: for another suffix, without pyarrow for .parquet, and where the file cannot be written.
    """
    check_table(path)
    rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        arrow, parquet = _parquet()
        table = arrow.Table.from_pylist([{name: _encodable(value) for name, value in row.items()} for row in rows])
        write_atomically(path, lambda temporary: parquet.write_table(table, temporary))
        return
    if suffix == ".json":
        text = json.dumps(rows, indent=1) + "\n"
    else:
        buffer = StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8", "surrogateescape", ""))


def _encodable(value: Value) -> Value:
    """The value; of a name whose bytes are not UTF-8, which .parquet cannot hold, these as \\xff."""
    return os.fsencode(value).decode("utf-8", "backslashreplace") if isinstance(value, str) else value


def _plain(value: Value) -> Value:
    """The value, rounded to what is meant; None for what is not a number."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _parquet():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FleetflowError(
            '.parquet needs pyarrow; run pip install "fleetflow[batch]", or name a .csv file'
        ) from None
    return pyarrow, parquet
