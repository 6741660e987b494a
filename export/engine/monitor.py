"""TensorRT's progress monitor as progress bars, and a build that Ctrl-C cancels cleanly."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from edgeattn.export.engine.machine import import_tensorrt

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done and the steps in all."""

Result = TypeVar("Result")


class BuildCancelled(Exception):  # noqa: N818  (not an error: the user asked for it)
    """The user cancelled the build with Ctrl-C."""


class PhaseLog:
    """What a build is doing and how long its phases took; safe to call from TensorRT's threads.

    Args:
        progress: told about every step. What it raises cancels the build and is kept in `failure`, because no exception
            may reach TensorRT.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._open: dict[str, tuple[float, int, int]] = {}
        self.cancelled = threading.Event()
        self.failure: BaseException | None = None
        self.seconds: dict[str, float] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of a number of steps begins, inside another phase or at the top (None)."""
        with self._lock:
            depth = self._open[parent][2] + 1 if parent in self._open else 0
            self._open[phase] = (time.monotonic(), max(steps, 1), depth)
            self._tell(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Step number `step` (from 0) of a phase is done; returns whether the build shall go on."""
        with self._lock:
            if phase in self._open:
                self._tell(phase, step + 1)
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """A phase ends, whether all its steps are done or not."""
        with self._lock:
            if phase in self._open:
                start, steps, _ = self._open[phase]
                self._tell(phase, steps)
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start
                del self._open[phase]

    def _tell(self, phase: str, done: int) -> None:
        _, steps, depth = self._open[phase]
        try:
            self._progress("  " * depth + phase, min(done, steps), steps)
        except BaseException as error:
            self.failure = self.failure or error
            self.cancelled.set()


def make_monitor(log: PhaseLog) -> Any:
    """Return a progress monitor for a builder configuration that reports to a log."""
    trt = import_tensorrt()

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Hands TensorRT's calls on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            log.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; False cancels the build."""
            return log.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            """A phase ends."""
            log.finish(phase_name)

    return Monitor()


def run_cancellable(work: Callable[[], Result], log: PhaseLog) -> Result:
    """Do work that reports to a log in another thread, so that Ctrl-C reaches this one while TensorRT computes.

    The first Ctrl-C cancels and waits until TensorRT has stopped; a second one does not wait.

    Args:
        work: the build; it ends soon after `log.step` returns False.
        log: what its monitor reports to.

    Raises:
        BuildCancelled: the user cancelled.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # threading.Thread.start waits for the thread and would let a Ctrl-C of that moment through; nor may the thread keep
    # the process alive after a second Ctrl-C.
    _thread.start_new_thread(run, ())
    done = interrupted = False
    while not done:
        try:
            wait((outcome,))
            done = True
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            log.cancelled.set()
    if interrupted:
        raise BuildCancelled
    if log.failure is not None:
        raise log.failure
    return outcome.result()
