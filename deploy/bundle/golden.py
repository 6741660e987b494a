"""Golden samples: evaluation samples of the run with the outputs of the PyTorch original."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeattn.deploy.bundle.run_forms import Run
from edgeattn.deploy.evidence import BUNDLED, EvaluationSamples, checkpoint_path, load_original
from edgeattn.foundation import UserError, sha256_of
from edgeattn.models import ModelSpec
from edgeattn.models.deployable import Deployment
from edgeattn.validation.runners import TorchRunner


@dataclass(frozen=True)
class GoldenSample:
    """One golden sample.

    Attributes:
        name: of its file in the bundle.
        data: bytes of the file.
        outputs: of the original by name.
    """

    name: str
    data: bytes
    outputs: Mapping[str, np.ndarray]


def checkpoint_of(run: Run, spec: ModelSpec, checkpoint: Path | None) -> Path:
    """Return the weights that the run was made from.

    Raises:
        UserError: they are not given and not bundled with the model, or are others.
    """
    path = checkpoint_path(spec, BUNDLED if checkpoint is None else str(checkpoint))
    if sha256_of(path) != run.facts["checkpoint_sha256"]:
        raise UserError(
            f"{path} is not the checkpoint {run.facts['checkpoint']} that the run was made from: its SHA-256 differs. "
            "Give that one with --checkpoint."
        )
    return path


def deployment_of(run: Run) -> Deployment:
    """Return what surrounds the network in the run's graphs."""
    return Deployment(run.facts.get("preprocess", False), run.facts.get("postprocess"))


def golden_samples(
    run: Run, spec: ModelSpec, checkpoint: Path, images: Path | None, count: int
) -> Iterator[GoldenSample]:
    """Yield each golden sample: an uncompressed .npz, the same bytes each time.

    Args:
        run: the run, which says the size.
        spec: its model, without what surrounds the network in the run's graphs.
        checkpoint: its weights.
        images: the folder that parity was judged on; the model's held-out samples when None.
        count: samples at most.

    Raises:
        UserError: the run was judged on images and none are given, or the other way round.
    """
    judged_on = run.facts["evaluation"]
    given = images.name if images is not None else "held-out samples"
    if judged_on != given:
        raise UserError(
            f"the run was judged on {judged_on}, and golden samples would be taken from {given}. "
            + ("Drop --images." if images is not None else f"Give the folder {judged_on} with --images.")
        )
    height, width = run.facts["size"]
    samples = EvaluationSamples(spec, images, (height, width), count)
    deployment = deployment_of(run)
    original = deployment.original(spec, load_original(spec, checkpoint, run.facts.get("layout")))
    spec = deployment.spec(spec)
    names = [output.name for output in spec.outputs]
    with TorchRunner(original, spec.inputs, names, input_type=spec.input_type) as runner:
        for index, sample in enumerate(samples):
            inputs = spec.network_inputs(sample)
            outputs = {name: value for name, value in runner.infer(inputs).items() if name in spec.main_outputs}
            labels = spec.labels({name: torch.from_numpy(value) for name, value in outputs.items()}, (height, width))
            arrays = {f"input/{name}": value for name, value in inputs.items()}
            arrays |= {f"output/{name}": value for name, value in outputs.items()}
            arrays["labels"] = labels.numpy().astype(np.int16)
            if sample.target is not None:
                arrays["target"] = sample.target.astype(np.int16)
            stream = io.BytesIO()
            np.savez(stream, allow_pickle=False, **arrays)
            yield GoldenSample(f"golden/{index:03}.npz", stream.getvalue(), outputs)
