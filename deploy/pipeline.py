"""From a checkpoint to a run directory: every stage of `edgeattn export`, composed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import torch

from edgeattn.deploy.evidence import BUNDLED, EvaluationSamples, checkpoint_path, load_original, write_evidence
from edgeattn.export.calibration import CalibrationSamples, calibration_samples
from edgeattn.export.calibration_methods import DEFAULT_METHOD, method_named
from edgeattn.export.fp16 import Fp16Result, to_fp16
from edgeattn.export.int8 import Int8Options, quantise
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.plugin_launches import expand_launches
from edgeattn.export.run_directory import RunDirectory
from edgeattn.export.support import SupportReport, check_support
from edgeattn.export.surgery import inline_plugins, strip_bodies
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError, atomic_path, sha256_of, write_text
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint
from edgeattn.targets import TARGETS, Target
from edgeattn.validation.parity import Form, Parity, compare_forms, compare_sizes

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""

CALIBRATION_COUNT = 64
"""Bundled images that INT8 is calibrated on."""

PLUGIN_HOSTS = ("cpp", "python")
"""What runs the plugins in TensorRT: the C++ library, or Python ahead-of-time plugins (10.15 and later)."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export and which forms to make.

    Attributes:
        model: name of the model's declaration.
        checkpoint: path of the trained weights, or "bundled".
        size: (height, width) of the exported graph, and the example size of a dynamic one; the model's own when None.
        dynamic: batch, height and width may vary.
        fp16: make the FP16 forms.
        int8: make the INT8 forms (convolutions and linear layers in INT8, the rest in FP16).
        calibration: folder of images or .npz for INT8; the model's bundled training images when None.
        calibration_method: how the ranges of INT8 are chosen, see `edgeattn.export.calibration_methods`.
        calibration_cache: folder of calibration results by data and graph that runs share; the run directory alone
            skips unchanged stages when None.
        int8_attention: attention products in INT8 too; not together with `plugins`.
        plugins: also make the forms with plugin nodes.
        plugin_host: "cpp", or "python" for a further file of each plugin form with one node per kernel launch, which
            TensorRT's Python plugins need.
        target: deployment target, which decides the opset and whether plugin nodes come without bodies.
        opset: version of the standard operators; the target's when None.
        images: folder of images to judge parity on; the model's held-out samples when None.
        sample_count: how many samples or images to judge on, at most.
        extra_sizes: further (height, width) at which dynamic forms are judged.
        threads: threads that run the original and the forms; small networks gain nothing from more than one.
    """

    model: str
    checkpoint: str = BUNDLED
    size: tuple[int, int] | None = None
    dynamic: bool = False
    fp16: bool = False
    int8: bool = False
    calibration: Path | None = None
    calibration_method: str = DEFAULT_METHOD
    calibration_cache: Path | None = None
    int8_attention: bool = False
    plugins: bool = False
    plugin_host: str = PLUGIN_HOSTS[0]
    target: str | None = None
    opset: int | None = None
    images: Path | None = None
    sample_count: int = 200
    extra_sizes: tuple[tuple[int, int], ...] = ()
    threads: int = 1


def _refuse_idle_options(request: ExportRequest) -> None:
    """Raise where an option would have no effect, rather than ignore it."""
    if request.calibration is not None and not request.int8:
        raise UserError(f"calibration data is given ({request.calibration}), but no INT8 form. Add --int8 or drop it.")
    idle = {
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
        self.spec = MODELS.get(request.model)
        self.target: Target | None = TARGETS.get(request.target) if request.target else None
        _refuse_unusable_host(request, self.target)
        self.size = request.size or self.spec.size
        self.progress = progress or (lambda stage, done, total: None)
        self.checkpoint = checkpoint_path(self.spec, request.checkpoint)
        self.model = self.spec.build()
        self.load_report = load_checkpoint(self.model, read_checkpoint(self.checkpoint))
        self.calibration = self._calibration() if request.int8 else None
        self.samples = EvaluationSamples(self.spec, request.images, self.size, request.sample_count)
        self.directory = RunDirectory(output)

    def run(self) -> dict[str, Any]:
        """Make every form, compare them with the original, and write `parity.json` and `report.html`.

        Returns:
            The content of `parity.json`, see `edgeattn.validation.records.Parity.as_dict`.
        """
        self.directory.describe(self._facts())
        write_text(self.directory.path / "load_report.json", json.dumps(self.load_report.as_dict(), indent=1) + "\n")
        forms = self.make_forms()
        return self.judge(forms)

    @property
    def notes(self) -> dict[str, list[str]]:
        """What a user should read about the forms, by stage, such as constants that FP16 cannot hold."""
        stages: dict[str, Any] = self.directory.manifest["stages"]  # type: ignore[assignment]
        facts = {name: stage.get("facts", {}) for name, stage in stages.items()}
        notes = {name: known["notes"] for name, known in facts.items() if known.get("notes")}
        run: dict[str, Any] = self.directory.manifest["run"]  # type: ignore[assignment]
        if shared := (run.get("calibration") or {}).get("shared_with_evaluation"):
            warning = (
                f"{shared} of the {run['samples']} samples that parity is judged on are calibration samples too, which "
                "flatters INT8. Give other images with --images or --calibration."
            )
            notes["calibration"] = [warning]
        return notes

    def make_forms(self) -> list[Form]:
        """Write the ONNX files and return the forms among them that the user asked for."""
        plugin_forms = {"fp32": self._export()}
        if self.request.fp16:
            plugin_forms["fp16"] = self._convert("fp16", plugin_forms["fp32"], lambda model: (to_fp16(model), {}), {})
        if self.calibration is not None:
            samples = self.calibration
            settings = {
                "calibration": samples.fingerprint,
                "method": self.request.calibration_method,
                "attention": self.request.int8_attention,
            }
            plugin_forms["int8"] = self._convert(
                "int8", plugin_forms["fp32"], lambda model: self._quantise(model, samples), settings
            )
        forms = []
        for precision, path in plugin_forms.items():
            plain = self._inline(precision, path)
            forms.append(Form(precision, plain, precision, plugin=False))
            if self.request.plugins:
                forms.append(Form(f"{precision} plugin", path, precision, plugin=True))
                if self.target and not self.target.takes_function_bodies:
                    self._strip(precision, path)
                if self.request.plugin_host != PLUGIN_HOSTS[0]:
                    self._expand(precision, path)
        return forms

    def judge(self, forms: Sequence[Form]) -> dict[str, Any]:
        """Compare forms with the original, write the results, and return the content of `parity.json`."""
        request = self.request
        settings = {
            "forms": [[form.name, form.precision, form.plugin] for form in forms],
            "samples": len(self.samples),
            "size": list(self.size),
            "extra_sizes": [list(size) for size in request.extra_sizes],
            "target": request.target,
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
        original = load_original(self.spec, self.checkpoint)
        total, threads = len(self.samples), self.request.threads
        self.progress("compare", 0, total)
        parity = compare_forms(
            self.spec,
            original,
            forms,
            self.samples,
            progress=lambda done: self.progress("compare", done, total),
            threads=threads,
        )
        parity = dataclasses.replace(parity, support=self._support(forms))
        if not self.request.extra_sizes:
            return parity
        sizes = compare_sizes(
            self.spec, original, forms, self.request.extra_sizes, samples=islice(self.samples, 2), threads=threads
        )
        return dataclasses.replace(parity, sizes=sizes)

    def _support(self, forms: Sequence[Form]) -> tuple[SupportReport, ...]:
        """Say which forms the target's TensorRT takes, each as the target gets it."""
        target = self.target
        if target is None:
            return ()
        strips = not target.takes_function_bodies
        paths = [self._stripped_path(form.precision) if form.plugin and strips else form.path for form in forms]
        return tuple(
            check_support(path, target.tensorrt, target=target.name, dla_cores=target.dla_cores or 0) for path in paths
        )

    def _export(self) -> Path:
        opset = self.request.opset or (self.target.opset if self.target else DEFAULT_OPSET)
        settings = {
            "model": self.spec.name,
            "size": list(self.size),
            "dynamic": self.request.dynamic,
            "opset": opset,
        }
        path = self._plugin_path("fp32")

        def work() -> None:
            self.progress("export", 0, 1)
            height, width = self.size
            # A dynamic batch is exported with an example of two, because torch specialises axes of size one.
            example = torch.randn(2 if self.request.dynamic else 1, 3, height, width)
            kept = [index for index, output in enumerate(self.spec.outputs) if not output.auxiliary]
            axes = {0: "batch", 2: "height", 3: "width"}
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

        return self._stage("export", work, settings, [self.checkpoint], path)

    def _convert(
        self,
        precision: str,
        source: Path,
        convert: Callable[[onnx.ModelProto], tuple[Fp16Result, Mapping[str, object]]],
        settings: Mapping[str, object],
    ) -> Path:
        path = self._plugin_path(precision)

        def work() -> dict[str, object]:
            self.progress(precision, 0, 1)
            result, facts = convert(onnx.load(source))
            save_model(result.model, path)
            self.progress(precision, 1, 1)
            return {"notes": list(result.notes), "fp32_nodes": dict(result.fp32_nodes), **facts}

        return self._stage(precision, work, settings, [source], path)

    def _quantise(self, model: onnx.ModelProto, samples: CalibrationSamples) -> tuple[Fp16Result, Mapping[str, object]]:
        """Return the INT8 form with FP16 around it, and what is INT8 in it."""
        options = Int8Options(
            method=self.request.calibration_method,
            attention=self.request.int8_attention,
            cache=self.request.calibration_cache,
        )
        if options.attention:  # plugin nodes compute in floating point
            model = inline_plugins(model)
        int8 = quantise(model, samples, options, progress=self._calibrated)
        half = to_fp16(int8.model)
        facts = {
            "int8_layers": {name: round(ratio, 1) for name, ratio in int8.layers.items() if math.isfinite(ratio)},
            "float_layers": dict(int8.float_layers),
            "rescaled": list(int8.rescaled),
        }
        return dataclasses.replace(half, notes=(*int8.notes, *half.notes)), facts

    def _inline(self, precision: str, source: Path) -> Path:
        path = self.directory.path / f"model{_suffix(precision)}.onnx"

        def work() -> None:
            save_model(inline_plugins(onnx.load(source)), path)

        return self._stage(f"inline-{precision}", work, {}, [source], path)

    def _strip(self, precision: str, source: Path) -> Path:
        path = self._stripped_path(precision)

        def work() -> None:
            save_model(strip_bodies(onnx.load(source)), path)

        return self._stage(f"strip-{precision}", work, {}, [source], path)

    def _expand(self, precision: str, source: Path) -> Path:
        path = self.directory.path / f"model.plugin{_suffix(precision)}.launches.onnx"

        def work() -> dict[str, object]:
            result = expand_launches(onnx.load(source))
            save_model(result.model, path)
            return {"notes": result.notes, "expanded": list(result.expanded)}

        return self._stage(f"launches-{precision}", work, {}, [source], path)

    def _stage(
        self,
        name: str,
        work: Callable[[], Mapping[str, object] | None],
        settings: Mapping[str, object],
        inputs: list[Path],
        output: Path,
    ) -> Path:
        relative = output.relative_to(self.directory.path).as_posix()
        return self.directory.stage(name, work, settings=settings, inputs=inputs, outputs=[relative])[0]

    def _plugin_path(self, precision: str) -> Path:
        """Where a plugin form goes; it is an intermediate, kept out of sight, unless asked for."""
        folder = self.directory.path if self.request.plugins else self.directory.path / "intermediate"
        return folder / f"model.plugin{_suffix(precision)}.onnx"

    def _stripped_path(self, precision: str) -> Path:
        return self.directory.path / f"model.plugin{_suffix(precision)}.stripped.onnx"

    def _calibration(self) -> CalibrationSamples:
        """Open the calibration images: the user's, or those that come with the model. They are never random."""
        height, width = (None, None) if self.request.dynamic else self.size
        shapes = dict.fromkeys(self.spec.inputs, (None if self.request.dynamic else 1, 3, height, width))
        if self.request.calibration is not None:
            return calibration_samples(
                self.request.calibration, inputs=shapes, size=self.size, preprocess=self.spec.preprocessing
            )
        if self.spec.calibration is None:
            raise UserError(
                f"INT8 needs real images, and none are bundled with {self.spec.name}. "
                "Give a folder of images or an .npz file with --calibration."
            )
        bundled = [
            self.spec.network_inputs(sample.resized(self.size)) for sample in self.spec.calibration(CALIBRATION_COUNT)
        ]
        return calibration_samples(bundled, inputs=shapes)

    def _facts(self) -> dict[str, object]:
        return {
            "model": self.spec.name,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": sha256_of(self.checkpoint),
            "size": list(self.size),
            "dynamic": self.request.dynamic,
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

    def _calibrated(self, batches: int) -> None:
        self.progress("calibrate", batches, self.calibration.count if self.calibration else batches)


def save_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model atomically after checking it."""
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return path


def _suffix(precision: str) -> str:
    return "" if precision == "fp32" else f".{precision}"
