"""The contract that every registered block keeps, whatever it computes. A new block adds nothing here."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from edgeattn.blocks import BLOCKS, BlockSpec, Variant
from edgeattn.blocks.spec import Arguments, Sizes
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import to_int8
from edgeattn.export.int8_layers import plan_layers
from edgeattn.export.support import check_support
from edgeattn.export.surgery import inline_plugins, strip_bodies
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import CheckpointMismatchError, load_checkpoint
from edgeattn.validation.randomise import randomise

LISTINGS = Path(__file__).parents[1] / "data" / "state_dicts"
REFERENCES = LISTINGS.with_name("reference")

# What TensorRT's parser takes (10.3 and later) and the blocks need; anything new deserves a look at its table.
OPERATORS = {
    *("Abs", "Add", "And", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "DepthToSpace"),
    *(
        "Div",
        "Equal",
        "Exp",
        "Erf",
        "Expand",
        "Floor",
        "GRU",
        "ArgMax",
        "LSTM",
        "Sin",
        "Cos",
        "Log",
        "TopK",
        "Gather",
        "GatherElements",
        "Gemm",
        "GlobalAveragePool",
        "Greater",
    ),
    *("GreaterOrEqual", "GridSample", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LeakyRelu"),
    *("Less", "LessOrEqual", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range"),
    *(
        "RNN",
        "Reciprocal",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
    ),
    *("Shape", "Sigmoid", "Sign", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose"),
    *("RNN", "Unsqueeze", "Where"),
}
# The right to look at shapes belongs to graphs with dynamic axes.
STATIC_OPERATORS = OPERATORS - {"Shape", "Range"}

CASES = [(spec, variant) for spec in BLOCKS for variant in spec.variants]


def each(*, having: str = "") -> pytest.MarkDecorator:
    """Run a test for every variant of every block, or for those whose field `having` is not empty."""
    cases = [(spec, variant) for spec, variant in CASES if not having or getattr(variant, having)]
    return pytest.mark.parametrize(("spec", "variant"), cases, ids=[f"{s.name}/{v.name}" for s, v in cases])


def original_of(spec: BlockSpec, arguments: Arguments) -> torch.nn.Module:
    module, name = spec.original.split(":")
    return getattr(importlib.import_module(module), name)(**arguments).eval()


def build_pair(
    spec: BlockSpec, variant: Variant, arguments: Arguments | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a randomised block and its original with the same state."""
    given = variant.arguments if arguments is None else arguments
    block = randomise(spec.build(**given), seed=3)
    original = original_of(spec, given)
    original.load_state_dict(block.state_dict(), strict=True)
    return block, original


def run(variant: Variant, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = getattr(module, variant.method)(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


def as_type(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the inputs with floating-point ones in another type; masks stay masks."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error; infinities and NaN count as infinite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if np.isfinite(error) else float("inf")


@each()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_block_equals_original(spec: BlockSpec, variant: Variant, dtype: torch.dtype, limit: float) -> None:
    block, original = (module.to(dtype) for module in build_pair(spec, variant))
    for seed, sizes in enumerate(spec.sizes_of(variant)):
        inputs = as_type(spec.example_inputs(variant, sizes, seed=seed), dtype)
        for actual, expected in zip(run(variant, block, inputs), run(variant, original, inputs), strict=True):
            assert actual.shape == expected.shape
            assert expected.isfinite().all()
            assert relative_l2(actual, expected) <= limit, sizes


@each()
def test_sizes_prove_something(spec: BlockSpec, variant: Variant) -> None:
    sizes = spec.sizes_of(variant)
    symbols = set().union(*(axes.values() for axes in spec.dynamic_axes(variant)))
    if {"height", "width"} <= symbols:
        assert len({(size["height"], size["width"]) for size in sizes if size["height"] != size["width"]}) >= 3
        assert any(size["height"] % 2 for size in sizes)
    if "batch" in symbols:
        assert {1, 3} <= {size["batch"] for size in sizes}


@each()
def test_prepared_block_computes_the_same_and_leaves_the_trained_one_alone(spec: BlockSpec, variant: Variant) -> None:
    block, _ = build_pair(spec, variant)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0])
    prepared = prepare_for_export(block)
    for actual, expected in zip(run(variant, prepared, inputs), run(variant, block, inputs), strict=True):
        assert relative_l2(actual, expected) <= 2e-6
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


@each(having="published")
def test_published_configuration_builds(spec: BlockSpec, variant: Variant) -> None:
    assert variant.published is not None
    with torch.device("meta"):
        spec.build(**variant.published.arguments)


def listed_state(name: str) -> dict[str, torch.Tensor]:
    """Return zeros for a published listing; zeros with stride 0 cost no memory."""
    keys = json.loads((LISTINGS / f"{name}.json").read_text())["keys"]
    integer = "num_batches_tracked"
    return {
        key: torch.zeros((), dtype=torch.int64 if key.endswith(integer) else torch.float32).expand(shape)
        for key, shape in keys.items()
    }


@each(having="listings")
def test_published_state_loads_strictly(spec: BlockSpec, variant: Variant) -> None:
    for name, arguments in variant.listings.items():
        state = listed_state(name)
        report = load_checkpoint(spec.build(**arguments), state, key_map=variant.key_map)
        assert not report.missing
        assert not report.unexpected


@each(having="listings")
def test_wrong_state_is_reported_key_by_key(spec: BlockSpec, variant: Variant) -> None:
    name, arguments = next(iter(variant.listings.items()))
    state = listed_state(name)
    lost = next(key for key in reversed(state) if not key.endswith("num_batches_tracked"))
    del state[lost]
    state["surplus.weight"] = torch.zeros(1)
    block = spec.build(**arguments)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint(block, state, key_map=variant.key_map)
    assert len(caught.value.report.missing) == 1
    assert set(caught.value.report.unexpected) == {"surplus.weight"}
    assert next(iter(caught.value.report.missing)) in str(caught.value)


def rule(key: str, shape: list[int]) -> torch.Tensor:
    """Return the value of a published parameter in the recorded references, see `data/reference/provenance.json`."""
    draw = np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)  # a frozen stream
    if key.endswith(("running_var", "gamma")):
        return torch.from_numpy(np.asarray((0.5 + draw).astype(np.float32)))
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 3
    return torch.from_numpy(np.asarray(((2 * draw - 1) * np.sqrt(3 / fan_in)).astype(np.float32)))


