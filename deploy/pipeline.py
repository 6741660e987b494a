"""From a checkpoint to a run directory: every stage of `edgeattn export`, composed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgeattn.deploy.calibration_data import calibration_data, unmeasured_note
from edgeattn.deploy.evidence import (
    BUNDLED,
    EvaluationSamples,
    checkpoint_path,
    load_original,
    write_evidence,
)
from edgeattn.deploy.sizes import fixed_size_note, refuse_size
from edgeattn.export.block_policies import declared_exclusions
from edgeattn.export.calibration import CalibrationSamples
from edgeattn.export.calibration_methods import DEFAULT_METHOD, method_named
from edgeattn.export.fp16 import Fp16Result, to_bf16, to_fp16, with_operators_named
from edgeattn.export.int8 import Int8Options, quantise
from edgeattn.export.node_selection import with_node_names
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.plugin_launches import expand_launches
from edgeattn.export.precision_types import BF16, FP16, ReducedType
from edgeattn.export.ranges import OVERFLOW_MARGIN, MeasuredRanges, measure_ranges
from edgeattn.export.run_directory import RunDirectory
from edgeattn.export.support import SupportReport, check_support
from edgeattn.export.surgery import inline_plugins, strip_bodies
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError, atomic_path, sha256_of, write_text
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.deployable import Deployment
from edgeattn.models.published import load_published
from edgeattn.targets import TARGETS, Target
from edgeattn.validation.parity import Form, Parity, compare_forms, compare_sizes
from edgeattn.validation.rules import rules_digest
from edgeattn.validation.tolerance import NO_LIMITS, UserLimits

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""

RANGE_COUNT = 8
"""Calibration batches on which it is measured what FP16 and BF16 cannot hold.

