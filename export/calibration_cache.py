"""Calibration results kept in a folder, one file for each combination of graph, data and options."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeattn.foundation import UserError, write_text

FORMAT = 1
"""Version of the files' layout and of what is computed; another one is computed anew."""


@dataclass(frozen=True)
class Calibration:
    """What the calibration data said: all that a quantised model needs beside the FP32 one.

    Attributes:
        thresholds: the largest magnitude that INT8 represents, by activation; of a rescaled one after rescaling.
        factors: divisors of the channels, by activation that is rescaled.
        noise: signal-to-noise ratio in dB, by layer.
    """

    thresholds: Mapping[str, float]
    factors: Mapping[str, np.ndarray]
    noise: Mapping[str, float]


class CalibrationCache:
    """One entry of a cache.

    Args:
        folder: where the files lie; created when something is written.
        parts: everything that the entry depends on; equal parts give the same entry.
    """

    def __init__(self, folder: Path, parts: tuple[object, ...]) -> None:
        digest = hashlib.sha256(repr(FORMAT).encode())
        for part in parts:
            digest.update(hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).digest())
        self.key = digest.hexdigest()
        self.path = folder / f"calibration-{self.key[:16]}.json"

    def read(self) -> tuple[Calibration | None, list[str]]:
        """Return what was written, or None where there is nothing usable, and notes about why."""
        if not self.path.exists():
            return None, []
        try:
            entry = json.loads(self.path.read_text(encoding="utf-8"))
            content = entry["content"]
            if entry["key"] != self.key or entry["sha256"] != _digest(content):
                raise ValueError("its content does not fit its checksum")
            factors = {name: np.asarray(row, np.float32) for name, row in content["factors"].items()}
            noise = {name: float(number) for name, number in content["noise"].items()}
            return Calibration(content["thresholds"], factors, noise), []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return None, [f"the calibration cache {self.path} is damaged ({error}); it was computed anew."]

    def write(self, calibration: Calibration) -> None:
        """Write the entry atomically.

        Raises:
            UserError: the folder cannot be written.
        """
        content = {
            "thresholds": dict(calibration.thresholds),
            "factors": {name: row.tolist() for name, row in calibration.factors.items()},
            "noise": {
                name: number if math.isfinite(number) else str(number) for name, number in calibration.noise.items()
            },
        }
        entry = {"key": self.key, "sha256": _digest(content), "content": content}
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise UserError(f"the calibration cache {self.path.parent} is a file. Give a folder.")
        write_text(self.path, json.dumps(entry, indent=1) + "\n")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
