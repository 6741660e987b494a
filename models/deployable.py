"""Preprocessing and postprocessing as part of the exported graph.

The graph then takes RGB images as cameras and decoders give them, uint8 (batch, height, width, 3), and gives labels or
probabilities at the size of the image. Both are torch modules around the network, so that every later stage sees one
module; the network keeps its module paths below `network`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn

from edgeattn.blocks import Fp32Step
from edgeattn.foundation import UserError
from edgeattn.models.spec import ModelSpec, OutputSpec, Preprocessing

LABELS, PROBABILITIES = "labels", "probabilities"
POSTPROCESSES = (LABELS, PROBABILITIES)
"""What a graph may give in place of the network's outputs, and the name and meaning of that output."""

_CHOSEN = ("logits", "scores")
"""Meanings of an output that a class is chosen from; a network has one such main output."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What surrounds a network in its exported graph.

    Attributes:
        preprocess: the graph takes RGB uint8 (batch, height, width, 3) and normalises in FP32.
        postprocess: "labels", int32 as `ModelSpec.labels` gives them; "probabilities" (batch, classes, height, width)
            at the input's size, or (batch, classes); None for the network's own outputs.

    Raises:
        UserError: there is no such postprocessing.
    """

    preprocess: bool = False
    postprocess: str | None = None

    def __post_init__(self) -> None:
        if self.postprocess not in (None, *POSTPROCESSES):
            raise UserError(
                f"there is no postprocessing {self.postprocess!r}. Choose {' or '.join(POSTPROCESSES)}, or none."
            )

    @property
    def described(self) -> str:
        """What the graph takes and gives, in words."""
        taken = "RGB uint8 images" if self.preprocess else "preprocessed images"
        return f"{taken} in, {self.postprocess or 'the outputs of the network'} out"

    @classmethod
    def of_graph(cls, model: onnx.ModelProto) -> Deployment:
        """Return what surrounds the network in a graph that was exported so, told from its inputs and outputs."""
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in constants]
        raw = any(value.type.tensor_type.elem_type == TensorProto.UINT8 for value in inputs)
        outputs = [value.name for value in model.graph.output]
        return cls(raw, outputs[0] if len(outputs) == 1 and outputs[0] in POSTPROCESSES else None)

    def spec(self, base: ModelSpec) -> ModelSpec:
        """Return the declaration of the network with its surroundings.

        Raises:
            UserError: the network's outputs have no such postprocessing.
        """
        if not self.preprocess and self.postprocess is None:
            return base
        changed: dict[str, Any] = {"network": lambda **arguments: self.network(base, base.network(**arguments))}
        if self.preprocess:
            changed["preprocessing"] = dataclasses.replace(base.preprocessing, in_graph=True)
        if self.postprocess is not None:
            _require_rule(base)
            inner = [dataclasses.replace(output, auxiliary=True) for output in base.outputs]
            binary = self.postprocess == PROBABILITIES and _meaning(base) == "probability"
            meaning = "probability" if binary else self.postprocess
            changed["outputs"] = (OutputSpec(self.postprocess, meaning), *inner)
            changed["labels"] = _RULES[meaning]
        return dataclasses.replace(base, **changed)

    def network(self, base: ModelSpec, network: nn.Module) -> nn.Module:
        """Return a network with its surroundings, for export; the given one where there are none."""
        if not self.preprocess and self.postprocess is None:
            return network
        before = _Normalise(base.preprocessing) if self.preprocess else None
        after = _POSTPROCESSORS[self.postprocess](base) if self.postprocess is not None else None
        main = [index for index, output in enumerate(base.outputs) if not output.auxiliary]
        return _Deployed(network, before, after, main).eval()

    def original(self, base: ModelSpec, original: nn.Module) -> nn.Module:
        """Return a PyTorch original with the same surroundings, from the declarations that images are judged by."""
        if not self.preprocess and self.postprocess is None:
            return original
        return _Original(base, original, self).eval()


PLAIN = Deployment()
"""A network by itself."""


def _require_rule(base: ModelSpec) -> None:
    """Refuse outputs that no postprocessing is declared for."""
    main = [output for output in base.outputs if not output.auxiliary]
    meanings = {output.meaning for output in main}
    if meanings == {"probability"} or (len(main) == 1 and main[0].meaning in _CHOSEN):
        return
    raise UserError(
        f"the outputs of {base.name} ({', '.join(output.name for output in main)}) have no declared postprocessing. "
        "Export without --with-postprocess."
    )


def _affine(image: Tensor, scale: Tensor, shift: Tensor, order: Tensor) -> Tensor:
    """Normalise uint8 (batch, height, width, 3) to float32 (batch, 3, height, width)."""
    return image.float().permute(0, 3, 1, 2).index_select(1, order) * scale + shift


class _Normalise(nn.Module):
    """`(pixel * scale - mean) / std` in the colour order, as one multiplication and addition in FP32."""

    def __init__(self, rule: Preprocessing) -> None:
        super().__init__()
        std = np.asarray(rule.std, np.float64)
        self.step = Fp32Step(_affine)
        self.register_buffer("scale", _channels(rule.scale / std))
        self.register_buffer("shift", _channels(-np.asarray(rule.mean, np.float64) / std))
        self.register_buffer("order", torch.tensor([0, 1, 2] if rule.colour_order == "RGB" else [2, 1, 0]))

    def forward(self, image: Tensor) -> Tensor:
        """Return the network's input."""
        normal: Tensor = self.step(image, self.scale, self.shift, self.order)
        return normal


def _channels(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32).reshape(3, 1, 1))


