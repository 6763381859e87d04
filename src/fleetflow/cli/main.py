"""The command line: each command is a typed function, and its signature is its help. torch is imported by the jobs."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import tyro

from fleetflow.cli.adapt import adapt
from fleetflow.cli.benchmark import benchmark
from fleetflow.cli.console import gathered
from fleetflow.cli.convert import convert
from fleetflow.cli.demo import demo
from fleetflow.cli.doctor import doctor
from fleetflow.cli.evaluate import evaluate
from fleetflow.cli.models import models
from fleetflow.cli.predict import predict
from fleetflow.cli.recipes import recipes
from fleetflow.cli.submit import submit
from fleetflow.cli.train import train
from fleetflow.types import FleetflowError

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
    """Runs one command; returns 0, 1 after one line on what is wrong, or 128 and the number of the signal that ended it."""
    try:
        with _ending_as_ctrl_c():
            given = gathered(sys.argv[1:] if arguments is None else arguments)
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fleetflow", args=given, description=__doc__)
    except (FleetflowError, OSError) as error:
        print(f"fleetflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("fleetflow: stopped; run the same command again to continue (train: with --resume)", file=sys.stderr)
        return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
