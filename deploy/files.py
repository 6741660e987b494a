"""Work on ONNX files that the user already has: comparing and rewriting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeattn.deploy.evidence import EvaluationSamples, checkpoint_path, load_original, write_evidence
from edgeattn.deploy.pipeline import Progress, save_model
from edgeattn.export.calibration import input_shapes
from edgeattn.export.model_file import load_model
from edgeattn.export.rewrite import RewriteResult
from edgeattn.export.rewrite import rewrite as rewrite_model
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import strip_bodies
from edgeattn.foundation import UserError, sha256_of
from edgeattn.models import MODELS
from edgeattn.models.deployable import Deployment
from edgeattn.validation.open_form import OpenForm, open_form
from edgeattn.validation.parity import Form, compare_forms
from edgeattn.validation.tolerance import NO_LIMITS, UserLimits


def form_of(file: OpenForm, plugin_libraries: Sequence[Path] = (), accumulation: int | None = None) -> Form:
    """Describe a file as a form: its precision and plugin nodes are read from the graph."""
    facts = file.facts
    precision = "int8" if facts.qdq else "bf16" if facts.bf16 else "fp16" if facts.fp16 else "fp32"
    return Form(file.path.name, file.path, precision, bool(facts.plugin_nodes), tuple(plugin_libraries), accumulation)


def compare_files(
    model: str,
    checkpoint: str,
    files: Sequence[Path],
    *,
    images: Path | None = None,
    sample_count: int = 200,
    output: Path | None = None,
    threads: int = 1,
    plugins: Sequence[Path] = (),
    layout: str | None = None,
    limits: UserLimits = NO_LIMITS,
    accumulation: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge ONNX files, and engines built from them here, against the PyTorch original with the same weights.

    Args:
        model: name of the model's declaration.
        checkpoint: path of the trained weights, or "bundled".
        files: ONNX forms of the model, or engines (`.engine`) that `edgeattn build` made on this machine.
        images: folder of images to judge on; the model's held-out samples when None.
        sample_count: how many samples to judge on, at most.
        output: folder for `parity.json` and `report.html`; nothing is written when None.
        threads: threads that run the original and the forms.
        plugins: plugin libraries that the engines need.
        layout: published layout of the weights; the one whose names fit when None.
        limits: errors of outputs that the user allows, in place of the derived limits.
        accumulation: terms after which the emulation of FP16 rounds running totals to FP16; None for FP32 sums.
        progress: told about the samples done.

    Returns:
        What `parity.json` holds, see `edgeattn.validation.records.Parity.as_dict`.

    Raises:
        UserError: something given cannot be used.
    """
    base = MODELS.get(model)
    opened = [open_form(file, name=file.name) for file in files]
    deployment = _common_deployment({form.path: Deployment.of_graph(form.model) for form in opened})
    spec = deployment.spec(base)
    limits.check(spec.main_outputs)
    path = checkpoint_path(spec, checkpoint)
    original = deployment.original(base, load_original(base, path, layout))
    forms = [form_of(form, plugins, accumulation) for form in opened]
    sizes = {form.path: spec.image_size(input_shapes(form.model).values()) for form in opened}
    samples = EvaluationSamples(spec, images, _common_size(sizes) or spec.size, sample_count)

    def move(done: int) -> None:
        if progress:
            progress("compare", done, len(samples))

    parity = compare_forms(spec, original, forms, samples, progress=move, threads=threads, limits=limits)
    if output:
        facts = {
            "model": spec.name,
            "checkpoint_sha256": sha256_of(path),
            "files": {file.name: sha256_of(file) for file in files},
            "versions": versions(),
        }
        write_evidence(parity, output, facts)
    return parity.as_dict()


def _common_size(sizes: Mapping[Path, tuple[int, int] | None]) -> tuple[int, int] | None:
    """Return the (height, width) that files are fixed to, or None when all leave it open.

    Raises:
        UserError: files of different sizes, which cannot be judged on the same images.
    """
    fixed = {size: file for file, size in sizes.items() if size is not None}
    if len(fixed) > 1:
        given = ", ".join(f"{file} takes {size[0]}x{size[1]}" for size, file in fixed.items())
        raise UserError(f"the files are of different input sizes: {given}. Compare them one at a time.")
    return next(iter(fixed), None)


def _common_deployment(deployments: Mapping[Path, Deployment]) -> Deployment:
    """Return what surrounds the network in all files.

    Raises:
        UserError: it differs between them, so that one original cannot judge them all.
    """
    found = set(deployments.values())
    if len(found) > 1:
        given = ", ".join(f"{file} ({deployment.described})" for file, deployment in deployments.items())
        raise UserError(f"the files take or give different things: {given}. Compare them one at a time.")
    return found.pop() if found else Deployment()


def rewrite_file(model: Path, output: Path, *, strip: bool = False, seed: int = 0) -> RewriteResult:
    """Replace the attention cores of an ONNX file by plugin nodes and write the result.

    Args:
        model: any ONNX file.
        output: the file to write.
        strip: leave out the function bodies, as TensorRT up to 10.6 needs.
        seed: of the inputs that each replacement is verified on.

    Raises:
        UserError: the file is missing or no ONNX model, or the output cannot be written.
    """
    if output.is_dir():
        raise UserError(f"the output {output} is a folder. Give a file name with -o.")
    result = rewrite_model(load_model(model), seed=seed)
    save_model(strip_bodies(result.model) if strip else result.model, output)
    return result
