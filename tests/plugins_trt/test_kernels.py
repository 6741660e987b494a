"""The Triton kernels, in Triton's interpreter, compute what the torch cores and the standard-op bodies compute."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from triton.runtime import interpreter

from edgeattn.blocks import AttentionCore
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PLUGINS, PluginSpec
from edgeattn.plugins_trt.expressions import names_in
from edgeattn.plugins_trt.selection import Operation, variants
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS
from edgeattn.plugins_trt.torch_host import kernel_function, run
from edgeattn.plugins_trt.variants import cost_of, variants_of, workspace_shapes

SPECS = [spec for spec in PLUGINS if spec.launches]
BARS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
SM = 80
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
elements = pytest.mark.parametrize("element", BARS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bit patterns of BF16 tiles; give it their values instead."""
    inner = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        def values(tile):  # type: ignore[no-untyped-def]
            if tile.dtype.scalar != triton.language.bfloat16:
                return tile
            wide = (tile.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(wide, triton.language.float32)

        return inner(self, values(a), values(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def inputs_of(spec: PluginSpec, sizes: dict[str, int], element: str, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        tensor.name: (torch.randn(spec.shape_of(tensor, sizes), generator=generator) * scale).to(
            getattr(torch, element)
        )
        for tensor in spec.inputs
    }


def definition(spec: PluginSpec, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return what the torch core computes in FP64 from the very same inputs."""
    (core,) = [core for core in AttentionCore.__subclasses__() if core.op_type == spec.op_type]
    result = core()(*(tensor.double() for tensor in inputs.values()))
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], bar: float) -> None:
    assert len(actual) == len(wanted)
    for given_, right in zip(actual, wanted, strict=True):
        assert given_.shape == right.shape
        assert torch.isfinite(given_).all()
        assert (given_.double() - right).norm() <= bar * right.norm()


def symbols(spec: PluginSpec) -> list[str]:
    return sorted({symbol for tensor in spec.inputs for symbol in tensor.shape} - {"1"})


def ragged(spec: PluginSpec) -> dict[str, int]:
    """Return sizes that no tile divides, all different."""
    fixed = {"batch": 2, "channels": 24, "head_channels": 19, "height": 5, "width": 37, "queries": 37, "keys": 41}
    primes = iter((13, 3, 5, 7))
    return {symbol: fixed.get(symbol) or next(primes) for symbol in symbols(spec)}


def with_tiles(spec: PluginSpec, queries: int, keys: int) -> PluginSpec:
    """Return the operation with other tile sizes."""
    tiles = {"QUERY_BLOCK": queries, "KEY_BLOCK": keys, "MERGE_BLOCK": queries}
    return dataclasses.replace(
        spec,
        tilings=tuple(dataclasses.replace(tiling, constants={**tiling.constants, **tiles}) for tiling in spec.tilings),
    )


@specs
@elements
@layouts
def test_ragged_sizes(spec: PluginSpec, element: str, layout: str) -> None:
    inputs = inputs_of(spec, ragged(spec), element)
    actual = run(spec, inputs, layout=layout, sm=SM, poison=float("nan"))
    assert_close(actual, definition(spec, inputs), BARS[element])
    for tensor in actual:
        wanted = torch.channels_last if layout == "channels-last" and tensor.dim() == 4 else torch.contiguous_format
        assert tensor.is_contiguous(memory_format=wanted)


@specs
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sizes(spec: PluginSpec, data: st.DataObject) -> None:
    limits = {"batch": 2, "channels": 70, "head_channels": 70, "height": 20, "width": 20, "queries": 40, "keys": 40}
    sizes = {symbol: data.draw(st.integers(1, limits.get(symbol, 6)), label=symbol) for symbol in symbols(spec)}
    element = data.draw(st.sampled_from(["float32", "float16"]), label="element")
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    inputs = inputs_of(spec, sizes, element)
    actual = run(with_tiles(spec, 16, 16), inputs, layout=layout, sm=SM, poison=float("nan"))
    assert_close(actual, definition(spec, inputs), BARS[element])


@specs
@pytest.mark.parametrize("thin", [0, 1])
def test_single_rows_and_columns(spec: PluginSpec, thin: int) -> None:
    spatial = [symbol for symbol in symbols(spec) if symbol not in ("batch", "channels", "head_channels")]
    sizes = {**ragged(spec), **dict.fromkeys(spatial[thin::2], 1)}
    inputs = inputs_of(spec, sizes, "float32")
    assert_close(run(spec, inputs, sm=SM, poison=float("nan")), definition(spec, inputs), BARS["float32"])


@specs
def test_one_position(spec: PluginSpec) -> None:
    sizes = {**dict.fromkeys(symbols(spec), 1), "head_channels": 2, "channels": 3}
    inputs = inputs_of(spec, sizes, "float32")
    assert_close(run(spec, inputs, sm=SM, poison=float("nan")), definition(spec, inputs), BARS["float32"])


@specs
@pytest.mark.parametrize("element", ["float32", "float16"])
def test_scores_beyond_the_range_of_fp16(spec: PluginSpec, element: str) -> None:
    inputs = inputs_of(spec, ragged(spec), element, scale=200.0)
    inputs = {name: tensor if "gate" not in name else tensor / 2000 for name, tensor in inputs.items()}
    query, key = itertools.islice(inputs.values(), 2)
    largest = query.double().flatten(2).transpose(1, 2).matmul(key.double().flatten(2)).abs().max().item()
    assert largest > 65504
    # A score that is off by half a unit in the last place of FP32 changes its weight by that much, relatively.
    rounding = largest * 2.0**-24
    assert_close(run(spec, inputs, sm=SM), definition(spec, inputs), BARS[element] + rounding)


@specs
def test_maps_of_more_than_65504_positions(spec: PluginSpec) -> None:
    large = {"height": 257, "width": 257, "height_a": 2, "width_a": 3, "height_b": 257, "width_b": 257, "queries": 5}
    sizes = {symbol: large.get(symbol, {"keys": 66049}.get(symbol, 1)) for symbol in symbols(spec)}
    coarse = with_tiles(spec, 512, 512)
    inputs = inputs_of(spec, sizes, "float32")
    assert_close(run(coarse, inputs, sm=SM, poison=float("nan")), definition(spec, inputs), BARS["float32"])


@specs
@elements
def test_equals_the_body_in_onnx_runtime(one_node_model: Callable, spec: PluginSpec, element: str) -> None:
    if element == "bfloat16":
        pytest.skip("ONNX Runtime's CPU provider has no BF16 MatMul")
    sizes = ragged(spec)
    inputs = inputs_of(spec, sizes, element)
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[element]
    model = one_node_model(spec, kind, 18, sizes, fp32_island=element == "float16")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert_close(run(spec, inputs, sm=SM), tuple(torch.from_numpy(value).double() for value in wanted), BARS[element])


@specs
def test_launches_fit_their_kernels(spec: PluginSpec) -> None:
    known = {*symbols(spec), *spec.static}
    for element, layout in itertools.product(ELEMENT_BYTES, LAYOUTS):
        for variant in variants_of(spec, element, layout, SM, dict.fromkeys(spec.static, 64)):
            launch = variant.launch
            names = kernel_function(launch.kernel).arg_names
            assert [*launch.reads] == names[: len(launch.reads)]
            writes = names[len(launch.reads) + len(launch.scalars) :]
            assert [*launch.writes] == writes[: len(launch.writes)]
            assert set(variant.constants) == set(writes[len(launch.writes) :])
            for text in (*launch.grid, *launch.scalars):
                assert names_in(text) <= known | variant.scope.keys()
            for buffer in spec.workspaces:
                assert all(names_in(extent) <= known | variant.scope.keys() for extent in buffer.shape)


@specs
def test_presets_are_compiled_in_every_layout_their_maps_have(spec: PluginSpec) -> None:
    maps = any(tensor.follows_layout for tensor in spec.inputs)
    operations = [Operation(spec, static) for static in spec.presets]
    compiled = variants(operations, [87], ["float16"])
    assert len(compiled) == len(spec.presets) * len(spec.launches) * (2 if maps else 1)


def test_criss_cross_at_its_published_size() -> None:
    spec = PLUGINS.get("CrissCrossAttention")
    sizes = {"batch": 1, "head_channels": 64, "channels": 512, "height": 97, "width": 97}
    cost = cost_of(spec, "float16", 90, sizes)
    positions = 97 * 97
    assert cost.flops == 2 * positions * (97 + 97) * (64 + 512)
    assert cost.bytes == 2 * positions * (2 * 64 + 3 * 512)
    assert cost.workspace_bytes == positions * (512 * 2 + 4)  # one partial result and its log-sum-exp
    assert cost.roofline_seconds(1e15, 1e12) == cost.bytes / 1e12
    variant = variants_of(spec, "float16", "channels-last", 87, sizes)[0]
    assert variant.grid(sizes) == [4 * 97, 4, 1]
    assert workspace_shapes(spec, variant, sizes)["partial"] == ((1, 97, 97, 512), "float16")


def test_pixel_attention_needs_no_memory_beside_its_tensors() -> None:
    sizes = {"batch": 1, "head_channels": 64, "channels": 512, "queries": 9409, "keys": 9409}
    cost = cost_of(PLUGINS.get("PixelAttention"), "float16", 90, sizes)
    assert cost.workspace_bytes == 0
    assert cost.bytes == 2 * 9409 * (64 + 64 + 512 + 512)


@pytest.mark.parametrize("case", ["rank", "size", "type", "element"])
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    spec = PLUGINS.get("CrissCrossAttention")
    inputs = inputs_of(spec, ragged(spec), "float32")
    wanted = {
        "rank": "residual has shape .* needs 4 axes",
        "size": "channels is 23 in residual",
        "type": "types float16, float32",
        "element": "no kernel for float64",
    }[case]
    if case == "rank":
        inputs["residual"] = inputs["residual"][0]
    if case == "size":
        inputs["residual"] = inputs["residual"][:, 1:]
    if case == "type":
        inputs["residual"] = inputs["residual"].half()
    if case == "element":
        inputs = {name: tensor.double() for name, tensor in inputs.items()}
    with pytest.raises(UserError, match=wanted):
        run(spec, inputs, sm=SM)
