"""The page of a finished run with everything that is found in it, and what devices measured of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from edgeattn.deploy.device.workspace import provenance_digest
from edgeattn.deploy.device_results import DeviceResults, device_sections, read_results
from edgeattn.deploy.evidence import EvaluationSamples, model_of_run
from edgeattn.deploy.pipeline import Progress
from edgeattn.export.run_directory import FORMAT, MANIFEST
from edgeattn.foundation import UserError, sha256_of, write_text
from edgeattn.models.deployable import Deployment
from edgeattn.validation.report import render_report
from edgeattn.validation.report_divergence import divergence_section
from edgeattn.validation.report_page import Section
from edgeattn.validation.report_pictures import pictures_of_page
from edgeattn.validation.report_ranges import SAMPLES, measure_spans, ranges_section
from edgeattn.validation.report_sensitivity import sensitivity_section

REPORT = "report.html"
"""Name of the page that a run writes itself."""

_AGAIN = "Run `edgeattn export` again."
_RECORDED: Sequence[tuple[str, Callable[[Mapping[str, Any], int], Section]]] = (
    ("sensitivity.*.json", lambda record, index: sensitivity_section(record)),
    ("divergence.json", lambda record, index: divergence_section(record, f"divergence-{index}")),
)
"""Records that the page shows where a run, or a folder in it, holds them."""


@dataclass(frozen=True)
class RunReport:
    """A page that was written.

    Attributes:
        path: the page.
        failed: what failed: the run's parity, and engines on devices; empty when all passed.
        notes: sentences that a user should read.
    """

    path: Path
    failed: tuple[str, ...]
    notes: tuple[str, ...]


def report_run(
    run: Path,
    works: Sequence[Path],
    output: Path,
    *,
    images: Path | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Draw the page of a finished run anew, with the analyses found in it and the results of devices.

    The run itself is not changed: its manifest, by which devices name it, stays as it is.

    Args:
        run: folder that `edgeattn export` wrote.
        works: folders `work` of bundles of this run, copied back from devices.
        output: the page.
        images: the images that the run was judged on; ranges of tensors are measured on some of them. The model's
            held-out samples when None.
        progress: told about the steps.

    Raises:
        UserError: something given cannot be used; nothing was written.
    """
    manifest, parity = _finished(run)
    _refuse_output(output, run, manifest)
    digest = provenance_digest(manifest)
    devices = [read_results(work, digest) for work in works]
    sections = device_sections(devices, parity)
    notes = []
    ranges = _ranges(run, manifest, images, progress)
    if isinstance(ranges, str):
        notes.append(ranges)
    else:
        sections.append(ranges)
    sections += _recorded(run, parity["model"])
    pictures = _pictures(run, manifest)
    if pictures is None:
        notes.append(f"{run / REPORT} is not the page that the run wrote, so there are no pictures. {_AGAIN}")
    failed = [f"parity of {entry['form']['name']}" for entry in parity["forms"] if entry["verdict"] != "PASS"]
    failed += [f"parity of {each['form']} at {each['size']}" for each in parity["sizes"] if each["reasons"]]
    failed += [f"{precision} on {device.title}" for device in devices for precision in device.failed]
    record = {**parity, "verdict": "FAIL" if failed else "PASS", "status": _status(parity, devices)}
    page = render_report(record, pictures, manifest=manifest, sections=sections)
    return RunReport(write_text(output, page), tuple(failed), tuple(notes))


def _finished(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the manifest and the comparison of a run."""
    if not run.is_dir():
        raise UserError(f"the run {run} does not exist. Give the folder that `edgeattn export -o` wrote.")
    manifest, parity = _record(run / MANIFEST), _record(run / "parity.json")
    known = manifest.get("format") == FORMAT and {"evaluation", "model", "size"} <= set(manifest.get("run", ()))
    if not known or "compare" not in manifest.get("stages", ()):
        raise UserError(f"the run {run} is not finished, or of another release. {_AGAIN}")
    render_report(parity, None, manifest={})  # a comparison of another release is refused before any work
    return manifest, parity


def _record(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}), so it is no finished run. {_AGAIN}") from (
            error
        )
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). {_AGAIN}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: it holds no mapping. {_AGAIN}")
    return record


def _status(parity: Mapping[str, Any], devices: Sequence[DeviceResults]) -> str:
    """Say where the numbers of the page come from."""
    if not devices:
        return str(parity["status"])
    host = "; ".join(dict.fromkeys(entry["measured"] for entry in parity["forms"]))
    theirs = "; ".join(f"{device.title} ({', '.join(device.shared('measured'))})" for device in devices)
    return f"Measured on the host: {host}. Measured on devices, in sections of their own: {theirs}."


def _refuse_output(output: Path, run: Path, manifest: Mapping[str, Any]) -> None:
    """Raise where the page would take the place of a file that the run recorded, or of a folder."""
    if output.is_dir():
        raise UserError(f"the output {output} is a folder. Give a file name with -o.")
    recorded = {(run / name).resolve() for stage in manifest["stages"].values() for name in stage["outputs"]}
    if output.resolve() in recorded:
        raise UserError(
            f"{output} is a file of the run, recorded by its hash, and stays as it is. Give another name with -o."
        )


def _pictures(run: Path, manifest: Mapping[str, Any]) -> Markup | None:
    """Return the pictures of the page that the run wrote; None where it is missing or was changed since."""
    page = run / REPORT
    if not page.is_file() or sha256_of(page) != manifest["stages"]["compare"]["outputs"].get(REPORT):
        return None
    return pictures_of_page(page.read_text(encoding="utf-8"))


def _recorded(run: Path, model: str) -> Iterator[Section]:
    """Yield the sections of analyses that lie in the run or in a folder of it."""
    for pattern, make in _RECORDED:
        for index, path in enumerate([*sorted(run.glob(pattern)), *sorted(run.glob(f"*/{pattern}"))]):
            record = _record(path)
            if record.get("model", model) != model:
                raise UserError(f"{path} is about {record['model']}, and the run about {model}. Move it away.")
            try:
                yield make(record, index)
            except (KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
                raise UserError(
                    f"{path} is damaged or of another release ({error}). Make it again, or move it away."
                ) from error


def _ranges(run: Path, manifest: Mapping[str, Any], images: Path | None, progress: Progress | None) -> Section | str:
    """Return the section of measured tensors, or why there is none."""
    facts = manifest["run"]
    judged_on = facts["evaluation"]
    if images is None and judged_on != "held-out samples":
        return f"ranges of tensors are not measured: the run was judged on {judged_on}. Give that folder with --images."
    base = model_of_run(facts)
    size = tuple(facts["size"])
    spec = Deployment(facts.get("preprocess", False), facts.get("postprocess")).spec(base)
    samples = EvaluationSamples(spec, images, size, SAMPLES)

    def feeds() -> Iterator[Mapping[str, np.ndarray]]:
        return (spec.network_inputs(sample) for sample in samples)

    int8 = run / "model.int8.onnx"
    spans = measure_spans(
        run / "model.onnx",
        feeds,
        data=str(images.name) if images else judged_on,
        int8=int8 if int8.is_file() else None,
        progress=(lambda done, total: progress("ranges", done, total)) if progress else None,
    )
    return ranges_section(spans)
