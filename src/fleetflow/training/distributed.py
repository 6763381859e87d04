"""The processes of a training run, started by torchrun on one machine or on several, and the signals that end it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fleetflow.inference.device import choose_device
from fleetflow.types import FleetflowError

PATIENCE = timedelta(hours=12)  # the others wait while the first one validates


@dataclass(frozen=True)
class Team:
    """The processes that train together: the rank of this one, their number, and the device of this one."""

    rank: int
    world: int
    device: torch.device

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set in any process: all of them stop at the same step."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.item() > 0

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns the sums over the processes."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> Team:
    """Joins the other processes of torchrun, if there are any.

    Raises:
        FleetflowError: the device cannot be used, or what torchrun sets is set in part.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team(0, 1, choose_device(device))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise FleetflowError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; start with torchrun, or unset it"
        )
    own = choose_device(device)
    if own.type == "cuda":
        own = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
    return Team(dist.get_rank(), dist.get_world_size(), own)


def leave() -> None:
    """Parts from the other processes of torchrun, after the last run; one group serves all runs of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Signals:
    """What SIGINT, SIGTERM and SIGHUP ask for: a step in progress is finished first; a second signal ends at once.

    Outside of `held` they do at once what they did before.
    """

    def __init__(self):
        self.caught: int | None = None
        self._holding = False
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs, the first signal waits for its end, where the training writes a checkpoint."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def __enter__(self) -> "Signals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            with suppress(AttributeError, ValueError):  # Windows has no SIGHUP; or this is not the main thread
                number = getattr(signal, name)
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame) -> None:
        if self._holding and self.caught is None:
            self.caught = number
            return
        self.end(number, frame)

    def end(self, number: int, frame=None) -> None:
        """Does what the signal did before training began: raise KeyboardInterrupt, or end the process."""
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
            return
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
