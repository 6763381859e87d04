"""What the command line shows on the terminal, and how it reads options that are given several times."""

import sys

LISTS = ("--start", "--set", "--options", "--without", "--peers", "--clips", "--format")  # options of several values


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
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
    """A progress bar on standard error: share, pairs per second, time left. Called with (done, total)."""

    def __init__(self, title: str):
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
        self.first: int | None = None

    def __call__(self, state) -> None:
        done, total = state
        if self.first is None:  # not before there is something to show: an error would stand behind an empty bar
            self.first = done
            self.bar.start()
        elapsed = self.bar.tasks[0].elapsed or 0
        rate = f"{(done - self.first + 1) / elapsed:.1f} frames/s" if elapsed > 0 else ""
        self.bar.update(self.task, completed=done, total=total, rate=rate)

    def __enter__(self) -> "bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()


def gathered(arguments: list[str]) -> list[str]:
    """Returns the arguments with the values of an option that is given several times behind its first mention.

    `--set a=1 --seed 2 --set=b=3` becomes `--set a=1 b=3 --seed 2`, as an option of several values is read.
    """
    kept: list[list[str]] = [[]]  # what precedes the first option, then each option with what follows it
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = "--format" if name == "-f" else name
        if name in LISTS:
            kept.append([name, value] if equals else [name])
        elif argument.startswith("-") and len(argument) > 1:
            kept.append([argument])
        else:
            kept[-1].append(argument)
    first: dict[str, list[str]] = {}
    for group in kept[1:]:
        if group[0] in LISTS and group[0] in first:
            first[group[0]] += group[1:]
            group.clear()
        elif group[0] in LISTS:
            first[group[0]] = group
    return [argument for group in kept for argument in group]