@each(having="references")
def test_public_implementation_computes_the_same(spec: BlockSpec, variant: Variant) -> None:
    provenance = json.loads((REFERENCES / "provenance.json").read_text())["files"]
    for name, arguments in variant.references.items():
        keys = provenance[f"{name}.npz"]["keys"]
        state = {key: rule(key, shape) for key, shape in keys.items() if not key.endswith("num_batches_tracked")}
        with np.load(REFERENCES / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file}
        assert arrays
        for module in (spec.build(**arguments), original_of(spec, arguments)):
            load_checkpoint(module, state, key_map=variant.key_map)
            module.eval().double()
            for case in sorted({key.partition(".")[0] for key in arrays}):
                inputs = tuple(arrays[f"{case}.{entry.name}"] for entry in spec.inputs_of(variant))
                inputs = as_type(inputs, torch.float64)
                for index, actual in enumerate(run(variant, module, inputs)):
                    expected = arrays[f"{case}.output_{index}"]
                    assert actual.shape == expected.shape
                    assert relative_l2(actual, expected) <= 1e-10, f"{type(module)}, {case}, output {index}"


@functools.lru_cache(maxsize=4)  # tests of one variant follow each other
def exported(name: str, variant_name: str, *, dynamic: bool) -> tuple[torch.nn.Module, torch.nn.Module, bytes]:
    """Return a block, its original and its plugin form."""
    spec = BLOCKS.get(name)
    variant = spec.variant(variant_name)
    block, original = build_pair(spec, variant)
    inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0])
    outputs = run(variant, block, inputs)
    model = to_onnx(
        block,
        inputs,
        input_names=[entry.name for entry in spec.inputs_of(variant)],
        output_names=[f"output_{index}" for index in range(len(outputs))],
        dynamic_axes=spec.dynamic_axes(variant) if dynamic else None,
        method=variant.method,
    )
    return block, original, model.SerializeToString()


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_onnx(
    spec: BlockSpec, variant: Variant, session: onnxruntime.InferenceSession, inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    names = [entry.name for entry in spec.inputs_of(variant)]
    read = {entry.name for entry in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True) if name in read}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


@each()
def test_dynamic_export_runs_at_other_sizes(spec: BlockSpec, variant: Variant) -> None:
    block, _, content = exported(spec.name, variant.name, dynamic=True)
    model = onnx.load_from_string(content)
    plain = inline_plugins(model)
    found = {node.op_type for node in plain.graph.node}
    assert found <= OPERATORS, found - OPERATORS
    for form in (model, plain) if model.functions else (model,):
        session = session_of(form)
        for seed, sizes in enumerate(spec.sizes_of(variant)):
            inputs = spec.example_inputs(variant, sizes, seed=seed)
            for actual, expected in zip(
                run_onnx(spec, variant, session, inputs), run(variant, block, inputs), strict=True
            ):
                assert actual.shape == expected.shape
                assert relative_l2(actual, expected) <= 1e-5, sizes


