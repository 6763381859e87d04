"""The command line: each command is a typed function, and its signature is its help. torch is imported by the jobs."""

import sys

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
