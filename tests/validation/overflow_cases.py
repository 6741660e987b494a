"""Graphs and activations on which FP16 everywhere fails: energies beyond 65504, sums over 100,000 positions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.deploy.evidence import load_original
from edgeattn.export.accumulation import ACCUMULATION_BLOCK
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.precision_types import FP16
from edgeattn.export.ranges import measure_ranges
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint
from edgeattn.validation.randomise import randomise
from edgeattn.validation.saturation import condition_of
from edgeattn.validation.tolerance import arithmetic_of, tolerance

Arrays = Mapping[str, np.ndarray]

POSITIONS = {"batch": 1, "height": 320, "width": 320}
"""102,400 positions."""


@dataclass(frozen=True)
class Case:
    """A model on data that leaves FP16's range.

    Attributes:
        model: FP32 form in standard operators.
        feed: inputs by name, FP16 numbers.
        calibration: other inputs of the same kind.
        expected: outputs of the original in float64.
        peak: largest magnitude inside.
        tensor: the tensor that has it.
        accumulation: the machine rounds running totals to FP16 after so many terms; None for one that sums in FP32.
    """

    model: onnx.ModelProto
    feed: Arrays
    calibration: Arrays
    expected: tuple[np.ndarray, ...]
    peak: float
    tensor: str
    accumulation: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a form of a case.

    Attributes:
        finite: no output holds NaN or infinity.
        error: largest relative L2 of an output; None where it is not finite.
        limit: what the arithmetic of the form allows.
    """

    finite: bool
    error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the form is usable."""
        return self.finite and self.error is not None and self.error <= self.limit


def run(model: onnx.ModelProto, feed: Arrays) -> list[np.ndarray]:
    """Run a model on ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}
    return list(session.run(None, {name: array for name, array in feed.items() if name in taken}))


def judge(case: Case, form: onnx.ModelProto) -> Outcome:
    """Run the emulation of a form and hold it against the original."""
    outputs = run(emulate_fp16(form, accumulation=case.accumulation), case.feed)
    arithmetic = arithmetic_of(form, accumulation=case.accumulation)
    limit = tolerance("fp16", arithmetic, peak=0.0, rms=0.0)
    worst, allowed = 0.0, limit.relative_l2 or 0.0
    squashed = {entry.output: entry for entry in arithmetic.squashed}
    for info, actual, wanted in zip(form.graph.output, outputs, case.expected, strict=True):
        if not np.isfinite(actual).all():
            return Outcome(False, None, allowed)
        norm = float(np.linalg.norm(wanted))
        error = float(np.linalg.norm(actual - wanted)) / norm
        own = allowed
        if info.name in squashed:
            own = (limit.allowed_error(info.name, condition_of(squashed[info.name], wanted)) or 0.0) / norm
        if error / own > worst / allowed:
            worst, allowed = error, own
    return Outcome(True, worst, allowed)


def default_form(case: Case, *, measured: bool) -> onnx.ModelProto:
    """Return what `edgeattn export --fp16` makes, with or without ranges measured on calibration data."""
    return to_fp16(case.model, ranges=measure_ranges(case.model, [case.calibration]) if measured else None).model


def cast_everything(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model all of whose floating-point tensors are FP16, as `module.half()` makes it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    # These inputs stay float by the operator's definition.
    fixed = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:3]}

    def narrow(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in fixed:
            with np.errstate(over="ignore"):
                half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))

    for tensor in graph.initializer:
        narrow(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.type == onnx.AttributeProto.TENSOR and not fixed & set(node.output):
                narrow(attribute.t)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]
    return copy


