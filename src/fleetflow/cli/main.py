"""Predict, train, evaluate and compare networks for optical flow.

Run `fleetflow COMMAND --help` for the options of a command and two examples; with `--debug` any command shows the
traceback of an error.
"""

# Each command is a typed function, and its signature is its help. torch is imported by the jobs, not here.

import codecs
import inspect
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import fleetflow
from fleetflow.cli import batch, benchmark
from fleetflow.cli.adapt import adapt
from fleetflow.cli.convert import convert
from fleetflow.cli.demo import demo
from fleetflow.cli.desk import desk
from fleetflow.cli.doctor import doctor
from fleetflow.cli.evaluate import evaluate
from fleetflow.cli.export import export
from fleetflow.cli.models import models
from fleetflow.cli.motion import motion
from fleetflow.cli.predict import predict
from fleetflow.cli.recipes import recipes
from fleetflow.cli.submit import submit
from fleetflow.cli.track import track
from fleetflow.cli.train import train
from fleetflow.types import FleetflowError


class Group(NamedTuple):
    """A command with commands of its own, such as `fleetflow benchmark speed`; `default` need not be named."""

    summary: str | None
    commands: Mapping[str, "Callable | Group"]
    default: str | None = None


BATCH = (batch.run, batch.manifest, batch.status, batch.retry)
COMMANDS: dict[str, Callable | Group] = {
    "predict": predict,
    "track": track,
    "motion": motion,
    "train": train,
    "adapt": adapt,
    "evaluate": evaluate,
    "submit": submit,
    "benchmark": Group(benchmark.__doc__, {"speed": benchmark.speed, "data": benchmark.data, "video": benchmark.video}),
    "batch": Group(batch.__doc__, {each.__name__: each for each in BATCH}, default="run"),
    "demo": demo,
    "desk": desk,
    "models": models,
    "convert": convert,
    "export": export,
    "recipes": recipes,
    "doctor": doctor,
}


PATHS = ConstructorRegistry()


@PATHS.primitive_rule
def _path(about: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Paths with the home folder in the place of ~, which a shell leaves as it is in --output=~/folder."""
    if about.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


class Stopped(KeyboardInterrupt):
    """The system asked us to end; handled as Ctrl-C is. Its argument is the number of the signal."""


@contextmanager
def _ending_as_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise what Ctrl-C raises, so that every run ends in the same way."""
    own = os.getpid()

    def stop(number: int, _) -> None:
        if os.getpid() != own:  # a forked worker ends at once
            os._exit(128 + number)
        raise Stopped(number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        try:
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words behind `fleetflow`; None takes those of this process. `--debug` among them shows the
            traceback of every error.

    Returns:
        0; 1 after one line on what is wrong; 128 and the number of the signal that ended it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    _prepare_streams()
    try:
        with _ending_as_ctrl_c():
            _run(given)
            sys.stdout.flush()
    except (FleetflowError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # as behind `| head`
            return 128 + 13  # SIGPIPE, as other programs end
        if debug:
            raise
        _complain(str(error) or "out of memory")
        return 1
    except KeyboardInterrupt as error:
        option = {"train": " with --resume", "desk": None, "benchmark": None}.get(given[0] if given else "", "")
        _complain("stopped" if option is None else f"stopped; run the same command again{option} to continue")
        return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    return 0


def _run(given: list[str]) -> None:
    """Runs the command that is the first word; prints its examples behind its help."""
    if given == ["--version"]:
        print(f"fleetflow {fleetflow.__version__}")
        return
    commands, prog, about = COMMANDS, "fleetflow", __doc__
    while given and isinstance(group := commands.get(given[0]), Group):
        commands, prog, about = group.commands, f"{prog} {given[0]}", group.summary
        given = given[1:]
        if group.default and given[:1] and given[0] not in commands:
            given = [group.default, *given]
    try:
        listed = {name: _listed(command) for name, command in commands.items()}
        with PATHS:
            tyro.extras.subcommand_cli_from_dict(listed, prog=prog, args=given, description=about)
    except SystemExit as end:
        if end.code in (0, None):
            asked = commands[given[0]] if given and given[0] in commands else Group("", commands)
            print("examples:", *(f"  {line}" for line in examples(asked)), sep="\n")
            sys.stdout.flush()
        raise


def _listed(command: Callable | Group) -> Callable:
    """A command as the parser takes it; of a group only its summary is shown."""
    if not isinstance(command, Group):
        return command

    def group() -> None: ...

    group.__doc__ = command.summary
    return group


def examples(command: Callable | Group) -> list[str]:
    """Returns the lines of the last section of a command's docstring, "Examples:"; of a group those of two commands."""
    if isinstance(command, Group):
        return [examples(each)[0] for each in list(command.commands.values())[:2]]
    lines = (inspect.getdoc(command) or "").partition("\nExamples:\n")[2].splitlines()
    return [line.strip() for line in lines if line.strip()]


def _prepare_streams() -> None:
    """Lets everything be printed: characters that the terminal cannot show, and where there is no terminal at all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed by who called us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fleetflow")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """What is printed for a character that the encoding lacks: the bullet of a list as *, others as \\u7801."""
    if isinstance(error, UnicodeEncodeError) and error.object[error.start] == "\u2022":
        return "*", error.start + 1
    text, place = codecs.backslashreplace_errors(error)
    return str(text), place


codecs.register_error("fleetflow", _replaced)


def _complain(what: str) -> None:
    with suppress(OSError):
        print(f"fleetflow: {what}", file=sys.stderr)


def _nobody_reads() -> bool:
    """Whether the reader of our output is gone, and not that of another pipe; what is left to print then goes nowhere."""
    output = sys.stdout.fileno()
    if hasattr(select, "poll"):  # not on Windows
        poll = select.poll()
        poll.register(output, 0)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return False
    with open(os.devnull, "w") as nowhere:  # or Python would complain at its end
        os.dup2(nowhere.fileno(), output)
    return True


if __name__ == "__main__":
    sys.exit(main())
