"""The executor of one machine: processes that load the network once; one that dies is replaced, its task tried again."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from fleetflow.batch.manifest import Item
from fleetflow.batch.task import Job, Ready, Report, Task
from fleetflow.types import FleetflowError

QUEUED = 2  # tasks that a worker has: one in work, one that waits, so that it never does
STARTS = 3  # times in a row that a worker may die before it has loaded its network
QUIET = 1.0  # seconds without a report, after which the run looks around
PATIENCE = 5.0  # seconds for a worker to end when it is asked to


class Local:
    """Processes of this machine. A context manager; leaving it ends them.

    Attributes:
        label: what the results of its workers depend on.
        workers: how many there are.
    """

    def __init__(self, job: Job, workers: int = 0):
        """Starts the first worker, which says what the network is and how many workers are of use.

        Args:
            job: what the workers are told.
            workers: 0 takes one a GPU, or one for `job.threads` cores.

        Raises:
            FleetflowError: the network cannot be loaded, or `workers` is under 0.
        """
        if workers < 0:
            raise FleetflowError(f"--workers is {workers}; expected a number from 1 on, or 0 for all")
        # A forked server has loaded torch already when a worker is to be replaced. It starts before any thread of ours.
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self._context.set_forkserver_preload(["fleetflow.batch.work"])
        self._job, self._deaths = job, 0
        self._processes: dict[int, _Process] = {}
        self._start(0)
        try:
            self.label, gpus = self._first()
        except BaseException:
            self._end()
            raise
        self.workers = workers or gpus or max(1, cores() // job.threads)

    def _first(self) -> Ready:
        while True:
            for process, message in self._messages():
                if message is None:
                    self._replace(process)
                elif isinstance(message, Ready):  # nothing else is said before a task is given
                    return message

    def run(self, shards: Iterable[str]) -> Iterator[Report | None]:
        """Yields a report for every task of the lists of items, as they end; None where for a while there is none."""
        items = (item for shard in shards for item in self._job.store.items(shard))
        waiting: deque[Task | Item] = (
            deque()
        )  # tasks that come before the next items: ranges, and those of workers that died
        for index in range(1, self.workers):
            self._start(index)
        while True:
            for process in self._processes.values():
                while process.ready and len(process.tasks) < QUEUED:
                    task = waiting.popleft() if waiting else next(items, None)
                    if task is None:
                        break
                    process.give(task)
            if not waiting and not any(process.tasks for process in self._processes.values()):
                return
            yield None
            for process, message in self._messages():
                if message is None:
                    waiting.extendleft(reversed(process.tasks))
                    self._replace(process)
                elif isinstance(message, Report):
                    process.tasks.popleft()
                    waiting.extendleft(reversed(message.tasks))
                    yield message

    def state(self) -> list[dict]:
        """Returns the process of each worker and the id of the item it is at."""
        found = []
        for process in self._processes.values():
            task = process.tasks[0] if process.tasks else None
            item = task if isinstance(task, Item) or task is None else task.item
            found.append({"pid": process.process.pid, "item": item and item.id})
        return found

    def _start(self, index: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._job, index, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[index] = _Process(index, process, ours)

    def _messages(self) -> Iterator[tuple["_Process", Ready | Report | None]]:
        """Yields what the workers say, when they say something; None of one that has died with tasks in hand."""
        by_pipe = {process.pipe: process for process in self._processes.values()}
        ready: list[Any] = wait(list(by_pipe), timeout=QUIET)
        for pipe in ready:
            process = by_pipe[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            if isinstance(message, FleetflowError):
                raise message
            if isinstance(message, Ready):
                process.ready, self._deaths = True, 0
            yield process, message

    def _replace(self, process: "_Process") -> None:
        process.process.join(PATIENCE)
        if not process.ready:
            self._deaths += 1
            if self._deaths >= STARTS:
                code = process.process.exitcode
                how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
                raise FleetflowError(
                    f"workers die before they have loaded the network ({how}), perhaps for want of memory; use fewer "
                    "--workers"
                )
        process.pipe.close()
        self._start(process.index)

    def _end(self) -> None:
        for process in self._processes.values():
            process.process.terminate()
        for process in self._processes.values():
            process.process.join(PATIENCE)
            if process.process.is_alive():
                process.process.kill()
                process.process.join()
            process.pipe.close()
        self._processes.clear()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_) -> None:
        self._end()


class _Process:
    """A worker as the run sees it: its process, its pipe, and the tasks it was given, the one in work first."""

    def __init__(self, index: int, process: multiprocessing.Process, pipe: Connection):
        self.index, self.process, self.pipe = index, process, pipe
        self.tasks: deque[Task | Item] = deque()
        self.ready = False

    def give(self, task: Task | Item) -> None:
        self.tasks.append(task)
        with suppress(OSError):  # it is dead, which the next look at its pipe shows
            self.pipe.send(task)


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(job: Job, index: int, pipe: Connection) -> None:
    """The life of a worker: loads, says so, does what it is given, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    from fleetflow.batch.work import Worker

    try:
        worker = Worker(job, index)
    except FleetflowError as error:
        pipe.send(FleetflowError(str(error)))
        return
    pipe.send(worker.ready())
    with suppress(EOFError, OSError):
        while True:
            pipe.send(worker(pipe.recv()))


def _end_with(sentinel: int) -> None:
    """Ends this process, whatever it is doing, when the run is gone."""
    wait([sentinel])
    os._exit(1)
