"""What every declared network must do: published names, equality with its original, ONNX at any allowed size."""

from __future__ import annotations

import importlib

import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models import MODELS, ModelSpec
from edgeattn.models.checkpoint import COUNTER, load_checkpoint
from edgeattn.validation.randomise import raise_gains, randomise

FP32_RELATIVE_L2 = 1e-5
SPREAD = 5e-4
"""How much of an output must depend on the image, at least, for equality to mean something."""

LISTED = [(spec.name, layout.name) for spec in MODELS for layout in spec.layouts if layout.listing]
# Networks that differ only in sizes share one small form, which is checked once.
DISTINCT = list({(spec.original, str(sorted(spec.small.items()))): spec.name for spec in MODELS}.values())


def original_of(spec: ModelSpec) -> nn.Module:
    module, attribute = spec.original.split(":")
    network: nn.Module = getattr(importlib.import_module(module), attribute)(**spec.small)
    return network.eval()


def images(spec: ModelSpec, batch: int, size: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(i)) for i in range(len(spec.inputs))]


def lively(network: nn.Module) -> nn.Module:
    """Randomise a network; with gains of batch normalisation below 1 a deep one would forget the image."""
    return raise_gains(randomise(network, seed=5), by=0.6)


def as_tuple(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) <= FP32_RELATIVE_L2


@pytest.mark.parametrize(("name", "layout"), LISTED, ids=lambda value: value)
def test_published_state_loads_strictly(name: str, layout: str) -> None:
    spec = MODELS.get(name)
    form = next(form for form in spec.layouts if form.name == layout)
    shapes = form.published_shapes()
    assert shapes
    with torch.device("meta"):
        network = spec.build()
        published = {
            key: torch.empty(shape, dtype=torch.int64 if key.endswith(COUNTER) else torch.float32)
            for key, shape in shapes.items()
        }
        report = load_checkpoint(network, published, key_map=form.key_map)
    assert report.fits
    assert not report.missing
    assert not report.unexpected


@pytest.mark.parametrize("name", DISTINCT)
def test_network_equals_original_and_its_graphs(name: str) -> None:
    spec = MODELS.get(name)
    model = lively(spec.network(**spec.small).eval())
    original = original_of(spec)
    original.load_state_dict(model.state_dict(), strict=True)
    expected = {}
    for size in spec.test_sizes:
        batch = images(spec, 2, size)
        with torch.no_grad():
            actual, expected[size] = as_tuple(model(*batch)), as_tuple(original(*batch))
        assert len(actual) == len(expected[size]) == len(spec.outputs)
        for mine, theirs in zip(actual, expected[size], strict=True):
            assert_close(mine, theirs)
            assert float((theirs - theirs.mean(dim=0)).norm() / theirs.norm()) > SPREAD
    main = [index for index, output in enumerate(spec.outputs) if not output.auxiliary]
    axes = {0: "batch"} if spec.fixed_size else {0: "batch", 2: "height", 3: "width"}
    graph = to_onnx(
        model,
        images(spec, 2, spec.test_sizes[0]),
        input_names=spec.inputs,
        output_names=spec.main_outputs,
        outputs=main,
        dynamic_axes=[axes] * len(spec.inputs),
    )
    session = onnxruntime.InferenceSession(
        inline_plugins(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size, outputs in expected.items():
        feed = {key: image.numpy() for key, image in zip(spec.inputs, images(spec, 2, size), strict=True)}
        for found, index in zip(session.run(None, feed), main, strict=True):
            assert_close(torch.from_numpy(found), outputs[index])
