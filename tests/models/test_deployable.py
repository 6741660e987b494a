"""Pre- and postprocessing in the graph: as the declarations say, in FP32, at any size the network takes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, shape_inference
from torch import nn

from edgeattn.export.fp16 import to_fp16
from edgeattn.export.support import check_support
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, ModelSpec, OutputSpec, Preprocessing
from edgeattn.models.deployable import LABELS, PROBABILITIES, Deployment, label_margins
from edgeattn.models.zoo.declare import CAFFE_BGR, IMAGENET_RGB, class_labels, object_labels, score_labels
from edgeattn.validation.randomise import randomise

CLASSES = 5
TARGETS = [(10, 3), (11, 1)]


class Tiny(nn.Module):
    """One strided convolution; as a classifier its mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convolution = nn.Conv2d(3, 1 if kind == "probability" else CLASSES, 3, stride=4, padding=1)

    def forward(self, image):
        features = self.convolution(image)
        if self.kind == "scores":
            return features.mean(dim=(2, 3))
        if self.kind == "logits":
            return features, features * 2
        return torch.sigmoid(nn.functional.interpolate(features, size=image.shape[2:]))


RULES = {
    "logits": ((OutputSpec("logits", "logits"), OutputSpec("extra", "logits", auxiliary=True)), class_labels),
    "scores": ((OutputSpec("scores", "scores"),), score_labels),
    "probability": ((OutputSpec("mask_target", "probability"),), object_labels),
}


def tiny(kind: str, rule: Preprocessing = IMAGENET_RGB, **fields) -> ModelSpec:
    outputs, labels = RULES[kind]
    if kind == "probability":
        labels = lambda named, size: (named["mask_target"] > 0.5).long()  # noqa: E731
    names = tuple(map(str, range(2 if kind == "probability" else CLASSES)))
    base = dataclasses.replace(MODELS.get("ccnet-digits"), name="tiny", network=Tiny, arguments={"kind": kind})
    return dataclasses.replace(
        base, outputs=outputs, labels=labels, preprocessing=rule, classes=names, **fields, size=(30, 41)
    )


def build(spec: ModelSpec) -> nn.Module:
    return randomise(spec.build(), seed=3)


def pixels(batch: int, size: tuple[int, int] = (30, 41)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, *size, 3), np.uint8)


