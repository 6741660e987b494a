"""The networks that faults are injected into: the two bundled ones and a small classifier, with all their forms."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from edgeattn.blocks.abn import ABN
from edgeattn.blocks.cbam import CBAM
from edgeattn.blocks.squeeze_excitation import SqueezeExcitation
from edgeattn.blocks.transformer import TransformerEncoderLayer
from edgeattn.deploy.evidence import load_original
from edgeattn.export.calibration import calibration_samples, input_shapes
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import to_int8
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint
from edgeattn.models.digits import material
from edgeattn.models.spec import ModelSpec, OutputSpec, Preprocessing, Sample
from edgeattn.validation.divergence.forms import TorchForm
from edgeattn.validation.divergence.segments import Sessions

HEIGHT, WIDTH = 30, 40


class Classifier(nn.Module):
    """Convolutions, squeeze-and-excitation, CBAM and a transformer layer over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16, eps=1e-3)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.se = SqueezeExcitation(16, 4)
        self.mix = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.cbam = CBAM(16, 4)
        self.enlarge = nn.Upsample(size=(11, 15), mode="nearest")
        self.position = nn.Parameter(torch.zeros(1, 11 * 15, 16))
        self.layer = TransformerEncoderLayer(16, 2, 32, activation="gelu", norm_first=False)
        self.classify = nn.Linear(11 * 15 * 16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 10) of images (B, 3, H, W)."""
        x = self.se(self.pool(self.relu(self.norm(self.stem(image)))))
        x = self.enlarge(self.cbam(self.relu(self.mix(x)) + x))
        tokens = self.layer(x.flatten(2).transpose(1, 2) + self.position)
        return self.classify(tokens.flatten(1))


def _digits(split: str, seed: int, count: int) -> Iterator[Sample]:
    source, rng = material(split), np.random.default_rng(seed)
    for _ in range(count):
        index = int(rng.integers(len(source.labels)))
        ink = np.asarray(Image.fromarray(source.digits[index]).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
        ground, colour = rng.uniform(0, 100, 3), rng.uniform(150, 255, 3)
        image = ground + ink.clip(0, 1)[..., None] * (colour - ground) + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
        yield Sample((image.clip(0, 255).astype(np.uint8),), np.array([[[source.labels[index]]]], np.int64))


CLASSIFIER = ModelSpec(
    name="classifier-digits",
    summary="small classifier with SE, CBAM and a transformer layer",
    network=Classifier,
    arguments={},
    small={},
    original="unused:unused",
    inputs=("image",),
    outputs=(OutputSpec("logits", "logits"),),
    preprocessing=Preprocessing("RGB", 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    size=(HEIGHT, WIDTH),
    classes=tuple(map(str, range(10))),
    labels=lambda outputs, size: outputs["logits"].argmax(1)[:, None, None, None],
    samples=functools.partial(_digits, "test", 3),
    calibration=functools.partial(_digits, "train", 4),
)


def trained_classifier() -> nn.Module:
    """Return the classifier after a short training on digits."""
    torch.manual_seed(0)
    network = Classifier()
    samples = list(_digits("train", 5, 640))
    images = torch.from_numpy(np.concatenate([CLASSIFIER.preprocessing(sample.images[0]) for sample in samples]))
    labels = torch.tensor([int(sample.target.item()) for sample in samples if sample.target is not None])
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for step in range(150):
        chosen = torch.arange(step * 32, step * 32 + 32) % len(labels)
        optimiser.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimiser.step()
    return network.eval()


def bundled(name: str) -> nn.Module:
    """Return a bundled model with its trained weights."""
    spec = MODELS.get(name)
    assert spec.checkpoint is not None
    network = spec.build()
    load_checkpoint(network, read_checkpoint(spec.checkpoint))
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, ABN):
                part.weight[::3] *= -1  # the same function: its absolute value counts
    return network


@dataclass(frozen=True)
class Subject:
    """A network whose forms faults are injected into.

    Attributes:
        spec: its declaration.
        module: the torch network with its weights.
        forms: clean ONNX form by precision, in standard operators.
        reference: the torch side of `bisect`.
        weights: parameters and buffers by name.
        epsilons: of its normalisations, by module.
        sessions: prepared segments, shared by all forms.
    """

    spec: ModelSpec
    module: nn.Module
    forms: dict[str, onnx.ModelProto]
    reference: TorchForm
    weights: dict[str, np.ndarray]
    epsilons: dict[str, float]
    sessions: Sessions

    @property
    def original(self) -> nn.Module:
        """What parity is judged against: the independent original where the model has one."""
        checkpoint = self.spec.checkpoint
        return self.module if checkpoint is None else load_original(self.spec, checkpoint)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.spec.name

    def samples(self, precision: str) -> list[Sample]:
        """Return what parity is judged on: INT8 is judged by the task, which takes more samples."""
        assert self.spec.samples is not None
        return list(self.spec.samples(2 if precision != "int8" else 60 if self.spec is CLASSIFIER else 8))

    def feeds(self) -> list[dict[str, np.ndarray]]:
        """Return what `bisect` runs on."""
        assert self.spec.samples is not None
        return [self.spec.network_inputs(sample) for sample in self.spec.samples(1)]


def make_subject(name: str) -> Subject:
    """Export a network once and make its forms."""
    spec = CLASSIFIER if name == CLASSIFIER.name else MODELS.get(name)
    module = trained_classifier() if spec is CLASSIFIER else bundled(name)
    kept = [index for index, output in enumerate(spec.outputs) if not output.auxiliary]
    example = [torch.randn(1, 3, *spec.size)] * len(spec.inputs)
    plain = inline_plugins(
        to_onnx(module, example, input_names=spec.inputs, output_names=spec.main_outputs, outputs=kept)
    )
    assert spec.calibration is not None
    batches = [spec.network_inputs(sample) for sample in spec.calibration(32)]
    int8 = to_int8(plain, calibration_samples(batches, inputs=input_shapes(plain)))
    forms = {"fp32": plain, "fp16": to_fp16(plain).model, "int8": to_fp16(int8).model}
    reference = TorchForm(module, spec.inputs, [output.name for output in spec.outputs])
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    epsilons = {name: part.eps for name, part in module.named_modules() if hasattr(part, "running_var")}
    return Subject(spec, module, forms, reference, weights, epsilons, Sessions())


NAMES = ("ccnet-digits", "cosnet-digits", CLASSIFIER.name)
