"""Doing tasks in several processes, of this machine or of a cluster, of which the system may kill some."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import joblib

from ..errors import ZsuError

KILLED = "its process was killed, as systems do when memory runs out"
Result = tuple[Any, str | None]  # what `do` returns: its task, and what went wrong


def in_processes(do: Callable, tasks: list, jobs: int) -> Iterator[Result]:
    """In so many processes. Where one is killed, others take over; what had begun is tried again, one by one."""
    waiting, begun, again = deque(tasks), [], []

    def begin() -> Iterator:
        while waiting:
            begun.append(waiting.popleft())
            yield joblib.delayed(do)(begun[-1])

    while waiting:
        try:  # without a queue, so that only what has begun is lost
            pool = joblib.Parallel(jobs, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)
            for task, error in pool(begin()):
                begun.remove(task)
                yield task, error
        except BrokenProcessPool:
            again += begun
            begun.clear()
    for task in again:
        try:
            yield from joblib.Parallel(2)([joblib.delayed(do)(task)])  # of one process it would be this one
        except BrokenProcessPool:
            yield task, KILLED


def on_cluster(do: Callable, tasks: list, scheduler: str) -> Iterator[Result]:
    """On the workers of a Dask scheduler, which gives the task of a dead worker to another."""
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise ZsuError("Dask is missing", where="sweep", remedy="pip install 'zsu[cluster]'") from error
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise ZsuError(f"no Dask scheduler at {scheduler!r} ({error})", where="sweep", remedy="start one") from error
    with client:
        futures = {client.submit(do, task, pure=False): task for task in tasks}
        for future in as_completed(futures):
            if future.status == "finished":
                yield future.result()
            elif future.status == "error":
                raised = future.exception()
                yield futures[future], KILLED if isinstance(raised, KilledWorker) else str(raised)
            else:
                yield futures[future], "the scheduler is gone"
