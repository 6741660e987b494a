"""From a declared sweep to its tasks and the combinations they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.deploy.evidence import checkpoint_path
from edgeattn.deploy.sweep.configuration import TENSORRT, Checkpoint, Size, Sweep, SweepTarget
from edgeattn.deploy.sweep.tasks import Task, content_key
from edgeattn.export.run_directory import versions
from edgeattn.foundation import sha256_of
from edgeattn.models import MODELS
from edgeattn.targets import TARGETS

STAGES = {
    "export": "edgeattn.deploy.sweep.stages:export",
    "forms": "edgeattn.deploy.sweep.stages:forms",
    "parity": "edgeattn.deploy.sweep.stages:parity",
    "support": "edgeattn.deploy.sweep.stages:support",
    "estimate": "edgeattn.deploy.sweep.stages:estimate_form",
    "bundle": "edgeattn.deploy.sweep.stages:bundle",
    "device": "edgeattn.deploy.sweep.device_stage:device",
}
"""The function of each stage, in the order in which a combination goes through them."""


@dataclass(frozen=True)
class Combination:
    """One cell of the matrix.

    Attributes:
        checkpoint: name of the checkpoint.
        model: name of its model.
        size: (height, width).
        precision: "fp32", "fp16", "bf16" or "int8".
        plugins: with plugin nodes.
        target: name of the target.
        tasks: names of its tasks by stage; several combinations share some.
    """

    checkpoint: str
    model: str
    size: Size
    precision: str
    plugins: bool
    target: str
    tasks: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What a sweep comes to.

    Attributes:
        tasks: each after those it needs.
        combinations: the cells of the matrix, in its order.
    """

    tasks: tuple[Task, ...]
    combinations: tuple[Combination, ...]


def make_plan(sweep: Sweep) -> Plan:
    """Return the tasks of a sweep. Checkpoints and data are read, to tell whether they have changed.

    Raises:
        UserError: a file cannot be read, or weights are to be bundled with a model that has none.
    """
    builder = _Builder(sweep)
    combinations = [
        builder.combination(checkpoint, size, precision, plugins, target)
        for checkpoint in sweep.checkpoints
        for size in checkpoint.sizes or sweep.matrix.sizes or (MODELS.get(checkpoint.model).size,)
        for precision in sweep.matrix.precisions
        for plugins in sweep.matrix.plugins
        for target in sweep.targets
    ]
    return Plan(tuple(builder.tasks.values()), tuple(combinations))


class _Builder:
    """Makes every task once."""

    def __init__(self, sweep: Sweep) -> None:
        self.tasks: dict[str, Task] = {}
        self._sweep = sweep
        self._versions = versions()
        self._inputs = {checkpoint.name: _inputs(checkpoint) for checkpoint in sweep.checkpoints}

    def combination(
        self, checkpoint: Checkpoint, size: Size, precision: str, plugins: bool, target: SweepTarget
    ) -> Combination:
        """Return a cell of the matrix after making its tasks."""
        options, inputs = self._sweep.options, self._inputs[checkpoint.name]
        opset = options.opset or TARGETS.get(target.name).opset
        # Files count by their content, wherever they are.
        files = {name: getattr(checkpoint, name) for name in ("path", "images", "calibration")}
        judged = {"samples": options.samples}
        declaration = MODELS.get(checkpoint.model).fingerprint
        common: dict[str, Any] = {"model": checkpoint.model, "layout": checkpoint.layout}
        common |= {"size": list(size), "opset": opset}
        made: dict[str, Task] = {}

        def add(
            stage: str,
            label: str,
            settings: Mapping[str, Any],
            *needs: str,
            reads: tuple[str, ...] = (),
            indifferent: Mapping[str, Any] | None = None,
            resource: str | None = None,
        ) -> None:
            """Make a task; it is told what its result is `indifferent` to, which does not count into its key."""
            needed = [made[name] for name in needs]
            read = {name: inputs[name] for name in reads if name in inputs}
            read["declaration"] = declaration
            key = content_key(STAGES[stage], settings, read, needed, self._versions)
            names = tuple(task.name for task in needed)
            told = {**files, **(indifferent or {}), **settings}
            task = Task(stage, label, STAGES[stage], told, key, names, resource)
            made[stage] = self.tasks.setdefault(task.name, task)

        label = f"{checkpoint.name}.{size[0]}x{size[1]}.opset{opset}"
        add("export", label, common, reads=("weights",), indifferent=judged)
        converted = common | {"precision": precision}
        data: tuple[str, ...] = ("weights",)
        if precision != "fp32":
            converted |= {"fp16_exclude": list(options.fp16_exclude)}
            data = ("weights", "calibration")
        if precision == "int8":
            converted |= {
                "int8_exclude": list(options.int8_exclude),
                "calibration_method": options.calibration_method,
            }
        if precision != "fp32":
            add("forms", f"{label}.{precision}", converted, "export", reads=data, indifferent=judged)
        label = f"{label}.{precision}.{'plugins' if plugins else 'plain'}"
        formed = converted | judged | {"plugins": plugins}
        add("parity", label, formed, "export" if precision == "fp32" else "forms", reads=(*data, "images"))
        label = f"{label}.{target.name}"
        aimed = {"target": target.name, "plugins": plugins}
        add("support", label, aimed, "parity")
        add("estimate", label, aimed, "parity")
        if options.bundle:
            packed = {"golden": options.golden, "weights_licence": options.weights_licence}
            add("bundle", label, aimed | packed, "parity")
        device = self._sweep.device
        if device is not None and (device.engine != TENSORRT or target.resource is not None):
            add("device", label, dataclasses.asdict(device), "bundle", resource=target.resource)
        return Combination(
            checkpoint.name,
            checkpoint.model,
            size,
            precision,
            plugins,
            target.name,
            {stage: task.name for stage, task in made.items()},
        )


def _inputs(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digests of what a checkpoint's tasks read."""
    weights = checkpoint_path(MODELS.get(checkpoint.model), checkpoint.path)
    given = {"images": checkpoint.images, "calibration": checkpoint.calibration}
    return {"weights": sha256_of(weights)} | {
        name: sha256_of(Path(path)) for name, path in given.items() if path is not None
    }
