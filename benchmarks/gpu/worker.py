"""The process that runs cases: reads requests from a pipe and answers with records."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from gpu.cases import Settings


def serve(connection: Connection, settings: Settings, log: str) -> None:
    """Answer requests until the other end of the pipe is closed.

    Everything that the process and its children print goes to the log.

    Args:
        connection: receives (module, request, payload) and sends (kind, content) with the kinds "record", "done",
            "error" and "broken": an error after which CUDA does not answer in this process any more.
        settings: what the user asked for.
        log: path of the log, which is appended to.
    """
    os.setsid()  # the supervisor ends this process together with the compilers that it starts
    with open(log, "ab", buffering=0) as stream:  # noqa: PTH123  (descriptors 1 and 2 are what compilers inherit)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    while True:
        try:
            name, request, payload = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", _answer(connection, name, request, payload, settings)))
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            text = f"{type(error).__name__}: {str(error)[:500]} ({_place(error)})"
            del error
            connection.send(("error" if _context_works() else "broken", text))
        _free_memory()


def _answer(connection: Connection, name: str, request: str, payload: Any, settings: Settings) -> Any:
    module = importlib.import_module(name)
    if request == "plan":
        return module.plan(settings, payload)
    if request == "run":
        for record in module.run(payload, settings):
            connection.send(("record", record))
    return None


def _place(error: BaseException) -> str:
    """Return where in our own files an exception came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}"  # noqa: PTH119


def _context_works() -> bool:
    """Return whether CUDA still answers; an illegal access in a kernel ends the context for good."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _free_memory() -> None:
    """Give the memory of the last case back, for the other workers."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a broken context
            torch.cuda.empty_cache()
