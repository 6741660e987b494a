"""Tasks on Dask: processes of this machine, or the workers of a scheduler, with resources."""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.deploy.sweep.tasks import (
    BLOCKED,
    DONE,
    FAILED,
    SKIPPED,
    Result,
    Task,
    execute,
    finished,
    read_result,
)
from edgeattn.foundation import UserError, remove_leftovers, write_text

if TYPE_CHECKING:
    from distributed import Client, Future

Progress = Callable[[str, int, int], None]
"""Called with a stage, the tasks of it that have ended, and all of them."""

PATIENCE = 60.0
"""Seconds that a task waits for a worker with its resource to come back; a process is restarted within a few."""

POLL_SECONDS = 2.0
"""Seconds between looks at the workers while no task ends."""

CONNECTION_SECONDS = 15.0
"""Seconds that a scheduler has to answer."""

_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Environment of local workers: as many processes as there are processors, so one thread each."""


@dataclass(frozen=True)
class Workers:
    """Who executes tasks.

    Attributes:
        scheduler: address of a Dask scheduler, such as "tcp://10.0.0.1:8786"; local processes when None. Whoever
            reaches a scheduler can run code on its workers, so it belongs into a trusted network.
        count: local processes.
    """

    scheduler: str | None = None
    count: int = 2


def run_tasks(
    tasks: Sequence[Task], root: Path, workers: Workers, progress: Progress | None = None, *, call: str
) -> dict[str, Result]:
    """Execute tasks, those whose results are there already excepted.

    Args:
        tasks: what to do; a task comes after those it needs.
        root: folder of results, which all workers see under the same path.
        workers: who executes them.
        progress: told about ended tasks.
        call: name of this call, unlike any earlier one; results that it makes carry it.

    Returns:
        The results by the names of the tasks: every task has one.

    Raises:
        UserError: Dask is not installed, the scheduler cannot be reached, has no workers or is lost on the way, or one
            of its workers does not see the folder.
    """
    tally = _Tally(tasks, progress)
    results: dict[str, Result] = {}
    rest: list[Task] = []
    for task in tasks:
        known = None
        if all(name in results for name in task.needs):
            known = finished(task, root, [results[name] for name in task.needs])
        if known is not None:
            results[task.name] = known
            tally.ended(task)
        else:
            rest.append(task)
    if not rest:
        return results
    with _client(workers, len(rest)) as client:
        _require_folder(client, root)
        try:
            _Run(client, root, call, results, tally).run(rest)
        except OSError as error:
            raise UserError(
                f"the connection to the scheduler was lost ({error}). Give the same command again once it is back: "
                "what is finished is not repeated."
            ) from error
    return {task.name: results[task.name] for task in tasks}


class _Tally:
    """Counts ended tasks by stage."""

    def __init__(self, tasks: Sequence[Task], progress: Progress | None) -> None:
        self._totals = Counter(task.stage for task in tasks)
        self._done: Counter[str] = Counter()
        self._progress = progress or (lambda stage, done, total: None)
        for stage, total in self._totals.items():
            self._progress(stage, 0, total)

    def ended(self, task: Task) -> None:
        self._done[task.stage] += 1
        self._progress(task.stage, self._done[task.stage], self._totals[task.stage])


class _Run:
    """Tasks that are with the workers.

    Args:
        client: connection to the scheduler.
        root: folder of results.
        call: which call of the sweep this is.
        results: results by name, added to.
        tally: told about ended tasks.
    """

    def __init__(self, client: Client, root: Path, call: str, results: dict[str, Result], tally: _Tally) -> None:
        self._client, self._root, self._call = client, root, call
        self._results, self._tally = results, tally
        self._pending: dict[str, tuple[Task, Future]] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self, tasks: Sequence[Task]) -> None:
        """Execute tasks, each after those it needs.

        The scheduler is never told what a task needs: it would keep results in the memory of workers, and wait for a
        worker that died with one, whereas they are in files.
        """
        waiting = self._begin(tasks)
        missed_since: dict[str | None, float] = {}
        while self._pending:
            try:
                self._collect(self._ended.get(timeout=POLL_SECONDS))
            except queue.Empty:
                self._give_up(missed_since)
            waiting = self._begin(waiting)

    def _begin(self, tasks: Sequence[Task]) -> list[Task]:
        """Submit the tasks that have all they need, end those that cannot begin, and return the others."""
        waiting = []
        for task in tasks:
            if not all(name in self._results for name in task.needs):
                waiting.append(task)
                continue
            needed = [self._results[name] for name in task.needs]
            if lacking := next((result for result in needed if result.status != DONE), None):
                reason = f"needs {lacking.name}, which is {lacking.status}"
                self._end(task, Result(task.name, task.key, BLOCKED, self._call, reason))
            elif task.resource is not None and task.resource not in self._resources():
                self._end(task, self._skipped(task))
            else:
                self._submit(task, needed)
        return waiting

    def _submit(self, task: Task, needed: Sequence[Result]) -> None:
        future = self._client.submit(
            execute,
            task,
            self._root,
            self._call,
            needed,
            key=f"{task.name} {task.key} {self._call}",
            resources={task.resource: 1} if task.resource else None,
            pure=False,
        )
        self._pending[task.name] = task, future
        future.add_done_callback(lambda _, name=task.name: self._ended.put(name))

    def _collect(self, name: str) -> None:
        if name not in self._pending:  # given up meanwhile
            return
        task, future = self._pending.pop(name)
        result = read_result(task, self._root)
        if result is None or (result.call != self._call and (future.status != "finished" or result.status != DONE)):
            result = self._fetched(task, future)
        self._end(task, result)

    def _fetched(self, task: Task, future: Future) -> Result:
        """Return the result of a task whose file cannot be seen here; network file systems may show it later."""
        reason = _reason(future)
        if future.status == "finished":
            try:
                result: Result = future.result(timeout=CONNECTION_SECONDS)
            except Exception as error:  # the worker is gone, and the result with it
                reason = f"its result cannot be seen here, and its worker does not answer ({type(error).__name__})"
            else:
                return result
        return Result(task.name, task.key, FAILED, self._call, reason)

    def _give_up(self, missed_since: dict[str | None, float]) -> None:
        """End the tasks that no worker has been able to run for a while."""
        offered: set[str | None] = {*self._resources()}
        if self._workers():
            offered.add(None)
        for resource in {task.resource for task, _ in self._pending.values()}:
            if resource in offered:
                missed_since.pop(resource, None)
            elif time.monotonic() - missed_since.setdefault(resource, time.monotonic()) > PATIENCE:
                for task, future in list(self._pending.values()):
                    if task.resource == resource:
                        del self._pending[task.name]
                        future.cancel()
                        self._end(task, self._skipped(task))

    def _end(self, task: Task, result: Result) -> None:
        self._results[task.name] = result
        self._tally.ended(task)

    def _skipped(self, task: Task) -> Result:
        wanted = f"with the resource {task.resource}" if task.resource else "at all"
        start = f"dask worker ADDRESS --resources {task.resource}=1" if task.resource else "dask worker ADDRESS"
        reason = f"there is no worker {wanted}. Start one with `{start}` and give its scheduler with --scheduler."
        return Result(task.name, task.key, SKIPPED, self._call, reason)

    def _workers(self) -> Mapping[str, Any]:
        workers: Mapping[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return workers

    def _resources(self) -> set[str]:
        return {name for worker in self._workers().values() for name in worker["resources"]}


def _reason(future: Future) -> str:
    """Return why a task ended without a result of this call: its workers died, or could not write it."""
    from distributed import KilledWorker

    if future.status != "error":
        return f"the scheduler gave it up ({future.status})"
    error = future.exception()
    if isinstance(error, KilledWorker):
        return "every process that executed it died, which is most often for want of memory. Use fewer workers."
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _client(workers: Workers, tasks: int) -> Iterator[Client]:
    """Connect to a scheduler, or start local processes for the time of the block."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UserError(f"sweeps need Dask ({error}). Install it with `pip install edgeattn[fleet]`.") from error

    if workers.scheduler is not None:
        try:
            client = Client(workers.scheduler, timeout=CONNECTION_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the scheduler {workers.scheduler} does not answer ({error}). Start one with `dask scheduler`, or "
                "leave --scheduler out to use processes of this machine."
            ) from error
        with client:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise UserError(
                    f"the scheduler {workers.scheduler} has no workers. Start one with `dask worker "
                    f"{workers.scheduler} --nthreads 1`."
                )
            yield client
        return
    settings = {
        # A worker that dies closes its connection; one that computes for minutes without a word is alive.
        "distributed.scheduler.worker-ttl": None,
        "distributed.comm.timeouts.connect": "60s",
        # Nobody looks at profiles of the workers, and taking them costs processor time as long as a task runs.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "500ms",
        "distributed.admin.system-monitor.interval": "5s",
        "distributed.nanny.pre-spawn-environ": _THREADS,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=min(workers.count, tasks),
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # the network decides how much it takes, not its share of the machine
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _require_folder(client: Client, root: Path) -> None:
    """Raise where a worker does not see the sweep's folder."""
    token = uuid.uuid4().hex
    marker = write_text(root / f".seen-by-workers-{token}", token)
    try:
        seen = client.run(_sees, marker, token, on_error="return")
    finally:
        marker.unlink(missing_ok=True)
        remove_leftovers(root)
    for worker, sees in seen.items():
        if isinstance(sees, BaseException):
            raise UserError(
                f"the worker {worker} cannot run edgeattn ({type(sees).__name__}: {sees}). Install this version of "
                "edgeattn there, and start the worker from that environment."
            )
        if not sees:
            raise UserError(
                f"the worker {worker} does not see the folder {root}. Put it on a file system that all workers mount "
                "under the same path."
            )


def _sees(marker: Path, token: str) -> bool:
    try:
        return marker.read_text(encoding="utf-8") == token
    except OSError:
        return False
