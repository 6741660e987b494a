"""Power rails, temperatures and clocks of a board, read from sysfs.

Jetson Orin has INA3221 monitors: per channel a label, a voltage (mV) and a current (mA). Jetson Thor adds an INA238,
which measures the whole board's input and gives the power itself (microwatts). Both appear below /sys/class/hwmon.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .system import System

MONITORS = {"ina3221": None, "ina238": "VIN"}
"""Drivers of power monitors, with the rail of those that have one unlabelled channel."""

TOTAL_RAILS = ("VIN", "VDD_IN")
"""Rails that carry everything the board or the module takes, widest first."""

INTERVAL = 0.05
"""Seconds between two readings."""


@dataclass(frozen=True)
class Rail:
    """One channel of a power monitor.

    Attributes:
        name: label of the channel.
        read: returns the power in watts, or None where it cannot be read.
    """

    name: str
    read: Callable[[], float | None]


def power_rails(system: System) -> list[Rail]:
    """Return the rails that can be read now, those of one monitor after those of another."""
    rails = []
    for folder in system.glob("/sys/class/hwmon/hwmon*"):
        driver = system.text(f"{folder}/name")
        if driver not in MONITORS:
            continue
        for current in system.glob(f"{folder}/curr*_input"):
            channel = re.sub(r"\D", "", current.rpartition("/")[2])
            name = system.text(f"{folder}/in{channel}_label") or MONITORS[driver]
            rail = Rail(name or f"{driver} channel {channel}", _reader(system, folder, channel))
            if rail.read() is not None:
                rails.append(rail)
    return rails


def _reader(system: System, folder: str, channel: str) -> Callable[[], float | None]:
    def read() -> float | None:
        power = system.number(f"{folder}/power{channel}_input")
        if power is not None:
            return power * 1e-6
        volts = system.number(f"{folder}/in{channel}_input")
        amperes = system.number(f"{folder}/curr{channel}_input")
        return None if volts is None or amperes is None else volts * amperes * 1e-6

    return read


def temperatures(system: System) -> dict[str, float]:
    """Return the thermal zones that can be read now, in degrees Celsius; zones that are switched off cannot."""
    found = {}
    for folder in system.glob("/sys/class/thermal/thermal_zone*"):
        name, value = system.text(f"{folder}/type"), system.number(f"{folder}/temp")
        if name and value is not None:
            found[name] = value / 1000
    return found


def clocks(system: System) -> dict[str, float]:
    """Return the present clocks of CPU clusters, GPU and other frequency-scaled devices, in MHz."""
    found = {}
    for path in system.glob("/sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq"):
        if (value := system.number(path)) is not None:  # kHz
            found[f"cpu {path.split('/')[-2]}"] = value / 1e3
    for path in system.glob("/sys/class/devfreq/*/cur_freq"):
        if (value := system.number(path)) is not None:  # Hz
            found[path.split("/")[-2]] = value / 1e6
    return found


@dataclass
class Recorder:
    """Reads power and temperature in the background while its block runs.

    Attributes:
        system: the machine.
        interval: seconds between readings.
    """

    system: System
    interval: float = INTERVAL
    _stop: threading.Event = field(default_factory=threading.Event)
    _samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _hottest: dict[str, float] = field(default_factory=dict)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Recorder:
        """Take the first reading and begin."""
        self._rails = power_rails(self.system)
        self._read()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last reading and end."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._read()

    def _loop(self) -> None:
        while not self._stop.wait(self.interval):
            self._read()

    def _read(self) -> None:
        powers = {rail.name: value for rail in self._rails if (value := rail.read()) is not None}
        self._samples.append((time.monotonic(), powers))
        for name, value in temperatures(self.system).items():
            self._hottest[name] = max(value, self._hottest.get(name, value))

    def record(self, frames: int) -> dict[str, Any]:
        """Return power, energy per frame and temperature of the time that was recorded.

        Args:
            frames: how many frames were computed in it.
        """
        span = self._samples[-1][0] - self._samples[0][0]
        energies = {name: self._energy(name) for name in self._samples[0][1]}
        known = {name: energy for name, energy in energies.items() if energy is not None}
        total, scope = _total(known)
        return {
            "seconds": span,
            "readings": len(self._samples),
            "rails_mean_w": {name: energy / span for name, energy in known.items()} if span else {},
            "mean_w": total / span if total is not None and span else None,
            "energy_per_frame_j": total / frames if total is not None and frames else None,
            "scope": scope,
            "hottest_c": dict(self._hottest),
        }

    def _energy(self, rail: str) -> float | None:
        """Return the energy that a rail carried, in joules, by the trapezoid rule; None where readings are missing."""
        points = [(moment, powers.get(rail)) for moment, powers in self._samples]
        energy = 0.0
        for (start, before), (end, after) in pairwise(points):
            if before is None or after is None:
                return None
            energy += (end - start) * (before + after) / 2
        return energy


def _total(energies: Mapping[str, float]) -> tuple[float | None, str]:
    """Return the energy of everything that was measured, and what that covers."""
    for rail in TOTAL_RAILS:
        if rail in energies:
            return energies[rail], f"the rail {rail}, which carries everything behind it"
    if energies:
        return sum(energies.values()), f"the sum of {', '.join(energies)}; no rail of this board carries everything"
    return None, "no power monitor can be read here"
