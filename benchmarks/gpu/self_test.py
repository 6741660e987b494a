"""Shows in a dry run that a case which fails, crashes or hangs is recorded, and that the next one runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from gpu.cases import Case, Record, Settings

EXPECTED = {"raises": "error", "crashes": "crashed", "hangs": "timeout", "works": "ok"}
"""Status that each case has to end with."""


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return one case per way to go wrong, and one that works."""
    return [Case(name, seconds=1.0 if name == "hangs" else 30.0) for name in EXPECTED]


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Do what the case's name says."""
    if case.name == "raises":
        raise ValueError("on purpose")
    if case.name == "crashes":
        os._exit(7)
    if case.name == "hangs":
        time.sleep(60)
    yield {"status": "ok"}