@each()
def test_tensorrt_takes_every_form(spec: BlockSpec, variant: Variant) -> None:
    """JetPack 6.2 has TensorRT 10.3, the oldest that the project serves; 11.4 is the newest that is known."""
    plugin = onnx.load_from_string(exported(spec.name, variant.name, dynamic=True)[2])
    plain = static_plain(spec, variant)
    forms = {"dynamic": inline_plugins(plugin), "static": plain, "fp16": to_fp16(plain).model}
    if plugin.functions:
        forms["plugin"] = plugin
    for version, (form, model) in itertools.product([(10, 3), (11, 4)], forms.items()):
        wanted = strip_bodies(model) if form == "plugin" and version < (10, 7) else model
        report = check_support(wanted, version)
        assert report.passes(strict=True), f"{form} for {version}: {report.problems}"


@each(having="fixed")
def test_fixed_axes_say_why_they_cannot_vary(spec: BlockSpec, variant: Variant) -> None:
    block, _ = build_pair(spec, variant)
    inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0])
    for axis in variant.fixed:
        others = {symbol: reason for symbol, reason in variant.fixed.items() if symbol != axis}
        axes = tuple(entry.dynamic_axes(variant.arguments, others) for entry in spec.inputs_of(variant))
        outputs = len(run(variant, block, inputs))
        with pytest.raises(UserError, match=re.escape(axis)):
            to_onnx(
                block,
                inputs,
                input_names=[entry.name for entry in spec.inputs_of(variant)],
                output_names=[f"output_{index}" for index in range(outputs)],
                dynamic_axes=axes,
                method=variant.method,
            )


@functools.lru_cache(maxsize=2)
def inlined(name: str, variant_name: str) -> onnx.ModelProto:
    return inline_plugins(onnx.load_from_string(exported(name, variant_name, dynamic=False)[2]))


def static_plain(spec: BlockSpec, variant: Variant) -> onnx.ModelProto:
    """Return the static form in standard operators; nobody may change it."""
    return inlined(spec.name, variant.name)


@functools.lru_cache(maxsize=2)
def emulated_fp16(name: str, variant_name: str) -> onnx.ModelProto:
    return emulate_fp16(to_fp16(inlined(name, variant_name)).model)


@each()
def test_static_export_is_lean(spec: BlockSpec, variant: Variant) -> None:
    block, _, content = exported(spec.name, variant.name, dynamic=False)
    model = onnx.load_from_string(content)
    cores = {node.op_type for node in model.graph.node if node.domain == "edgeattn"}
    assert cores <= set(spec.plugins(variant))
    assert bool(cores) == bool(spec.plugins(variant))
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        assert scopes, f"{node.name} has lost its module path"
        assert "_Selected" not in scopes
        assert "model." not in scopes
    plain = inline_plugins(model)
    found = {node.op_type for node in plain.graph.node}
    assert found <= STATIC_OPERATORS, found - STATIC_OPERATORS
    for initializer in plain.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        assert values.dtype.kind != "f" or np.isfinite(values).all(), f"{initializer.name} holds infinities"
    inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0], seed=1)
    for actual, expected in zip(
        run_onnx(spec, variant, session_of(plain), inputs), run(variant, block, inputs), strict=True
    ):
        assert relative_l2(actual, expected) <= 1e-5


@each()
def test_no_tensor_is_larger_than_stated(spec: BlockSpec, variant: Variant) -> None:
    plain = static_plain(spec, variant)
    shaped = onnx.shape_inference.infer_shapes(plain, strict_mode=True, data_prop=True)

    def elements(value: onnx.ValueInfoProto) -> int:
        return int(np.prod([dim.dim_value for dim in value.type.tensor_type.shape.dim]))

    weights = {tensor.name for tensor in plain.graph.initializer}
    inner = [value for value in shaped.graph.value_info if value.name not in weights]
    floats = [value for value in inner if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    assert len(inner) >= len(plain.graph.node) - len(plain.graph.output), "not every tensor has a shape"
    outside = max(elements(value) for value in (*plain.graph.input, *plain.graph.output))
    limit = max(outside, spec.largest(variant.arguments, spec.sizes_of(variant)[0]))
    too_large = {value.name: elements(value) for value in floats if elements(value) > limit}
    assert not too_large, f"limit {limit}"


def realistic_inputs(
    spec: BlockSpec, variant: Variant, sizes: Sizes, scale: float, arguments: Arguments | None = None
) -> tuple[torch.Tensor, ...]:
    """Return FP16 numbers of a standard deviation, with three outliers at 100 in each input."""
    inputs = spec.example_inputs(variant, sizes, arguments=arguments, seed=5, scale=scale)
    for entry, tensor in zip(spec.inputs_of(variant), inputs, strict=True):
        if entry.values != "normal":
            continue
        positions = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(6))[:3]
        tensor.view(-1)[positions] = torch.tensor([100.0, -100.0, 100.0])[: len(positions)]
    return as_type(as_type(inputs, torch.float16), torch.float32)


