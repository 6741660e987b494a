"""What devices measured: the JSON of `python -m edgeattn_device`, copied back, checked, and shown on a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.deploy.device.bench import PERCENTILES
from edgeattn.deploy.device.manifest import WORK
from edgeattn.foundation import UserError
from edgeattn.validation.report_charts import Row, RowChart, Scale, bar, dot
from edgeattn.validation.report_page import Section, number, section

LARGEST_RECORD = 4 << 20
"""Bytes that a record may have; the device's programs write a few thousand."""

LARGEST_NUMBER = 1e300
"""What the device's programs write for an error relative to nothing; nothing is larger."""

_NUMBER = (int, float)
_MAYBE = (int, float, type(None))
_TEXT = (str, type(None))


@dataclass(frozen=True)
class _Each:
    """A list or a mapping, all of whose members have one layout."""

    kind: type
    layout: Any


_ABOUT: Mapping[str, Any] = {
    "command": str,
    "bundle": str,
    "model": str,
    "target": str,
    "measured": str,
    "verdict": str,
}
"""What every record holds beside `run`."""

_ERROR = {"worst_relative_l2": _NUMBER, "max_abs": _NUMBER, "mismatched": int}
_FINDING = {"name": str, "wanted": str, "found": _TEXT, "status": str, "advice": str}
_LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "doctor": {"findings": _Each(list, _FINDING), "board": _TEXT, "l4t": _TEXT, "power_mode": _TEXT},
    "build": {"engine": str, "engine_bytes": int, "seconds": _NUMBER, "notes": _Each(list, str)},
    "verify": {
        "samples": int,
        "outputs": _Each(dict, _ERROR),
        "label_agreement": _NUMBER,
        "metric": str,
        "score": _NUMBER,
        "task_drop": _NUMBER,
        "limits": {"relative_l2": _MAYBE, "label_agreement": _MAYBE, "task_drop": _MAYBE},
        "reasons": _Each(list, str),
    },
    "bench": {
        "scope": str,
        "batch": int,
        "runs": int,
        "latency_ms": {f"p{level:g}": _MAYBE for level in PERCENTILES},
        "mean_ms": _NUMBER,
        "frames_per_second": _NUMBER,
        "memory_bytes": _Each(dict, int),
        "power": {"mean_w": _MAYBE, "energy_per_frame_j": _MAYBE, "scope": str, "hottest_c": _Each(dict, _NUMBER)},
        "clocks_mhz": _Each(dict, _NUMBER),
        "power_mode": _TEXT,
    },
}
"""Members of each command's record that the page shows."""

_FILE = re.compile(rf"({'|'.join(_LAYOUTS)})(?:\.(\w+))?\.json")


@dataclass(frozen=True)
class DeviceResults:
    """What one device measured of a run.

    Attributes:
        name: of the folder that was copied back.
        doctor: what the device has beside what the bundle is for; None when it was not asked.
        builds: record of each precision's engine.
        verifies: the engine against the PyTorch original, by precision.
        benches: times of the engine, by precision.
    """

    name: str
    doctor: Mapping[str, Any] | None
    builds: Mapping[str, Mapping[str, Any]]
    verifies: Mapping[str, Mapping[str, Any]]
    benches: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The folder, and the board where the device says what it is."""
        board = self.doctor["board"] if self.doctor else None
        return f"{self.name}: {board}" if board else self.name

    @property
    def records(self) -> tuple[Mapping[str, Any], ...]:
        """All records."""
        first = (self.doctor,) if self.doctor else ()
        return (*first, *self.builds.values(), *self.verifies.values(), *self.benches.values())

    @property
    def failed(self) -> tuple[str, ...]:
        """Precisions whose engine is not the original's."""
        return tuple(name for name, record in self.verifies.items() if record["verdict"] != "PASS")

    def shared(self, member: str) -> list[str]:
        """Return the different values that a member has in the records."""
        return list(dict.fromkeys(str(record[member]) for record in self.records))


