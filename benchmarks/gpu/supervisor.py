"""Runs cases in worker processes, so that a crash, a hang or a broken CUDA context costs one case and not the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from gpu.cases import Case, Record, Section, Settings
from gpu.worker import serve

LOAD_SECONDS = 240.0
"""Time that a fresh process may take to import torch from a cold disk beside others that do the same."""

_SPAWN = multiprocessing.get_context("spawn")
_STARTING = threading.Lock()


class WorkerEndedError(Exception):
    """The worker's process ended, or was ended because its time was up."""


class Worker:
    """A process that runs cases one after the other, and is started again after it ended.

    Args:
        settings: what the user asked for.
        log: file that takes everything the process prints.
    """

    def __init__(self, settings: Settings, log: str) -> None:
        self._settings, self._log = settings, log
        self._process: Any = None
        self._connection: Connection | None = None
        self._loaded: set[str] = set()

    def ask(self, module: str, request: str, payload: Any, seconds: float, receive: Callable[[Any], None]) -> Any:
        """Send a request to a section's module and wait for its end.

        Args:
            module: the section's module; loaded first, on its own time, when this process has not.
            request: "plan" or "run".
            payload: argument of the request.
            seconds: time limit.
            receive: takes every record that arrives.

        Returns:
            What the request answers at its end.

        Raises:
            WorkerEndedError: the process crashed or was ended after `seconds`; its first argument is the status.
            RuntimeError: the request raised; the message is its traceback.
        """
        if self._process is None:
            self._start()
        if module not in self._loaded:
            self._exchange((module, "load", None), LOAD_SECONDS, receive)
            self._loaded.add(module)
        return self._exchange((module, request, payload), seconds, receive)

    def end(self) -> None:
        """End the process, its children included."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = None
        self._loaded = set()
        if self._connection is not None:
            self._connection.close()

    def _start(self) -> None:
        with _STARTING:
            self._connection, other = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=serve, args=(other, self._settings, self._log))
            self._process.start()
            other.close()

    def _exchange(self, message: tuple[str, str, Any], seconds: float, receive: Callable[[Any], None]) -> Any:
        assert self._connection is not None
        deadline = time.monotonic() + seconds
        try:
            self._connection.send(message)
            while True:
                if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                    self.end()
                    raise WorkerEndedError("timeout", f"ended after {seconds:.0f} s")
                kind, content = self._connection.recv()
                if kind == "done":
                    return content
                if kind in ("error", "broken"):
                    if kind == "broken":
                        self.end()
                    raise RuntimeError(content)
                receive(content)
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self.end()
            raise WorkerEndedError("crashed", f"the process ended with status {code}; see the log") from error


class Supervisor:
    """A few workers that share the GPU.

    Args:
        settings: what the user asked for.
        log: file for what workers print.
        size: the most workers that any section gets.
    """

    def __init__(self, settings: Settings, log: str, size: int) -> None:
        self._workers = [Worker(settings, log) for _ in range(size)]

    def plan(self, section: Section, records: Sequence[Record]) -> list[Case]:
        """Return the cases of a section.

        Raises:
            WorkerEndedError, RuntimeError: as in `Worker.ask`.
        """
        return self._workers[0].ask(section.module, "plan", list(records), LOAD_SECONDS, lambda _: None)

    def run(self, section: Section, cases: Sequence[Case], seconds: float, emit: Callable[[Record], None]) -> None:
        """Run cases until all are done or the time is up.

        Args:
            section: where the cases come from.
            cases: in the order of importance.
            seconds: time for all of them.
            emit: takes every record; never called by two threads at once.
        """
        deadline = time.monotonic() + seconds
        waiting = deque(cases)
        lock = threading.Lock()

        def send(case: Case, record: Record) -> None:
            with lock:
                emit({"case": case.name, **record})

        def run_case(worker: Worker, case: Case, left: float) -> None:
            def receive(record: Record) -> None:
                send(case, record)

            try:
                worker.ask(section.module, "run", case, min(case.seconds, left), receive)
            except WorkerEndedError as error:
                status, reason = error.args
                late = status == "timeout" and left < case.seconds
                send(case, {"status": status, "reason": f"{reason}; the section's time was up" if late else reason})
            except RuntimeError as error:
                send(case, {"status": "error", "reason": str(error)})

        def work(worker: Worker) -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    case = waiting.popleft()
                left = deadline - time.monotonic()
                if left > 0:
                    run_case(worker, case, left)
                else:
                    send(case, {"status": "skipped", "reason": "the section's time was up"})

        threads = [
            threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers[: section.workers]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def end(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()