class _Labels(nn.Module):
    """Labels (batch, K, height, width), int32: TensorRT makes no smaller integer from an ArgMax."""

    def __init__(self, base: ModelSpec) -> None:
        super().__init__()
        self.meaning, self.align_corners = _meaning(base), base.align_corners

    def forward(self, outputs: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the labels that the network's main outputs mean."""
        if self.meaning == "probability":
            return (torch.cat(outputs, dim=1) > 0.5).to(torch.int32)
        if self.meaning == "scores":
            return outputs[0].argmax(dim=1, keepdim=True)[..., None, None].to(torch.int32)
        logits = F.interpolate(outputs[0], size=size, mode="bilinear", align_corners=self.align_corners)
        return logits.argmax(dim=1, keepdim=True).to(torch.int32)


class _Probabilities(nn.Module):
    """Probabilities of the classes, at the size of the image where there is one for each pixel."""

    def __init__(self, base: ModelSpec) -> None:
        super().__init__()
        self.meaning, self.align_corners = _meaning(base), base.align_corners

    def forward(self, outputs: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the probabilities that the network's main outputs mean."""
        if self.meaning == "probability":
            return torch.cat(outputs, dim=1)
        if self.meaning == "scores":
            return outputs[0].softmax(dim=1)
        logits = F.interpolate(outputs[0], size=size, mode="bilinear", align_corners=self.align_corners)
        return logits.softmax(dim=1)


_POSTPROCESSORS: Mapping[str, type[_Labels] | type[_Probabilities]] = {LABELS: _Labels, PROBABILITIES: _Probabilities}


class _Deployed(nn.Module):
    """A network with its surroundings.

    Args:
        network: the network.
        before: the preprocessing, if any.
        after: the postprocessing, if any.
        main: which of the network's outputs it takes.
    """

    def __init__(self, network: nn.Module, before: nn.Module | None, after: nn.Module | None, main: list[int]) -> None:
        super().__init__()
        self.network, self.before, self.after, self.main = network, before, after, main

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Return the network's outputs for images, behind the postprocessing's result where there is one."""
        inputs = images if self.before is None else tuple(self.before(image) for image in images)
        outputs = _as_tuple(self.network(*inputs))
        if self.after is None:
            return outputs
        height, width = inputs[0].shape[2:]
        return self.after([outputs[index] for index in self.main], (height, width)), *outputs


class _Original(nn.Module):
    """A PyTorch original behind `Preprocessing` and in front of `ModelSpec.labels`, image by image."""

    def __init__(self, base: ModelSpec, original: nn.Module, deployment: Deployment) -> None:
        super().__init__()
        self.base, self.original, self.deployment = base, original, deployment

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Return what `_Deployed` returns."""
        if self.deployment.preprocess:
            images = tuple(self._preprocessed(batch) for batch in images)
        outputs = _as_tuple(self.original(*images))
        if self.deployment.postprocess is None:
            return outputs
        named = {entry.name: tensor for entry, tensor in zip(self.base.outputs, outputs, strict=True)}
        main = {name: named[name] for name in self.base.main_outputs}
        height, width = images[0].shape[2:]
        if self.deployment.postprocess == LABELS:
            return self.base.labels(main, (height, width)).to(torch.int32), *outputs
        return _class_probabilities(self.base, main, (height, width)), *outputs

    def _preprocessed(self, batch: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([self.base.preprocessing(image) for image in batch.numpy()]))


def _class_probabilities(base: ModelSpec, main: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return the probabilities of the classes by their definition, in FP64."""
    values = [tensor.double() for tensor in main.values()]
    if _meaning(base) == "probability":
        return torch.cat(values, dim=1).float()
    exponents = _resized_logits(base, values[0], size)
    weights = torch.exp(exponents - exponents.amax(dim=1, keepdim=True))
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def _resized_logits(base: ModelSpec, logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return logits at the input's size; scores of whole images as they are."""
    if logits.ndim == 2:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=base.align_corners)


def label_margins(spec: ModelSpec, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor | None:
    """Return how far each label is from another, where the graph gives labels and nothing else to judge by.

    Args:
        spec: the declaration, see `Deployment.spec`.
        outputs: all outputs of the original by name.
        size: (height, width) of the input.

    Returns:
        The difference of the two best scores over the root mean square of all, in the labels' shape; None where the
        main outputs are not labels.
    """
    if [output.meaning for output in spec.outputs if not output.auxiliary] != [LABELS]:
        return None
    inner = [output for output in spec.outputs if output.meaning in ("logits", "scores", "probability")]
    first = inner[0]
    if first.meaning == "probability":
        shape = outputs[LABELS].shape
        scores = torch.cat([outputs[output.name] for output in inner], dim=1)[:, : shape[1]]
        return (2 * scores - 1).abs() / scores.square().mean().sqrt()
    scores = _resized_logits(spec, outputs[first.name], size)
    best = scores.topk(2, dim=1).values
    margins = (best[:, :1] - best[:, 1:]) / scores.square().mean().sqrt()
    return margins.reshape(outputs[LABELS].shape)


def _given_labels(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return the labels that a graph gives."""
    del size  # the graph resized
    return outputs[LABELS].long()


def _likeliest(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return the likeliest classes (batch, 1, height, width)."""
    del size
    labels = outputs[PROBABILITIES].argmax(dim=1, keepdim=True)
    return labels if labels.ndim == 4 else labels[..., None, None]


def _likely(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return 1 where the object is likelier than not."""
    del size
    return (outputs[PROBABILITIES] > 0.5).long()


_RULES = {LABELS: _given_labels, PROBABILITIES: _likeliest, "probability": _likely}


def _meaning(base: ModelSpec) -> str:
    """Return what the network's main outputs mean."""
    return next(output.meaning for output in base.outputs if not output.auxiliary)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
