"""Figures of the model card: `python examples/model_card.py` evaluates the bundled models on 200 held-out samples.

Each is evaluated as trained and with its attention switched off: criss-cross attention with gamma = 0, co-attention
with a reference frame that belongs to another pair. Measured in PyTorch on the CPU.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from edgeattn.models import MODELS, ModelSpec
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint
from edgeattn.validation.metrics import Confusion

BUNDLED = ("ccnet-digits", "cosnet-digits")


def mean_iou(spec: ModelSpec, model: nn.Module, count: int, *, ablate: bool = False, first_map: bool = False) -> float:
    """Return the mIoU of a model on the first `count` held-out samples.

    Args:
        spec: the model's declaration.
        model: the network with its weights.
        count: number of samples.
        ablate: switch the attention off; only the first map of a sample counts then, since a foreign reference frame
            has no truth of its own.
        first_map: count only the first map all the same, for comparison with an ablation.
    """
    assert spec.samples is not None
    samples = list(spec.samples(count))
    pair = len(spec.inputs) == 2
    if ablate and not pair:
        model = copy.deepcopy(model)
        nn.init.zeros_(model.head.cca.gamma)
    confusion = Confusion(len(spec.classes))
    for index, sample in enumerate(samples):
        inputs = spec.network_inputs(sample)
        if ablate and pair:
            inputs["reference"] = spec.network_inputs(samples[index - 1])["reference"]
        with torch.no_grad():
            outputs = model(*(torch.from_numpy(inputs[name]) for name in spec.inputs))
        named = {output.name: value for output, value in zip(spec.outputs, outputs, strict=True)}
        labels = spec.labels(named, spec.size)[0].numpy()
        kept = 1 if ablate or first_map else len(labels)
        assert sample.target is not None
        confusion.add(sample.target[:kept], labels[:kept])
    return confusion.mean_iou()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    count = parser.parse_args().samples
    table = Table(
        "model", "mIoU", "first frame", "ablated", "points lost", title=f"{count} held-out samples (CPU, PyTorch)"
    )
    for name in BUNDLED:
        spec = MODELS.get(name)
        assert spec.checkpoint is not None
        model = spec.build()
        load_checkpoint(model, read_checkpoint(spec.checkpoint))
        score = mean_iou(spec, model, count)
        first, ablated = (mean_iou(spec, model, count, ablate=off, first_map=True) for off in (False, True))
        table.add_row(name, f"{score:.4f}", f"{first:.4f}", f"{ablated:.4f}", f"{100 * (first - ablated):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
