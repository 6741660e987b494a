"""The JSON file of a run: complete at every moment, replaced as a whole, marked when it is a dry run."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.bars import evaluate
from gpu.cases import Case, Record, Settings
from gpu.ranking import ranking

from edgeattn.foundation import write_text

FORMAT = 1
DRY_NOTICE = "dry run on a CPU, not a measurement"
SECONDS_BETWEEN_WRITES = 2.0


class Results:
    """Takes records as they come and keeps the file up to date.

    Args:
        path: the JSON file.
        settings: what the user asked for.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._dry = settings.dry
        self._written = 0.0
        self._started = time.monotonic()
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "dry_run": settings.dry,
            "notice": DRY_NOTICE if settings.dry else None,
            "finished": False,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "seed": settings.seed,
            "environment": {},
            "bars": [],
            "sections": {},
        }

    def begin(self, section: str, cases: Sequence[Case]) -> None:
        """Note which cases a section has."""
        self.document["sections"][section] = {
            "started_after": self._seconds(),
            "seconds": None,
            "planned": [case.name for case in cases],
            "records": [],
        }

    def add(self, section: str, record: Record) -> None:
        """Take one record."""
        self.document["sections"][section]["records"].append(_json_values(record))
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()

    def end(self, section: str) -> None:
        """Note a section's time."""
        entry = self.document["sections"][section]
        entry["seconds"] = round(self._seconds() - entry["started_after"], 1)
        if section == "tuning":
            entry["ranking"] = ranking(entry["records"])
        self.write()

    def records(self, section: str | None = None) -> list[Record]:
        """Return the records of one section, or of all."""
        sections = self.document["sections"]
        names = [section] if section is not None else list(sections)
        return [record for name in names if name in sections for record in sections[name]["records"]]

    def finish(self) -> None:
        """Mark the file as complete."""
        self.document["finished"] = True
        self.write()

    def write(self) -> None:
        """Replace the file, bars evaluated on what is there."""
        self.document["seconds"] = self._seconds()
        self.document["bars"] = evaluate(self.records("speed"), dry=self._dry)
        write_text(self._path, json.dumps(self.document, indent=1, allow_nan=False) + "\n")
        self._written = time.monotonic()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 1)


def _json_values(value: Any) -> Any:
    """Return a value with None in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): _json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