@each()
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_fp16_form_is_close_to_fp64(spec: BlockSpec, variant: Variant, scale: float) -> None:
    _, original, _ = exported(spec.name, variant.name, dynamic=False)
    emulated = emulated_fp16(spec.name, variant.name)
    inputs = realistic_inputs(spec, variant, spec.sizes_of(variant)[0], scale)
    expected = run(variant, original.double(), as_type(inputs, torch.float64))
    original.float()
    for actual, wanted in zip(run_onnx(spec, variant, session_of(emulated), inputs), expected, strict=True):
        assert relative_l2(actual, wanted) <= 1e-2


@each(having="overflow")
def test_fp16_policy_saves_what_the_naive_form_loses(spec: BlockSpec, variant: Variant) -> None:
    overflow = variant.overflow
    assert overflow is not None
    arguments = variant.arguments | overflow.arguments
    block, _ = build_pair(spec, variant, arguments)
    with torch.no_grad():
        for name, value in block.named_parameters():
            for pattern, factor in overflow.state.items():
                if re.search(pattern, name):
                    value.mul_(factor)
    original = original_of(spec, arguments)
    original.load_state_dict(block.state_dict(), strict=True)
    inputs = spec.example_inputs(variant, overflow.sizes, arguments=arguments, seed=5, scale=overflow.scale)
    inputs = as_type(as_type(inputs, torch.float16), torch.float32)
    expected = run(variant, original.double(), as_type(inputs, torch.float64))
    naive = run(variant, original.half(), as_type(inputs, torch.float16))
    assert max(relative_l2(actual, wanted) for actual, wanted in zip(naive, expected, strict=True)) > 1e-2
    model = to_onnx(
        block,
        inputs,
        input_names=[entry.name for entry in spec.inputs_of(variant)],
        output_names=[f"output_{index}" for index in range(len(expected))],
        method=variant.method,
    )
    emulated = emulate_fp16(to_fp16(inline_plugins(model)).model)
    for actual, wanted in zip(run_onnx(spec, variant, session_of(emulated), inputs), expected, strict=True):
        assert relative_l2(actual, wanted) <= 1e-2


@each()
def test_int8_policy(spec: BlockSpec, variant: Variant) -> None:
    plain = static_plain(spec, variant)
    names = [entry.name for entry in plain.graph.input]
    all_names = [entry.name for entry in spec.inputs_of(variant)]

    def samples():
        for seed in range(8):
            tensors = spec.example_inputs(variant, spec.sizes_of(variant)[0], seed=seed)
            yield {name: tensor.numpy() for name, tensor in zip(all_names, tensors, strict=True) if name in names}

    def lies_in(node: onnx.NodeProto, path: str) -> bool:
        scopes = {entry.key: entry.value for entry in node.metadata_props}["pkg.torch.onnx.name_scopes"]
        return f"'{path}'" in scopes or f"'{path}." in scopes

    def inside(node: onnx.NodeProto) -> bool:
        return any(lies_in(node, path) for path in spec.int8_exclude)

    present = [path for path in spec.int8_exclude if any(lies_in(node, path) for node in plain.graph.node)]
    plan = plan_layers(onnx_ir.from_proto(plain).graph, excluded=(), attention=False)
    weighted = {layer.node for layer in plan.layers}
    if not any(node.name in weighted and not inside(node) for node in plain.graph.node):
        with pytest.raises(UserError, match="no convolution"):
            to_int8(plain, list(samples()), exclude=present)
        return
    quantised = to_int8(plain, list(samples()), exclude=present)
    dequantised = {name for node in quantised.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    layers = [node for node in quantised.graph.node if node.name in weighted]
    assert any(node.input[1] in dequantised for node in layers)
    for node in layers:
        assert not (inside(node) and node.input[1] in dequantised), f"{node.name} is quantised against the policy"
    inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0])
    assert all(tensor.isfinite().all() for tensor in run_onnx(spec, variant, session_of(quantised), inputs))


@each()
def test_declaration_is_complete(spec: BlockSpec, variant: Variant) -> None:
    for text in (spec.title, spec.paper, spec.code, spec.precision, spec.int8):
        assert text
    assert 1990 <= spec.year <= 2030
    documentation = (importlib.import_module(spec.build.__module__).__doc__ or "") + (spec.build.__doc__ or "")
    assert "Paper:" in documentation
    assert len({entry.name for entry in spec.variants}) == len(spec.variants)
