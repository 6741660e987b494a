"""What the command line names, opened: forms and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgeattn.export.calibration import calibration_samples
from edgeattn.export.model_file import load_model
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.deployable import PLAIN, Deployment
from edgeattn.models.published import load_published
from edgeattn.models.spec import ModelSpec
from edgeattn.validation.divergence.forms import Observed, TorchForm
from edgeattn.validation.divergence.onnx_form import OnnxForm
from edgeattn.validation.divergence.plot import write_plot
from edgeattn.validation.divergence.records import Divergence, write_divergence
from edgeattn.validation.divergence.reduction import Reduction, write_minimal
from edgeattn.validation.divergence.search import Search
from edgeattn.validation.divergence.segments import Sessions
from edgeattn.validation.model_data import model_data


def torch_form(
    spec: ModelSpec, checkpoint: Path, deployment: Deployment = PLAIN, *, layout: str | None = None
) -> TorchForm:
    """Return the network that is exported, with trained weights.

    Args:
        spec: the model.
        checkpoint: its weights.
        deployment: what surrounds the network in the exported graph.
        layout: published layout of the weights; the one whose names fit when None.

    Raises:
        UserError: the checkpoint cannot be read or does not fit.
    """
    network = spec.build()
    load_published(spec, network, read_checkpoint(checkpoint), layout)
    outputs = [output.name for output in deployment.spec(spec).outputs]
    return TorchForm(deployment.network(spec, network), spec.inputs, outputs, name=f"{spec.name} in PyTorch")


def open_data(data: Path | None, form: OnnxForm, spec: ModelSpec | None, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the network inputs of up to `count` samples.

    Args:
        data: a folder of images or a .npz file of network inputs by name; the model's held-out samples when None.
        form: the form whose inputs are to be filled.
        spec: the model; needed for images and held-out samples.
        count: samples at most.

    Raises:
        UserError: there are no data, or they do not fit.
    """
    fixed = spec.image_size(form.inputs.values()) or spec.size if spec else None
    if data is not None:
        if data.is_dir() and spec is None:
            raise UserError(
                f"the images in {data} need preprocessing. Name the model with --model, or give a .npz file."
            )
        try:
            opened = (
                model_data(data, spec, fixed, form.inputs, minimum=1)
                if spec
                else calibration_samples(data, inputs=form.inputs, minimum=1)
            )
            yield from islice(opened, count)
        except UserError as error:
            raise UserError(str(error).replace("calibration ", "")) from error
        return
    if spec is None or spec.samples is None:
        raise UserError(
            "there are no data to compare the forms on. Give a .npz file or a folder of images with --data, or name a "
            "model with held-out samples with --model."
        )
    for sample in spec.samples(count):
        yield spec.network_inputs(sample.resized(fixed) if fixed else sample)


@dataclass(frozen=True)
class Found:
    """What a comparison of two sources found and left behind.

    Attributes:
        divergence: the answer.
        reduction: the minimal failing model; None without divergence or folder.
    """

    divergence: Divergence
    reduction: Reduction | None


def compare_sources(
    reference: str,
    candidate: str,
    spec: ModelSpec | None,
    *,
    checkpoint: Callable[[str], Path | None],
    data: Path | None = None,
    count: int = 4,
    output: Path | None = None,
    threads: int = 1,
    layout: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """Compare two forms that are given as text, and write what was found.

    Args:
        reference: path of an .onnx file, or trained weights.
        candidate: the same, for the form under test.
        spec: the model; needed for weights and images.
        checkpoint: turns the text that stands for weights into their path.
        data: see `open_data`.
        count: samples at most.
        output: folder for `divergence.json`, `divergence.svg` and, when the forms diverge, `minimal.onnx` with its
            inputs and expected outputs; nothing is written when None.
        threads: ONNX Runtime's threads within an operation.
        layout: published layout of the weights; the one whose names fit when None.
        progress: called after each sample with the number of samples done.

    Raises:
        UserError: something given cannot be used.
    """
    if layout is not None and all(Path(text).suffix == ".onnx" for text in (reference, candidate)):
        raise UserError(f"the layout {layout!r} is one of weights, but both forms are .onnx files. Drop --layout.")
    sessions = Sessions(threads)
    graphs = [load_model(text) for text in (reference, candidate) if Path(text).suffix == ".onnx"]
    deployment = Deployment.of_graph(graphs[0]) if graphs else PLAIN

    def open_form(text: str) -> Observed:
        if Path(text).suffix == ".onnx":
            return OnnxForm(Path(text), sessions=sessions)
        weights = checkpoint(text)
        if spec is None or weights is None:
            raise UserError(
                f"{text!r} is no .onnx file, so it stands for trained weights. Name their model with --model."
            )
        return torch_form(spec, weights, deployment, layout=layout)

    search = Search(open_form(reference), open_form(candidate))
    divergence = search.run(open_data(data, search.dissected, deployment.spec(spec) if spec else None, count), progress)
    reduction = None
    if output:
        write_divergence(divergence, output / "divergence.json")
        write_plot(divergence, output / "divergence.svg")
        if search.evidence is not None:
            reduction = write_minimal(search.evidence, search.observed, output)
    return Found(divergence, reduction)