CASES = [
    ("scores", None, CAFFE_BGR, True),
    ("scores", LABELS, IMAGENET_RGB, True),
    ("logits", LABELS, CAFFE_BGR, False),
    ("logits", PROBABILITIES, IMAGENET_RGB, True),
    ("probability", LABELS, IMAGENET_RGB, True),
    ("probability", PROBABILITIES, CAFFE_BGR, True),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    """Declaration, surroundings, network and dynamic graph."""
    kind, after, rule, aligned = request.param
    spec, deployment = tiny(kind, rule), Deployment(preprocess=True, postprocess=after)
    if kind == "logits":
        spec = dataclasses.replace(spec, labels=functools.partial(class_labels, align_corners=aligned))
        assert spec.align_corners == aligned
    network, deployed = build(spec), deployment.spec(spec)
    graph = to_onnx(
        deployment.network(spec, network),
        [torch.zeros(deployed.input_shape(2, spec.size), dtype=torch.uint8)],
        input_names=spec.inputs,
        output_names=deployed.main_outputs,
        outputs=[index for index, output in enumerate(deployed.outputs) if not output.auxiliary],
        dynamic_axes=[deployed.image_axes],
    )
    return spec, deployment, network, graph


def run(graph: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


def test_the_graph_does_what_the_declaration_says(case):
    spec, deployment, network, graph = case
    after, deployed = deployment.postprocess, deployment.spec(spec)
    assert Deployment.of_graph(graph) == deployment
    (output,) = graph.graph.output
    assert output.name == (after or spec.main_outputs[0])
    assert output.type.tensor_type.elem_type == (TensorProto.INT32 if after == LABELS else TensorProto.FLOAT)
    for size in ((30, 41), (24, 28)):
        batch = pixels(3, size)
        inputs = torch.from_numpy(np.concatenate([spec.preprocessing(image) for image in batch]))
        found = torch.from_numpy(run(graph, batch))
        with torch.no_grad():
            produced = network(inputs)
            original = deployment.original(spec, network)(torch.from_numpy(batch))
        assert len(original) == len(deployed.outputs)
        first = produced[0] if isinstance(produced, tuple) else produced
        labels = spec.labels({spec.main_outputs[0]: first}, size)
        same = deployed.labels({output.name: found}, size) == labels
        assert same.float().mean() > 0.999
        if after == LABELS:
            assert torch.equal(original[0], labels)
        else:
            assert torch.allclose(original[0], found, rtol=1e-4, atol=1e-4)
        if after == PROBABILITIES and found.shape[1] == CLASSES:
            assert torch.allclose(found.sum(dim=1), torch.ones(()), atol=1e-5)


def test_targets_take_it_and_fp16_keeps_the_normalisation(case):
    graph = case[3]
    half = to_fp16(graph).model
    for model in (graph, half):
        for version in TARGETS:
            assert check_support(model, version, target="any", dla_cores=0).verdict == "accepted"
    inferred = shape_inference.infer_shapes(half).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    nodes = half.graph.node
    first = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    before = [node for node in nodes[:first] if node.op_type in ("Mul", "Add", "Gather", "Transpose")]
    assert {"Mul", "Add"} <= {node.op_type for node in before}
    assert all(types[node.output[0]] in (TensorProto.FLOAT, TensorProto.UINT8) for node in before)
    assert types[nodes[first].output[0]] == TensorProto.FLOAT16


def test_margins_are_those_of_the_two_best_scores():
    spec = Deployment(postprocess=LABELS).spec(tiny("scores"))
    scores = torch.tensor([[1.0, 4.0, 3.0, 0.0, 0.0]])
    outputs = {LABELS: torch.tensor([[[[1]]]]), "scores": scores}
    margins = label_margins(spec, outputs, (30, 41))
    assert margins.shape == (1, 1, 1, 1)
    assert float(margins) == pytest.approx(1 / float(scores.square().mean().sqrt()))
    binary = Deployment(postprocess=LABELS).spec(tiny("probability"))
    outputs = {LABELS: torch.ones(1, 1, 1, 2), "mask_target": torch.tensor([[[[0.5, 0.9]]]])}
    assert label_margins(binary, outputs, (1, 2)).flatten()[0] == 0
    assert label_margins(tiny("scores"), {"scores": scores}, (30, 41)) is None
    resized = Deployment(postprocess=LABELS).spec(tiny("logits"))
    logits = torch.randn(1, CLASSES, 4, 5)
    outputs = {LABELS: torch.zeros(1, 1, 30, 41), "logits": logits, "extra": logits * 2}
    assert label_margins(resized, outputs, (30, 41)).shape == (1, 1, 30, 41)


def test_nothing_around_changes_nothing():
    spec = tiny("scores")
    network = build(spec)
    deployment = Deployment()
    assert deployment.spec(spec) is spec
    assert deployment.network(spec, network) is network
    assert deployment.original(spec, network) is network


def test_what_has_no_rule_is_refused():
    with pytest.raises(UserError, match=r"no postprocessing 'argmax'. Choose labels or probabilities"):
        Deployment(postprocess="argmax")
    two = tiny("logits")
    two = dataclasses.replace(two, outputs=(OutputSpec("a", "logits"), OutputSpec("b", "logits")))
    with pytest.raises(UserError, match=r"tiny \(a, b\) have no declared postprocessing"):
        Deployment(postprocess=LABELS).spec(two)


def test_every_label_rule_says_how_it_resizes():
    """`align_corners` is read off the rule, so the rule has to resize as it says."""
    for spec in MODELS:
        main = [output for output in spec.outputs if not output.auxiliary]
        if main[0].meaning != "logits":
            continue
        logits = torch.randn(1, len(spec.classes), 5, 6, generator=torch.Generator().manual_seed(0))
        resized = nn.functional.interpolate(logits, (33, 47), mode="bilinear", align_corners=spec.align_corners)
        found = spec.labels({main[0].name: logits}, (33, 47))
        assert torch.equal(found, resized.argmax(dim=1, keepdim=True)), spec.name