def read_results(folder: Path, run: str) -> DeviceResults:
    """Read the results that a device left in a folder.

    Args:
        folder: the bundle's folder `work`, copied back.
        run: digest of the run's manifest, see `edgeattn.deploy.device.workspace.provenance_digest`.

    Raises:
        UserError: there are no results, or one is damaged, older than this release, or of another run.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist. Copy the folder `{WORK}` of the bundle from the device.")
    found: dict[str, dict[str, Mapping[str, Any]]] = {command: {} for command in _LAYOUTS}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            command, precision = match[1], match[2] or ""
            found[command][precision] = _read(path, command, precision, run)
    if not any(found.values()):
        raise UserError(
            f"{folder} holds no results of a device. Give the folder `{WORK}` that `python3 -m edgeattn_device` wrote."
        )
    whole = folder.resolve()
    name = whole.parent.name if whole.name == WORK else whole.name
    return DeviceResults(name, found["doctor"].get(""), found["build"], found["verify"], found["bench"])


def _read(path: Path, command: str, precision: str, run: str) -> Mapping[str, Any]:
    again = f"Run the command {command} again on the device, and copy its result."
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise UserError(f"{path} has more than {LARGEST_RECORD} bytes, so no device's program wrote it. {again}")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Copy it again from the device, or remove it.") from error
    if not isinstance(record, dict) or "command" not in record:
        raise UserError(f"{path} is damaged: it is no result of a command. Copy it again, or remove it.")
    if "run" not in record:
        raise UserError(
            f"{path} comes from an older release and does not say which run it is about. Make the bundle again, and "
            f"run {command} of the new one."
        )
    if record["run"] != run:
        raise UserError(
            f"{path} is a result of another run ({str(record['run'])[:12]} in place of {run[:12]}, model "
            f"{record.get('model')}). Give the run that its bundle was made from; a run that was exported or analysed "
            "again since counts as another one."
        )
    if wrong := next(_defects(record, {**_ABOUT, **_LAYOUTS[command]}, ""), None):
        raise UserError(f"{path} is damaged or of another release: {wrong}. {again}")
    if record["command"] != command or record.get("precision", "") != precision:
        raise UserError(f"{path} holds a result of {record['command']}, so it was renamed. Copy it again.")
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _defects(value: Any, layout: Any, where: str) -> Iterator[str]:
    """Yield what is missing in a value or has another type."""
    if isinstance(layout, Mapping):
        if not isinstance(value, dict):
            yield f"{where or 'it'} is no mapping"
            return
        for name, inner in layout.items():
            place = f"{where}.{name}" if where else name
            if name not in value:
                yield f"{place} is missing"
            else:
                yield from _defects(value[name], inner, place)
    elif isinstance(layout, _Each):
        if not isinstance(value, layout.kind):
            yield f"{where} is no {layout.kind.__name__}"
            return
        members: Any = value.items() if isinstance(value, dict) else enumerate(list(value))  # type: ignore[call-overload]
        for name, member in members:
            yield from _defects(member, layout.layout, f"{where}.{name}")
    elif not isinstance(value, layout) or isinstance(value, bool) or _is_absurd(value):
        yield f"{where} is {value!r}"


def _is_absurd(value: Any) -> bool:
    """Say whether a number is infinite, or too large to be computed with."""
    return isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER


def device_sections(devices: Sequence[DeviceResults], parity: Mapping[str, Any]) -> list[Section]:
    """Return a section of all latencies, and one for each device.

    Args:
        devices: results, checked.
        parity: content of the run's `parity.json`, whose figures stand beside the devices'.
    """
    package = "edgeattn.deploy"
    sections = []
    if any(device.benches for device in devices):
        sections.append(
            section("latencies.html.j2", "latency", "Latency on devices", package, chart=_latencies(devices))
        )
    for index, device in enumerate(devices):
        sections.append(
            section(
                "device.html.j2",
                f"device-{index}",
                f"Device {device.title}",
                package,
                device=device,
                hosts={name: _host_form(parity, name) for name in device.verifies},
            )
        )
    return sections


def _host_form(parity: Mapping[str, Any], precision: str) -> Mapping[str, Any] | None:
    """Return what the host measured of the form that was bundled: with plugin nodes where the run has such a form."""
    forms = [entry for entry in parity["forms"] if entry["form"]["precision"] == precision]
    return next((entry for entry in forms if entry["form"]["plugin"]), forms[0] if forms else None)


def _latencies(devices: Sequence[DeviceResults]) -> RowChart:
    benches = [
        (f"{device.title}, {precision}", record) for device in devices for precision, record in device.benches.items()
    ]
    known = {label: _known(record) for label, record in benches}
    scale = Scale.linear(value for values in known.values() for value in values)
    rows = []
    for label, record in benches:
        values = known[label]
        marks = (bar("a bar", scale, min(values), max(values)), dot("point", scale.at(record["mean_ms"])))
        median = number(record["latency_ms"]["p50"])
        note = f"median {median:.2f} ms" if median is not None else f"mean {record['mean_ms']:.2f} ms"
        rows.append(Row(label, f"{note}; {record['measured']}", marks))
    return RowChart(
        axis="latency of one call in ms, host memory to host memory",
        scale=scale,
        rows=tuple(rows),
        legend=(("a bar", "median to the highest percentile with enough runs"), ("point", "mean")),
    )


def _known(record: Mapping[str, Any]) -> list[float]:
    """Return the percentiles that were measured; the mean alone where there are too few runs for any."""
    found = [value for value in record["latency_ms"].values() if value is not None]
    return found or [record["mean_ms"]]
