"""The executor of many machines: Ray Data with a pool of actors, each with a network; Ray decides what runs where."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from fleetflow.batch.task import Job, Ready, Report, Task
from fleetflow.io.atomic import reason
from fleetflow.types import FleetflowError

try:
    import ray
    import ray.data
    from ray.exceptions import GetTimeoutError, RayError
except ImportError as error:
    missing = error.name or "ray"
    raise FleetflowError(
        f"batches on Ray need {missing}; pip install 'fleetflow[batch]', or leave out --on ray"
    ) from None

STARTS = 3  # tries to start a cluster of this machine, which may be busy
BEGIN = 120.0  # seconds in which a cluster must give the first worker its core or GPU


class Ray:
    """A pool of actors on the cluster of RAY_ADDRESS, or on one that is started on this machine. A context manager.

    Every machine needs fleetflow, and the folder of the results under the same path or address.

    Attributes:
        label: what the results of its workers depend on.
        workers: how many actors there are.
    """

    def __init__(self, job: Job, workers: int = 0):
        """Connects, and asks one worker what the network is.

        Args:
            job: what the workers are told.
            workers: 0 takes one for each GPU of the cluster, or for each `job.threads` cores.

        Raises:
            FleetflowError: the network cannot be loaded, there is no such cluster, or it has nothing free.
        """
        if workers < 0:
            raise FleetflowError(f"--workers is {workers}; expected a number from 1 on, or 0 for all")
        self._job = job
        self._started = not ray.is_initialized()
        if self._started:
            _connect()
        try:
            found = ray.cluster_resources()
            gpus = int(found.get("GPU", 0)) if job.settings.device in ("auto", "cuda") else 0
            self._resources = {"num_gpus": 1} if gpus else {"num_cpus": job.threads}
            self.workers = workers or gpus or max(1, int(found.get("CPU", 1)) // job.threads)
            self.label = self._first().label
        except BaseException:
            self._end()
            raise

    def _first(self) -> Ready:
        """What a worker says of its network: from the place where workers run, which need not be like this one."""
        asked = ray.remote(_ready).options(**self._resources, max_retries=3).remote(self._job)
        try:
            found = ray.get(asked, timeout=BEGIN)
        except GetTimeoutError:
            resources = " ".join(f"{name}={count}" for name, count in self._resources.items())
            raise FleetflowError(f"the cluster has had no room ({resources}) for a worker in {BEGIN:.0f} s") from None
        except RayError as error:
            raise FleetflowError(f"no worker can begin ({str(error).splitlines()[-1]}); see Ray's logs") from None
        if isinstance(found, FleetflowError):
            raise found
        return found

    def run(self, shards: Iterable[str]) -> Iterator[Report | None]:
        """Yields a report for every task of the lists of items, as they end; after a crash a task may come twice."""
        job = replace(self._job, label=self.label)
        context = ray.data.DataContext.get_current()
        before = context.target_max_block_size, context.enable_progress_bars
        # One task a block: what is handed to an actor, and done anew when a machine is lost.
        context.target_max_block_size, context.enable_progress_bars = 1, False
        try:
            tasks = ray.data.from_items([{"shard": shard} for shard in shards])
            # Reading lists takes no core from the actors, which have them all.
            tasks = tasks.flat_map(_Plan(job), num_cpus=0)
            pool = ray.data.ActorPoolStrategy(size=self.workers)
            reports = tasks.map_batches(
                _Actor,
                batch_size=1,
                compute=pool,
                fn_constructor_args=(job,),
                num_cpus=self._resources.get("num_cpus"),
                num_gpus=self._resources.get("num_gpus"),
            )
            for row in reports.iter_rows():
                yield Report(*json.loads(row["report"]))
        except RayError as error:
            raise FleetflowError(f"Ray gave up ({str(error).splitlines()[-1]}); see its logs") from error
        finally:
            context.target_max_block_size, context.enable_progress_bars = before

    def state(self) -> list[dict]:
        """Returns nothing: Ray's dashboard shows its workers."""
        return []

    def _end(self) -> None:
        if self._started:
            ray.shutdown()

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *_) -> None:
        self._end()


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS")
    # Its core writes lines about every pool of actors beside our progress; they are in its logs, too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    why = ""
    for _ in range(STARTS if address is None else 1):
        try:
            with warnings.catch_warnings(), _silence():
                warnings.simplefilter("ignore")
                ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False)
            return
        except Exception as error:  # with a plain one Ray says that its processes have not come up in 30 s
            why = reason(error)
            ray.shutdown()
    if address is None:
        raise FleetflowError(f"Ray does not start on this machine ({why}); try again, or leave out --on ray")
    raise FleetflowError(f"there is no Ray cluster at {address} ({why}); start one, or unset RAY_ADDRESS")


@contextmanager
def _silence() -> Iterator[None]:
    """Sends what the core of Ray writes to standard error as it starts nowhere; what is wrong comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _ready(job: Job) -> Ready | FleetflowError:
    from fleetflow.batch.work import Worker

    try:
        return Worker(job).ready()
    except FleetflowError as error:
        return FleetflowError(str(error))


class _Plan:
    """The tasks of a list of items, as rows."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self, row: dict) -> Iterator[dict]:
        from fleetflow.batch.plan import plan

        for item in self.job.store.items(row["shard"]):
            for task in plan(self.job, item):
                yield {"task": json.dumps(task)}  # ASCII, whatever bytes a name is made of


class _Actor:
    """A worker that takes and gives rows."""

    def __init__(self, job: Job):
        from fleetflow.batch.work import Worker

        try:
            self.worker = Worker(job)
        except FleetflowError as error:
            why = str(error)
            self.worker = lambda task: Report(task.item.id, "stop", why)

    def __call__(self, rows: dict) -> dict:
        from fleetflow.batch.manifest import Item

        tasks = [Task(Item(*item), *rest) for item, *rest in map(json.loads, rows["task"].tolist())]
        return {"report": [json.dumps(self.worker(task)) for task in tasks]}