Peaks settle soon: of the bundled models no tensor exceeds on 64 images twice what it reaches on 8, and the margin is 4.
"""

PLUGIN_HOSTS = ("cpp", "python")
"""What runs the plugins in TensorRT: the C++ library, or Python ahead-of-time plugins (10.15 and later)."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export and which forms to make.

    Attributes:
        model: name of the model's declaration.
        checkpoint: path of the trained weights, or "bundled".
        layout: published layout of the weights; the one whose names fit when None.
        size: (height, width) of the exported graph, and the example size of a dynamic one; the model's own when None.
        dynamic: batch, height and width may vary.
        fp16: make the FP16 forms.
        bf16: make the BF16 forms.
        fp16_exclude: what stays FP32 in FP16 and BF16 forms, and in what surrounds INT8: torch module paths, operator
            types or node names.
        int8: make the INT8 forms (convolutions and linear layers in INT8, the rest in FP16).
        calibration: folder of images or .npz, for INT8 and for the ranges of FP16 and BF16; the model's bundled
            training images when None.
        calibration_method: how the ranges of INT8 are chosen, see `edgeattn.export.calibration_methods`.
        calibration_cache: folder of calibration results by data and graph that runs share; the run directory alone
            skips unchanged stages when None.
        int8_exclude: what stays in floating point in INT8 forms, beside what the blocks declare: torch module paths,
            operator types or node names.
        int8_attention: attention products in INT8 too; not together with `plugins`.
        preprocess: the graph takes RGB uint8 images (batch, height, width, 3) and normalises them.
        postprocess: "labels" or "probabilities" in place of the network's outputs; see `edgeattn.models.deployable`.
        plugins: also make the forms with plugin nodes.
        plugin_host: "cpp", or "python" for a further file of each plugin form with one node per kernel launch, which
            TensorRT's Python plugins need.
        target: deployment target, which decides the opset and whether plugin nodes come without bodies.
        opset: version of the standard operators; the target's when None.
        images: folder of images to judge parity on; the model's held-out samples when None.
        sample_count: how many samples or images to judge on, at most.
        extra_sizes: further (height, width) at which dynamic forms are judged.
        threads: threads that run the original and the forms; small networks gain nothing from more than one.
        limits: errors of outputs that the user allows, in place of the derived limits.
    """

    model: str
    checkpoint: str = BUNDLED
    layout: str | None = None
    size: tuple[int, int] | None = None
    dynamic: bool = False
    fp16: bool = False
    bf16: bool = False
    fp16_exclude: tuple[str, ...] = ()
    int8: bool = False
    int8_exclude: tuple[str, ...] = ()
    calibration: Path | None = None
    calibration_method: str = DEFAULT_METHOD
    calibration_cache: Path | None = None
    int8_attention: bool = False
    preprocess: bool = False
    postprocess: str | None = None
    plugins: bool = False
    plugin_host: str = PLUGIN_HOSTS[0]
    target: str | None = None
    opset: int | None = None
    images: Path | None = None
    sample_count: int = 200
    extra_sizes: tuple[tuple[int, int], ...] = ()
    threads: int = 1
    limits: UserLimits = NO_LIMITS


def _refuse_idle_options(request: ExportRequest) -> None:
    """Raise where an option would have no effect, rather than ignore it."""
    reduced = request.fp16 or request.bf16 or request.int8
    if not reduced and request.calibration is not None:
        raise UserError(
            f"calibration data is given ({request.calibration}), but no INT8, FP16 or BF16 form. Add --int8, --fp16 or "
            "--bf16, or drop it."
        )
    if not reduced and request.fp16_exclude:
        raise UserError(
            f"{request.fp16_exclude[0]} is to stay FP32, but every form is FP32. Add --fp16, --bf16 or --int8, or drop "
            "the exclusion."
        )
    idle = {
        "an INT8 exclusion": bool(request.int8_exclude),
        "a calibration method": request.calibration_method != DEFAULT_METHOD,
        "a calibration cache": request.calibration_cache is not None,
        "INT8 attention": request.int8_attention,
    }
    if not request.int8 and (given := [name for name, is_given in idle.items() if is_given]):
        raise UserError(f"{' and '.join(given)} is asked for, but no INT8 form. Add --int8 or drop it.")
    method_named(request.calibration_method)
    if request.int8_attention and request.plugins:
        raise UserError("plugin nodes compute attention in FP16, but INT8 attention is asked for. Drop one of the two.")
    if request.extra_sizes and not request.dynamic:
        raise UserError("extra sizes are given, but a static graph takes one size only. Add --dynamic or drop them.")


def _refuse_unusable_host(request: ExportRequest, target: Target | None) -> None:
    """Raise where the host of the plugins is unknown, has nothing to run, or does not exist on the target."""
    host = request.plugin_host
    if host not in PLUGIN_HOSTS:
        raise UserError(f"unknown plugin host {host!r}. Choose {' or '.join(PLUGIN_HOSTS)}.")
    if host == PLUGIN_HOSTS[0]:
        return
    if not request.plugins:
        raise UserError(f"the plugin host {host} is given, but no plugin form. Add --plugins or drop it.")
    if target is None:
        raise UserError(f"the plugin host {host} depends on the TensorRT version. Name the target with --target.")
    if not target.takes_python_plugins:
        version = ".".join(map(str, target.tensorrt))
        raise UserError(
            f"{target.name} has TensorRT {version}, and Python plugins need 10.15 or later. Drop --plugin-host {host}: "
            "the C++ plugin library runs there."
        )


class ExportRun:
    """One `edgeattn export`: makes the forms of a request in a run directory.

    Args:
        request: what to make.
        output: the run directory.
        progress: told about stages and steps.

    Raises:
        UserError: unknown names, sizes, or data that cannot be used; found before any long work.
    """

    def __init__(self, request: ExportRequest, output: Path, progress: Progress | None = None) -> None:
        _refuse_idle_options(request)
        self.request = request
        self.base = MODELS.get(request.model)
        self.deployment = Deployment(request.preprocess, request.postprocess)
        self.spec = self.deployment.spec(self.base)
        request.limits.check(self.spec.main_outputs)
        self.target: Target | None = TARGETS.get(request.target) if request.target else None
        _refuse_unusable_host(request, self.target)
        self.size = request.size or self.spec.size
        self.progress = progress or (lambda stage, done, total: None)
        self.checkpoint = checkpoint_path(self.spec, request.checkpoint)
        refuse_size(self.base, self.size, request.extra_sizes)
        network = self.base.build()
        self.loaded = load_published(self.base, network, read_checkpoint(self.checkpoint), request.layout)
        self.model = self.deployment.network(self.base, network)
        self.calibration = self._calibration() if request.fp16 or request.bf16 or request.int8 else None
        self._ranges: dict[str, MeasuredRanges] = {}
        self.samples = EvaluationSamples(self.spec, request.images, self.size, request.sample_count)
        self.directory = RunDirectory(output)

    def run(self) -> dict[str, Any]:
        """Make every form, compare them with the original, and write `parity.json` and `report.html`.

        Returns:
            The content of `parity.json`, see `edgeattn.validation.records.Parity.as_dict`.
        """
        self.begin()
        return self.judge(self.make_forms())

    def begin(self) -> None:
        """Record what is run, and how the weights fit, before the first stage."""
        self.directory.describe(self.facts)
        write_text(self.directory.path / "load_report.json", json.dumps(self.loaded.as_dict(), indent=1) + "\n")

    @property
    def notes(self) -> dict[str, list[str]]:
        """What a user should read about the forms, by stage, such as constants that FP16 cannot hold."""
        stages: dict[str, Any] = self.directory.manifest["stages"]  # type: ignore[assignment]
        facts = {name: stage.get("facts", {}) for name, stage in stages.items()}
        notes = {name: known["notes"] for name, known in facts.items() if known.get("notes")}
        run: dict[str, Any] = self.directory.manifest["run"]  # type: ignore[assignment]
        if self.request.int8 and (shared := (run.get("calibration") or {}).get("shared_with_evaluation")):
            warning = (
                f"{shared} of the {run['samples']} samples that parity is judged on are calibration samples too, which "
                "flatters INT8. Give other images with --images or --calibration."
            )
            notes["calibration"] = [warning]
        if self.request.dynamic and (note := fixed_size_note(self.base, self.size)):
            notes["export"] = [*notes.get("export", ()), note]
        return notes

    def make_forms(self) -> list[Form]:
        """Write the ONNX files and return the forms among them that the user asked for."""
        plugin_forms = {"fp32": self.export()}
        data = {
            "calibration": self.calibration.fingerprint if self.calibration else None,
            "fp16_exclude": list(self.request.fp16_exclude),
        }
        for precision, kind, asked in (("fp16", FP16, self.request.fp16), ("bf16", BF16, self.request.bf16)):
            if asked:
                plugin_forms[precision] = self.convert(
                    precision, plugin_forms["fp32"], functools.partial(self._reduce, kind), data
                )
        if self.request.int8:
            settings = {
                **data,
                "method": self.request.calibration_method,
                "attention": self.request.int8_attention,
                "int8_exclude": list(self.request.int8_exclude),
            }
            plugin_forms["int8"] = self.convert("int8", plugin_forms["fp32"], self._quantise, settings)
        return [
            Form(name, file, precision, plugin=plugin)
            for precision, path in plugin_forms.items()
            for name, file, plugin in self.representations(precision, path)
        ]

    def representations(self, name: str, source: Path) -> Iterator[tuple[str, Path, bool]]:
        """Write what the user gets of a form with plugin nodes: standard operators, and the plugins if asked for.

        Where the target or the plugin host needs another file of the plugin form, it is written beside it.

        Args:
            name: of the form, such as "fp16".
            source: its file with plugin nodes.

        Yields:
            Name, file, and whether it has plugin nodes, of each form to be judged.
        """
        yield name, self._inline(name, source), False
        if self.request.plugins:
            yield f"{name} plugin", source, True
            if self.target and not self.target.takes_function_bodies:
                self._strip(name, source)
            if self.request.plugin_host != PLUGIN_HOSTS[0]:
                self._expand(name, source)

    def judge(self, forms: Sequence[Form]) -> dict[str, Any]:
        """Compare forms with the original, write the results, and return the content of `parity.json`."""
        request = self.request
        settings = {
            "forms": [[form.name, form.precision, form.plugin] for form in forms],
            "declaration": self.spec.fingerprint,
            "samples": len(self.samples),
            "size": list(self.size),
            "extra_sizes": [list(size) for size in request.extra_sizes],
            "target": request.target,
            "limits": dataclasses.asdict(request.limits),
            "rules": rules_digest(),
        }
        inputs = [self.checkpoint, *(form.path for form in forms), *([request.images] if request.images else [])]
        path, _ = self.directory.stage(
            "compare",
            lambda: write_evidence(self._compare(forms), self.directory.path, self.directory.manifest),
            settings=settings,
            inputs=inputs,
            outputs=["parity.json", "report.html"],
        )
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _compare(self, forms: Sequence[Form]) -> Parity:
        original = load_original(self.base, self.checkpoint, self.loaded.layout)
        original = self.deployment.original(self.base, original)
        total, threads = len(self.samples), self.request.threads
        self.progress("compare", 0, total)
        parity = compare_forms(
            self.spec,
            original,
            forms,
            self.samples,
            progress=lambda done: self.progress("compare", done, total),
            threads=threads,
            limits=self.request.limits,
        )
        parity = dataclasses.replace(parity, support=self._support(forms))
        if not self.request.extra_sizes:
            return parity
        sizes = compare_sizes(
            self.spec,
            original,
            forms,
            self.request.extra_sizes,
            samples=islice(self.samples, 2),
            threads=threads,
            limits=self.request.limits,
        )
        return dataclasses.replace(parity, sizes=sizes)

    def _support(self, forms: Sequence[Form]) -> tuple[SupportReport, ...]:
        """Say which forms the target's TensorRT takes, each as the target gets it."""
        target = self.target
        if target is None:
            return ()
        strips = not target.takes_function_bodies
        paths = [self.stripped_path(form.precision) if form.plugin and strips else form.path for form in forms]
        return tuple(
            check_support(path, target.tensorrt, target=target.name, dla_cores=target.dla_cores or 0) for path in paths
        )

    def export(self) -> Path:
        """Write the FP32 form with plugin nodes, and return its path."""
        opset = self.request.opset or (self.target.opset if self.target else DEFAULT_OPSET)
        settings = {
            "model": self.spec.name,
            "declaration": self.spec.fingerprint,
            "layout": self.loaded.layout,
            "size": list(self.size),
            "dynamic": self.request.dynamic,
            "opset": opset,
            **dataclasses.asdict(self.deployment),
        }
        path = self.plugin_path("fp32")

        def work() -> None:
            self.progress("export", 0, 1)
            # A dynamic batch is exported with an example of two, because torch specialises axes of size one.
            shape = self.spec.input_shape(2 if self.request.dynamic else 1, self.size)
            example = torch.from_numpy(np.random.default_rng(0).uniform(0, 2, shape).astype(self.spec.input_type))
            kept = [index for index, output in enumerate(self.spec.outputs) if not output.auxiliary]
            axes = self.spec.image_axes
            model = to_onnx(
                self.model,
                [example] * len(self.spec.inputs),
                input_names=self.spec.inputs,
                output_names=self.spec.main_outputs,
                outputs=kept,
                dynamic_axes=[axes] * len(self.spec.inputs) if self.request.dynamic else None,
                opset=opset,
            )
            save_model(model, path)
            self.progress("export", 1, 1)

        return self.stage("export", work, settings, [self.checkpoint], path)

    def convert(
        self,
        precision: str,
        source: Path,
        convert: Callable[[onnx.ModelProto], tuple[Fp16Result, Mapping[str, object]]],
        settings: Mapping[str, object],
    ) -> Path:
        """Write a form of another precision, as a stage of the run.

        Args:
            precision: name of the stage, which the file's name has too.
            source: the form that it is made from.
            convert: makes it, and says what to record beside its notes.
            settings: everything but the source that it depends on, as JSON values.

        Returns:
            The form's path.
        """
        path = self.plugin_path(precision)

        def work() -> dict[str, object]:
            self.progress(precision, 0, 1)
            result, facts = convert(onnx.load(source))
            save_model(result.model, path)
            self.progress(precision, 1, 1)
            return {"notes": list(result.notes), "fp32_nodes": dict(result.fp32_nodes), **facts}

        return self.stage(precision, work, settings, [source], path)

    def _reduce(self, kind: ReducedType, model: onnx.ModelProto) -> tuple[Fp16Result, Mapping[str, object]]:
        """Return the FP16 or BF16 form, and the ranges that it is made by."""
        ranges = self.measured_ranges(kind, model)
        convert = to_fp16 if kind == FP16 else to_bf16
        result = convert(model, keep_fp32=self.request.fp16_exclude, ranges=ranges)
        if ranges is not None:
            return result, self._range_facts(ranges)
        notes = (unmeasured_note(self.spec), *result.notes)
        return dataclasses.replace(result, notes=notes), self._range_facts(None)

    def measured_ranges(self, kind: ReducedType, model: onnx.ModelProto) -> MeasuredRanges | None:
        """Return what the tensors of a form hold on the first calibration batches, measured once for each type.

        Args:
            kind: FP16 or BF16, whose limits count.
            model: the FP32 form.

        Returns:
            The ranges; None where there is no calibration data.
        """
        if self.calibration is None:
            return None
        if kind.label not in self._ranges:
            total = min(RANGE_COUNT, self.calibration.count)
            self.progress("ranges", 0, total)
            self._ranges[kind.label] = measure_ranges(
                model,
                islice(self.calibration, RANGE_COUNT),
                kind,
                progress=lambda done: self.progress("ranges", done, total),
            )
        return self._ranges[kind.label]

    def _range_facts(self, ranges: MeasuredRanges | None) -> dict[str, object]:
        facts: dict[str, object] = {"excluded_by_user": list(self.request.fp16_exclude)}
        if ranges is None:
            return facts
        defects = {name: defect for name in ranges.tensors if (defect := ranges.defect(name))}
        return {**facts, "range_batches": ranges.batches, "range_margin": OVERFLOW_MARGIN, "out_of_range": defects}

    def _quantise(self, model: onnx.ModelProto) -> tuple[Fp16Result, Mapping[str, object]]:
        """Return the INT8 form with FP16 around it, and what is INT8 in it."""
        assert self.calibration is not None
        ranges = self.measured_ranges(FP16, model)
        if self.request.int8_attention:  # plugin nodes compute in floating point
            model = inline_plugins(model)
        declared = declared_exclusions(self.model, model)
        options = Int8Options(
            exclude=(*declared, *with_operators_named(with_node_names(model), self.request.int8_exclude)),
            method=self.request.calibration_method,
            attention=self.request.int8_attention,
            cache=self.request.calibration_cache,
        )
        int8 = quantise(model, self.calibration, options, progress=self.calibrated)
        half = to_fp16(int8.model, keep_fp32=self.request.fp16_exclude, ranges=ranges)
        facts = {
            **self._range_facts(ranges),
            "int8_excluded_by_blocks": list(declared),
            "int8_excluded_by_user": list(self.request.int8_exclude),
            "int8_layers": {name: round(ratio, 1) for name, ratio in int8.layers.items() if math.isfinite(ratio)},
            "float_layers": dict(int8.float_layers),
            "rescaled": list(int8.rescaled),
        }
        return dataclasses.replace(half, notes=(*int8.notes, *half.notes)), facts

    def _inline(self, precision: str, source: Path) -> Path:
        path = self.directory.path / f"model{_suffix(precision)}.onnx"

        def work() -> None:
            save_model(inline_plugins(onnx.load(source)), path)

        return self.stage(f"inline-{precision}", work, {}, [source], path)

    def _strip(self, precision: str, source: Path) -> Path:
        path = self.stripped_path(precision)

        def work() -> None:
            save_model(strip_bodies(onnx.load(source)), path)

        return self.stage(f"strip-{precision}", work, {}, [source], path)

    def _expand(self, precision: str, source: Path) -> Path:
        path = self.directory.path / f"model.plugin{_suffix(precision)}.launches.onnx"

        def work() -> dict[str, object]:
            result = expand_launches(onnx.load(source))
            save_model(result.model, path)
            return {"notes": result.notes, "expanded": list(result.expanded)}

        return self.stage(f"launches-{precision}", work, {}, [source], path)

    def stage(
        self,
        name: str,
        work: Callable[[], Mapping[str, object] | None],
        settings: Mapping[str, object],
        inputs: list[Path],
        output: Path,
    ) -> Path:
        """Run a stage that writes one file of the run directory, unless nothing that it depends on has changed.

        Args:
            name: unique name of the stage.
            work: writes the file; what it returns is recorded.
            settings: everything but the inputs that the file depends on, as JSON values.
            inputs: files that it is made from.
            output: the file.

        Returns:
            The file.
        """
        relative = output.relative_to(self.directory.path).as_posix()
        return self.directory.stage(name, work, settings=settings, inputs=inputs, outputs=[relative])[0]

    def plugin_path(self, precision: str) -> Path:
        """Where a plugin form goes; it is an intermediate, kept out of sight, unless asked for."""
        folder = self.directory.path if self.request.plugins else self.directory.path / "intermediate"
        return folder / f"model.plugin{_suffix(precision)}.onnx"

    def stripped_path(self, precision: str) -> Path:
        """Where a plugin form without function bodies goes."""
        return self.directory.path / f"model.plugin{_suffix(precision)}.stripped.onnx"

    def _calibration(self) -> CalibrationSamples | None:
        """Open the calibration images; see `calibration_data`."""
        varies = self.request.dynamic and not self.spec.fixed_size
        shape = self.spec.input_shape(None if self.request.dynamic else 1, (None, None) if varies else self.size)
        return calibration_data(self.spec, self.request.calibration, self.size, shape, int8=self.request.int8)

    @property
    def facts(self) -> dict[str, object]:
        """What is run, on what and where."""
        return {
            "model": self.spec.name,
            "declaration": self.base.fingerprint,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": sha256_of(self.checkpoint),
            "layout": self.loaded.layout,
            "size": list(self.size),
            "dynamic": self.request.dynamic,
            **dataclasses.asdict(self.deployment),
            "target": self.target.name if self.target else None,
            "calibration": self._calibration_facts(),
            "evaluation": str(self.request.images.name) if self.request.images else "held-out samples",
            "samples": len(self.samples),
            "tf32": False,
            "measured_on": "CPU, ONNX Runtime",
        }

    def _calibration_facts(self) -> dict[str, object] | None:
        if self.calibration is None:
            return None
        origin = self.request.calibration.name if self.request.calibration else f"bundled with {self.spec.name}"
        return {
            "origin": origin,
            "samples": self.calibration.count,
            "sha256": self.calibration.fingerprint,
            "shared_with_evaluation": self.calibration.shared_with(map(self.spec.network_inputs, self.samples)),
        }

    def calibrated(self, batches: int) -> None:
        """Tell about the progress of a calibration."""
        self.progress("calibrate", batches, self.calibration.count if self.calibration else batches)


def save_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model atomically after checking it."""
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path


def _suffix(precision: str) -> str:
    return "" if precision == "fp32" else f".{precision}"
