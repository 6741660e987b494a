"""`ModuleRun`: the run directory of a sensitivity analysis or a search, up to the first evaluation."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from edgeattn.deploy.evidence import load_original
from edgeattn.deploy.pipeline import ExportRequest, ExportRun, Progress, save_model
from edgeattn.deploy.tuning.data import JudgedSamples, store_samples
from edgeattn.deploy.tuning.evaluation import Workbench
from edgeattn.deploy.tuning.forms import KnownCalibration, Surroundings, known_calibration
from edgeattn.deploy.tuning.modules import Module, modules_of
from edgeattn.export.block_policies import declared_exclusions
from edgeattn.export.fp16 import with_operators_named
from edgeattn.export.int8 import Int8Options
from edgeattn.export.metadata import metadata_of
from edgeattn.export.node_selection import selected_names, with_node_names
from edgeattn.export.precision_types import FP16
from edgeattn.export.surgery import inline_plugins
from edgeattn.foundation import UserError, remove_leftovers, sha256_of
from edgeattn.validation.runners import MEASURED_ON

MEASURED = f"accuracy: {MEASURED_ON}, FP16 emulated with rounding after each operation, Q/DQ computed as written"
"""Where the accuracy of every assignment comes from."""


class ModuleRun(ExportRun):
    """An export whose modules get precisions one by one.

    Args:
        request: the model, the data and, for INT8, its options; static sizes only.
        output: the run directory.
        progress: told about stages and steps.
        granularity: see `modules_of`.
        depth: see `modules_of`.
        workers: processes that evaluate; the machine's number of processors when None.

    Attributes:
        workers: processes.

    Raises:
        UserError: unknown names, sizes, or data that cannot be used; found before any long work.
    """

    def __init__(
        self,
        request: ExportRequest,
        output: Path,
        progress: Progress | None = None,
        *,
        granularity: str = "layer",
        depth: int | None = None,
        workers: int | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"{workers} worker processes can do nothing. Give --workers 1 or more.")
        if request.dynamic:
            raise UserError("modules are judged and their costs estimated at one size. Drop --dynamic.")
        if request.preprocess or request.postprocess:
            raise UserError("modules are judged in a network by itself. Drop what surrounds it in the graph.")
        super().__init__(request, output, progress)
        self._granularity, self._depth = granularity, depth
        self.workers = workers or os.cpu_count() or 1

    def prepare(self) -> Workbench:
        """Export, calibrate once, run the original on all samples, and return what evaluates assignments."""
        self.begin()
        source = self.export()
        graph = self._named(source)
        model = onnx.load(graph)
        modules = self._modules(model)
        calibration = self._known_calibration(model) if self.request.int8 else None
        surroundings = Surroundings(self.measured_ranges(FP16, onnx.load(source)), self.request.fp16_exclude)
        samples = self._judged_samples()
        results = self._folder("evaluations")
        target = self.target.name if self.target else None
        return Workbench(graph, modules, samples, calibration, surroundings, target, self.request.plugins, results)

    @property
    def data_notes(self) -> tuple[str, ...]:
        """What a user should read about the samples."""
        return tuple(self.notes.get("calibration", []))

    def _named(self, source: Path) -> Path:
        """Write the FP32 graph with a unique name for every node, by which assignments are made."""
        attention = self.request.int8_attention
        path = self.directory.path / "intermediate" / "model.modules.onnx"

        def work() -> None:
            model = onnx.load(source)
            save_model(with_node_names(inline_plugins(model) if attention else model), path)

        return self.stage("modules", work, {"attention": attention}, [source], path)

    def _modules(self, model: onnx.ModelProto) -> tuple[Module, ...]:
        """Group the nodes; layers that their block or the user keeps out of INT8 have no INT8 form."""
        kept = (*declared_exclusions(self.model, model), *with_operators_named(model, self.request.int8_exclude))
        excluded = selected_names(((node.name, metadata_of(node)) for node in model.graph.node), kept, "int8_exclude")
        return modules_of(
            model,
            granularity=self._granularity,
            depth=self._depth,
            attention=self.request.int8_attention,
            excluded=excluded,
        )

    def _known_calibration(self, model: onnx.ModelProto) -> KnownCalibration:
        assert self.calibration is not None
        options = Int8Options(
            method=self.request.calibration_method,
            attention=self.request.int8_attention,
            cache=self.request.calibration_cache or self.directory.path / "intermediate" / "calibration",
        )
        return known_calibration(model, self.calibration, options, progress=self.calibrated)

    def _judged_samples(self) -> JudgedSamples:
        images = self.request.images
        source = {
            "model": self.spec.name,
            "declaration": self.spec.fingerprint,
            "checkpoint": sha256_of(self.checkpoint),
            "images": sha256_of(images) if images else "held-out",
            "size": list(self.size),
            "count": len(self.samples),
        }
        return store_samples(
            self.spec,
            load_original(self.base, self.checkpoint, self.loaded.layout),
            self.samples,
            self._folder("samples"),
            source=source,
            progress=lambda done: self.progress("original", done, len(self.samples)),
        )

    def _folder(self, name: str) -> Path:
        """Return a folder of the run for files that survive a killed run."""
        folder = self.directory.path / name
        remove_leftovers(folder)
        return folder
