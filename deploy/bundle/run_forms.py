"""The ONNX forms of a run, one for each precision, in the representation that a target's TensorRT needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeattn.export.engine import ProfileOptions
from edgeattn.export.engine.profiles import Profile, input_axes, make_profiles
from edgeattn.export.run_directory import FORMAT, MANIFEST
from edgeattn.export.support import check_support
from edgeattn.export.surgery import strip_bodies
from edgeattn.foundation import UserError, sha256_of
from edgeattn.plugins_trt import DOMAIN
from edgeattn.targets import Target
from edgeattn.validation.saturation import Squashing, condition_of
from edgeattn.validation.tolerance import Tolerance, arithmetic_of

PLAIN, WITH_BODIES, STRIPPED = "plain", "plugin, with bodies", "plugin, stripped"


@dataclass(frozen=True)
class BundledForm:
    """The model of one precision.

    Attributes:
        precision: "fp32", "fp16", "bf16" or "int8".
        source: the run's file that it comes from.
        data: bytes of the ONNX file for the target.
        representation: `PLAIN`, `WITH_BODIES` or `STRIPPED`.
        plugin_nodes: nodes that have to become plugin layers.
        profiles: by input name, the smallest, usual and largest shape; one mapping for each profile.
        tolerance: limits, derived or set by the user, as `parity.json` has them.
        squashed: outputs that come from a Sigmoid or Softmax.
        support: what the target's TensorRT is expected to say of it.
    """

    precision: str
    source: Path
    data: bytes
    representation: str
    plugin_nodes: int
    profiles: list[dict[str, list[list[int]]]]
    tolerance: Mapping[str, Any]
    squashed: tuple[Squashing, ...]
    support: Mapping[str, Any]

    def allowed_errors(self, samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
        """Return the norm of the error that each sample may have, for outputs from a Sigmoid or Softmax.

        Of such an output the relative error alone says little, and what says more depends on the sample; see
        `edgeattn.validation.saturation`. An output whose error is not judged is left out.

        Args:
            samples: outputs of the original by name, sample by sample.
        """
        limits = Tolerance.from_dict(self.tolerance)
        found = {}
        for entry in self.squashed:
            conditions = [condition_of(entry, outputs[entry.output]) for outputs in samples]
            norms = [limits.allowed_error(entry.output, condition) for condition in conditions]
            if judged := [norm for norm in norms if norm is not None]:
                found[entry.output] = judged
        return found


@dataclass(frozen=True)
class Run:
    """What a finished run says about itself.

    Attributes:
        folder: the run directory.
        manifest: its manifest.
        parity: content of its `parity.json`.
    """

    folder: Path
    manifest: Mapping[str, Any]
    parity: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was run: model, checkpoint, size and so on."""
        facts: Mapping[str, Any] = self.manifest["run"]
        return facts

    def recorded(self, name: str) -> Path:
        """Return a file of the run after comparing it with the recorded hash.

        Raises:
            UserError: no stage wrote it, or it was changed since.
        """
        path = self.folder / name
        for stage in self.manifest["stages"].values():
            if name in stage["outputs"]:
                if path.is_file() and sha256_of(path) == stage["outputs"][name]:
                    return path
                raise UserError(f"{path} is missing or not the file that the run wrote. Run `edgeattn export` again.")
        raise UserError(f"no stage of the run wrote {path}. Run `edgeattn export` again.")