def packaged_converter(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what ONNX Runtime's own converter makes of a model, with no operator blocked."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, op_block_list=[])
    ordered, known = [], {entry.name for entry in (*converted.graph.input, *converted.graph.initializer)} | {""}
    waiting = list(converted.graph.node)
    while waiting:  # it does not leave the nodes in order
        ready = [node for node in waiting if known.issuperset(node.input)]
        known.update(name for node in ready for name in node.output)
        ordered += ready
        waiting = [node for node in waiting if node not in ready]
    del converted.graph.node[:]
    converted.graph.node.extend(ordered)
    del converted.graph.value_info[:]
    return converted


NAIVE: Mapping[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "everything cast": cast_everything,
    "onnxruntime.transformers.float16": packaged_converter,
}
"""Conversions that know nothing of ranges."""


def _as_half(array: torch.Tensor) -> np.ndarray:
    return array.half().float().numpy()


def _peak(model: onnx.ModelProto, feed: Arrays) -> tuple[float, str]:
    """Return the largest magnitude that a model computes, and where."""
    made = {name for node in model.graph.node for name in node.output}
    taken = {entry.name for entry in model.graph.input}
    ranges = measure_ranges(model, [{name: array for name, array in feed.items() if name in taken}])
    return max((found.peak, name) for name, found in ranges.tensors.items() if name in made)


def block(
    name: str,
    variant_name: str,
    *,
    arguments: Mapping[str, object] | None = None,
    sizes: Mapping[str, int] | None = None,
    scale: float = 1.0,
    published: bool = False,
    rectified: bool = False,
    beyond: float = 1.0,
) -> Case:
    """Return a block with random weights whose activations are scaled until a tensor inside exceeds FP16's range.

    Args:
        name: of the block.
        variant_name: of its variant.
        arguments: constructor arguments; the variant's when None.
        sizes: of the symbolic axes; the first test sizes when None.
        scale: of the activations to begin with.
        published: take the published arguments and sizes.
        rectified: activations are those behind a ReLU, so that sums of products do not cancel.
        beyond: how many times FP16's largest number the tensor exceeds.
    """
    spec = BLOCKS.get(name)
    variant = spec.variant(variant_name)
    if published:
        assert variant.published is not None
        arguments, sizes = variant.published.arguments, variant.published.sizes
    arguments, sizes = arguments or variant.arguments, sizes or spec.sizes_of(variant)[0]
    module = randomise(spec.build(**arguments), seed=3)
    original_module, original_name = spec.original.split(":")
    original = getattr(importlib.import_module(original_module), original_name)(**arguments).eval()
    original.load_state_dict(module.state_dict())
    names = [entry.name for entry in spec.inputs_of(variant)]

    def inputs(scale: float, seed: int) -> tuple[torch.Tensor, ...]:
        tensors = spec.example_inputs(variant, sizes, arguments=arguments, seed=seed, scale=scale)
        tensors = tuple(tensor.half().float() if tensor.is_floating_point() else tensor for tensor in tensors)
        return tuple(map(torch.relu, tensors)) if rectified else tensors

    def outputs(network: nn.Module, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        with torch.no_grad():
            made = getattr(network, variant.method)(*tensors)
        return list(made) if isinstance(made, tuple) else [made]

    count = len(outputs(module, inputs(scale, 5)))
    model = inline_plugins(
        to_onnx(
            module,
            inputs(scale, 5),
            input_names=names,
            output_names=[f"output_{index}" for index in range(count)],
            method=variant.method,
        )
    )
    while True:
        feed = {entry: tensor.numpy() for entry, tensor in zip(names, inputs(scale, 5), strict=True)}
        peak, tensor = _peak(model, feed)
        if peak > beyond * FP16.limit:
            break
        scale *= 1.25
    exact = tuple(array.double() if array.is_floating_point() else array for array in inputs(scale, 5))
    calibration = {entry: tensor.numpy() for entry, tensor in zip(names, inputs(scale, 6), strict=True)}
    expected = tuple(array.numpy() for array in outputs(original.double(), exact))
    return Case(model, feed, calibration, expected, peak, tensor)


def products(heads: int, length: int, width: int, scale: float = 1.0) -> Case:
    """Return softmax(q k) v of queries and keys that are FP16 numbers, scaled until the energies exceed its range."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        attention (float[{heads},{length},{width}] q, float[{heads},{width},{length}] k,
                   float[{heads},{length},{width}] v) => (float[{heads},{length},{width}] y)
        {{ e = MatMul (q, k)  a = Softmax <axis = -1> (e)  y = MatMul (a, v) }}"""
    )
    shapes = {"q": (heads, length, width), "k": (heads, width, length), "v": (heads, length, width)}
    while True:
        feeds = []
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            drawn = {name: rng.standard_normal(shape) * (1 if name == "v" else scale) for name, shape in shapes.items()}
            feeds.append({name: array.astype(np.float16).astype(np.float32) for name, array in drawn.items()})
        peak, tensor = _peak(model, feeds[0])
        if peak > FP16.limit:
            break
        scale *= 1.25
    q, k, v = (torch.from_numpy(feeds[0][name]).double() for name in "qkv")
    return Case(model, feeds[0], feeds[1], ((torch.softmax(q @ k, -1) @ v).numpy(),), peak, tensor)


def normaliser() -> Case:
    """Return numbers over their sum at 102,400 positions, as linear attention writes its normaliser."""
    count = POSITIONS["height"] * POSITIONS["width"]
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        mean (float[1,4,{count}] x) => (float[1,4,{count}] y) <int64[1] axis = {{2}}> {{
            r = Relu (x)  s = ReduceSum <keepdims = 1> (r, axis)  y = Div (r, s) }}"""
    )
    feeds = [
        {"x": np.random.default_rng(seed).uniform(0.5, 2, (1, 4, count)).astype(np.float16).astype(np.float32)}
        for seed in (0, 1)
    ]
    exact = feeds[0]["x"].astype(np.float64)
    return Case(model, feeds[0], feeds[1], (exact / exact.sum(2, keepdims=True),), *_peak(model, feeds[0]))


def accumulated_mean() -> Case:
    """Return squeeze-and-excitation over 102,400 positions on a machine that adds them up in FP16."""
    spec = BLOCKS.get("squeeze-excitation")
    case = block(spec.name, spec.variants[0].name, sizes=POSITIONS, scale=4.0, rectified=True, beyond=0.0)
    total = float(case.feed["x"].astype(np.float64).sum((2, 3)).max())
    return replace(case, peak=total, tensor="the sum of a mean", accumulation=ACCUMULATION_BLOCK)


def convolutions() -> Case:
    """Return two convolutions with activations beyond FP16's range in between, which no declared policy foresees."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        stack (float[1,8,24,32] x) => (float[1,8,24,32] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, up)  r = Relu (a)  y = Conv <pads = [1, 1, 1, 1]> (r, down) }"""
    )
    for name, size in (("up", 2000.0), ("down", 1e-4)):
        weight = (size * rng.standard_normal((8, 8, 3, 3))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    feeds = [
        {"x": np.random.default_rng(seed).standard_normal((1, 8, 24, 32)).astype(np.float16).astype(np.float32)}
        for seed in (1, 2)
    ]
    up, down = (torch.from_numpy(numpy_helper.to_array(entry).copy()).double() for entry in model.graph.initializer)
    hidden = torch.relu(nn.functional.conv2d(torch.from_numpy(feeds[0]["x"]).double(), up, padding=1))
    return Case(
        model, feeds[0], feeds[1], (nn.functional.conv2d(hidden, down, padding=1).numpy(),), *_peak(model, feeds[0])
    )


def _shift_ccnet(network: nn.Module) -> None:
    """Add the same number to all energies of the criss-cross attention: a channel of query and key is constant."""
    for name, convolution in network.named_modules():
        if name.endswith(("query_conv", "key_conv")) and isinstance(convolution, nn.Conv2d):
            assert convolution.bias is not None
            convolution.weight[0] = 0
            convolution.bias[0] = 320.0


def _shift_cosnet(network: nn.Module) -> None:
    """Add the same number to all affinities: a channel of the features is constant, and read by the affinity alone."""
    state = dict(network.named_parameters())
    state["encoder.layer5.bn.weight"][0] = 0
    state["encoder.layer5.bn.bias"][0] = 320.0
    state["linear_e.weight"][0] = 0
    state["linear_e.weight"][:, 0] = 0
    state["linear_e.weight"][0, 0] = 1
    channels = len(state["encoder.layer5.bn.weight"])
    for name in ("conv1.weight", "conv2.weight", "gate.weight", "encoder.main_classifier.weight"):
        state[name][:, 0] = 0
        if state[name].shape[1] == 2 * channels:
            state[name][:, channels] = 0


def network(name: str, shift: Callable[[nn.Module], None]) -> Case:
    """Return a bundled trained network with weights that lift its energies beyond FP16's range.

    Softmax does not see what all energies have in common, so the network is as good as before.
    """
    spec = MODELS.get(name)
    assert spec.checkpoint is not None
    assert spec.samples is not None
    assert spec.calibration is not None
    module = spec.build()
    load_checkpoint(module, read_checkpoint(spec.checkpoint))
    original = load_original(spec, spec.checkpoint)
    with torch.no_grad():
        shift(module)
        shift(original)
    kept = [index for index, output in enumerate(spec.outputs) if not output.auxiliary]
    feed, calibration = (
        {key: _as_half(torch.from_numpy(array)) for key, array in spec.network_inputs(next(iter(source(1)))).items()}
        for source in (spec.samples, spec.calibration)
    )
    example = [torch.randn(1, 3, *spec.size)] * len(spec.inputs)
    model = inline_plugins(
        to_onnx(module, example, input_names=spec.inputs, output_names=spec.main_outputs, outputs=kept)
    )
    with torch.no_grad():
        made = original.double()(*(torch.from_numpy(feed[key]).double() for key in spec.inputs))
    return Case(model, feed, calibration, tuple(made[index].numpy() for index in kept), *_peak(model, feed))


CASES: Mapping[str, Callable[[], Case]] = {
    "energies of 4 heads, 64 positions": partial(products, 4, 64, 32),
    "energies of 1 head, 9409 positions": partial(products, 1, 97 * 97, 64, 40.0),
    "normaliser, 102,400 positions": normaliser,
    "convolutions, activations": convolutions,
    "squeeze-excitation, 102,400 positions, FP16 sums": accumulated_mean,
    "pam, energies": partial(block, "danet-pam", "official"),
    "criss-cross, energies": partial(block, "criss-cross", "official"),
    "co-attention, affinities": partial(block, "co-attention", "vanilla-gated"),
    "multi-head, energies": partial(block, "multi-head", "official", beyond=4.0),
    "cam, 102,400 positions": partial(
        block, "danet-cam", "official", arguments={"in_dim": 8}, sizes=POSITIONS, rectified=True, beyond=4.0
    ),
    "cgnl, 102,400 positions": partial(block, "cgnl", "dot", sizes=POSITIONS),
    "cam, published size": partial(block, "danet-cam", "official", published=True),
    "cgnl, published size": partial(block, "cgnl", "dot", published=True),
    "cgnl Gaussian, published size": partial(block, "cgnl", "gaussian", published=True),
    "ccnet-digits, energies lifted": partial(network, "ccnet-digits", _shift_ccnet),
    "cosnet-digits, affinities lifted": partial(network, "cosnet-digits", _shift_cosnet),
}
"""Makes each case."""

FAST = (
    "energies of 4 heads, 64 positions",
    "normaliser, 102,400 positions",
    "convolutions, activations",
    "cam, 102,400 positions",
    "ccnet-digits, energies lifted",
)
"""Cases that tests run; the benchmark runs all."""
