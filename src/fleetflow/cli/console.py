"""What the command line shows on the terminal: tables and progress."""

import sys
from collections.abc import Sequence


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


class bar:
    """A progress bar on standard error: share, rate, time left. Called with (done, total) or (done, total, what)."""

    def __init__(self, title: str, *, unit: str = "frames"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(title, total=None, rate="")
        self.title, self.what, self.unit = title, "", unit
        self.first: int | None = None

    def __call__(self, state: Sequence) -> None:
        done, total, *more = state
        what = more[0] if more else ""
        first = self.first
        if first is None:  # not before there is something to show: an error would stand behind an empty bar
            self.bar.start()
        elif what != self.what:
            self.bar.reset(self.task)
        if first is None or what != self.what:
            first = done
        self.first, self.what = first, what
        elapsed = self.bar.tasks[0].elapsed or 0
        moved = done - first + (first > 0)  # a job that begins with 0 has done nothing then
        rate = f"{moved / elapsed:.1f} {self.unit}/s" if elapsed > 0 and moved else ""
        description = f"{self.title}: {what}" if what else self.title
        self.bar.update(self.task, description=description, completed=done, total=total, rate=rate)

    def __enter__(self) -> "bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
