"""The command verify: the engine against the PyTorch original, on the bundle's golden samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .build import require_engine
from .engines import Arrays, Backend, Session, Tell
from .golden import Comparison, read_golden
from .workspace import Workspace


def verify(workspace: Workspace, precision: str | None, backend: Backend, tell: Tell) -> dict[str, Any]:
    """Run every golden sample and judge the outputs by the bundle's derived tolerances.

    Returns:
        Figures per output and in task units, the limits, and the verdict, "PASS" or "FAIL" with reasons.

    Raises:
        DeviceError: the engine was not built, or does not run.
    """
    name, entry = workspace.manifest.precision(precision)
    content = workspace.manifest.content
    model = content["model"]
    comparison = Comparison(len(model["classes"]), model["size"], model["outputs"], model.get("metric", "mIoU"))
    with open_session(workspace, name, backend) as session:
        for sample in content["golden"]["samples"]:
            tell(sample["file"])
            golden = read_golden(workspace.bundle / sample["file"])
            comparison.add(golden, session.run(typed(session, golden.inputs)))
    record = {"measured": backend.measured(), "samples": len(content["golden"]["samples"])}
    return {**record, **comparison.judge(entry["tolerance"], entry.get("allowed_error"))}


@contextmanager
def open_session(workspace: Workspace, precision: str, backend: Backend) -> Iterator[Session]:
    """Load the engine of a precision for the time of the block."""
    session = backend.load(*require_engine(workspace, precision, backend))
    try:
        yield session
    finally:
        session.close()


def typed(session: Session, inputs: Arrays) -> dict[str, Any]:
    """Return the inputs in the types that an engine takes."""
    return {name: inputs[name].astype(kind, copy=False) for name, kind in session.inputs.items()}