def read_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is none, the run is not finished, or it failed parity.
    """
    again = "Give the folder that `edgeattn export -o` wrote."
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest["stages"], dict)
    except OSError as error:
        raise UserError(
            f"{folder} is no run: {MANIFEST} cannot be read ({error.strerror or error}). {again}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of a run ({error}). {again}") from error
    if not known or "compare" not in manifest["stages"]:
        raise UserError(f"the run {folder} is not finished, or of another release. Run `edgeattn export` again.")
    run = Run(folder, manifest, {})
    parity = json.loads(run.recorded("parity.json").read_text(encoding="utf-8"))
    if parity["verdict"] != "PASS":
        raise UserError(
            f"the run {folder} failed parity, so nothing of it is bundled. {folder / 'report.html'} says why."
        )
    return Run(folder, manifest, parity)


def bundled_forms(run: Run, target: Target, axes: tuple[str, ...]) -> list[BundledForm]:
    """Return the form of each precision: with plugin nodes where the run has them, else plain.

    Args:
        run: the run.
        target: what they are for.
        axes: ranges of dynamic axes, such as "batch=1:1:4".

    Raises:
        UserError: a file is not as the run wrote it, is rejected by the target's TensorRT, or has dynamic axes
            without a range.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for entry in run.parity["forms"]:
        form = entry["form"]
        if form["precision"] not in chosen or form["plugin"]:
            chosen[form["precision"]] = entry
    return [_form(run, entry, target, axes) for entry in chosen.values()]


def _form(run: Run, entry: Mapping[str, Any], target: Target, axes: tuple[str, ...]) -> BundledForm:
    source = run.recorded(entry["form"]["path"])
    data = source.read_bytes()
    model = onnx.load_from_string(data)
    squashed = arithmetic_of(model).squashed  # before the bodies of functions are gone
    plugin_nodes = sum(node.domain == DOMAIN for node in model.graph.node)
    representation = WITH_BODIES if plugin_nodes else PLAIN
    if plugin_nodes and not target.takes_function_bodies:
        representation, model = STRIPPED, strip_bodies(model)
        data = model.SerializeToString(deterministic=True)
    support = _support(source, model, target)
    profiles = make_profiles(input_axes(model), ProfileOptions(axes=axes))
    require_golden_fits(profiles, run.facts["size"], channels_last=run.facts.get("preprocess", False))
    return BundledForm(
        entry["form"]["precision"],
        source,
        data,
        representation,
        plugin_nodes,
        [{part.name: [[*shape] for shape in part.shapes] for part in profile} for profile in profiles],
        entry["tolerance"],
        squashed,
        support,
    )


def require_golden_fits(profiles: Sequence[Profile], size: Sequence[int], *, channels_last: bool = False) -> None:
    """Refuse ranges that leave out the golden samples, which are single images of the run's size.

    Args:
        profiles: ranges of the inputs.
        size: (height, width) of the run.
        channels_last: the inputs are (batch, height, width, 3).

    Raises:
        UserError: the message names the input and its range.
    """
    for entry in (entry for profile in profiles for entry in profile):
        shape = (1, *size, entry.optimum[3]) if channels_last else (1, entry.optimum[1], *size)
        if not all(
            low <= length <= high for low, length, high in zip(entry.minimum, shape, entry.maximum, strict=True)
        ):
            low, high = ("x".join(map(str, end)) for end in (entry.minimum, entry.maximum))
            raise UserError(
                f"the ranges take {entry.name} from {low} to {high}, and the golden samples are "
                f"{'x'.join(map(str, shape))}, the size of the run. Widen --axis, or export with another --size."
            )


def _support(source: Path, model: onnx.ModelProto, target: Target) -> dict[str, Any]:
    """Return what the target's TensorRT is expected to say of a model: the verdict, and what needs attention.

    Raises:
        UserError: it rejects the model; the message names the first node.
    """
    report = check_support(model, target.tensorrt, target=target.name, dla_cores=target.dla_cores or 0)
    if not report.passes(strict=False):
        finding = report.problems[0]
        raise UserError(
            f"TensorRT on {target.name} rejects {source}: {finding.subject or 'the model'}: {finding.detail}. "
            f"{finding.remedy} `edgeattn check {source} --target {target.name}` lists everything."
        )
    return {
        "verdict": report.verdict,
        "attention": [f"{finding.subject or 'the model'}: {finding.detail}" for finding in report.problems],
    }
