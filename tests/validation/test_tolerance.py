"""Tolerances are derived, and never wider than the project's bars."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeattn.export.accumulation import ACCUMULATION_BLOCK
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_bf16, to_fp16
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import CRISS_CROSS_ATTENTION
from edgeattn.plugins_trt.onnx_form import local_function
from edgeattn.validation.saturation import condition_of
from edgeattn.validation.tolerance import (
    CONFIDENCE,
    Arithmetic,
    OutputLimit,
    UserLimits,
    arithmetic_of,
    as_set_by_user,
    tolerance,
)

ARITHMETIC = st.builds(
    Arithmetic, depth=st.integers(1, 1000), reduction=st.integers(1, 10**5), quantised=st.integers(0, 300)
)


def test_derivations_speak_of_the_models_own_task() -> None:
    arithmetic = Arithmetic(12, 576, 9)
    for precision in ("fp16", "bf16", "int8"):
        words = tolerance(precision, arithmetic, peak=1.0, rms=1.0, metric="top-1").derivation
        assert "mIoU" not in words
        assert "pixel" not in words
        assert ("original's top-1" in words) == (precision == "int8")


@given(ARITHMETIC, st.floats(1e-3, 1e5), st.floats(1e-3, 1e5))
def test_never_wider_than_the_bars(arithmetic, peak, rms):
    assert 0 < tolerance("fp32", arithmetic, peak=peak, rms=rms).relative_l2 <= 1e-5
    assert tolerance("fp16", arithmetic, peak=peak, rms=rms).label_agreement >= 0.995
    assert tolerance("bf16", arithmetic, peak=peak, rms=rms).label_agreement >= 0.96
    assert tolerance("int8", arithmetic, peak=peak, rms=rms).task_drop <= 0.01


def test_short_arithmetic_gets_a_tighter_limit():
    shallow = tolerance("fp32", Arithmetic(1, 27, 0), peak=1.0, rms=1.0)
    deep = tolerance("fp32", Arithmetic(100, 4608, 0), peak=1.0, rms=1.0)
    assert shallow.relative_l2 == pytest.approx(4 * np.sqrt(2 * 27) * 2**-24)
    assert shallow.relative_l2 < deep.relative_l2 == 1e-5
    assert "2^-24" in shallow.derivation


def test_fp32_sums_stay_inside_the_derived_limit():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((400, 512)), rng.standard_normal((512, 30))
    exact = left.astype(np.float32).astype(np.float64) @ right.astype(np.float32).astype(np.float64)
    total = np.zeros(exact.shape, np.float32)
    for column, row in zip(left.astype(np.float32).T, right.astype(np.float32), strict=True):
        total += np.outer(column, row)
    relative = np.linalg.norm(total - exact) / np.linalg.norm(exact)
    limit = tolerance("fp32", Arithmetic(1, 512, 0), peak=1.0, rms=1.0).relative_l2
    assert limit / 100 < relative < limit


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match=r"'int4'.*fp32, fp16, bf16, int8"):
        tolerance("int4", Arithmetic(1, 1, 0), peak=1.0, rms=1.0)


def _model(nodes, initializers, functions=(), channels=4):
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, channels, "h", "w"])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", [image], [output], [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))


def test_arithmetic_reads_depth_reduction_and_quantisations():
    model = _model(
        [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
            helper.make_node("Conv", ["dq", "weight"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Sigmoid", ["b"], ["c"]),
            helper.make_node("Add", ["c", "b"], ["output"]),
        ],
        {
            "weight": np.zeros((8, 4, 3, 3), np.float32),
            "scale": np.float32(0.1).reshape(()),
            "zero": np.int8(0).reshape(()),
        },
    )
    assert arithmetic_of(model) == Arithmetic(depth=3, reduction=36, quantised=1)


def test_arithmetic_looks_into_plugin_functions():
    plugin = helper.make_node("CrissCrossAttention", ["image"] * 4, ["output"], domain="edgeattn")
    model = _model([plugin], {}, [local_function(CRISS_CROSS_ATTENTION, 18)])
    before = model.SerializeToString()
    # Two products in sequence, the softmax between them, and two additions behind.
    assert arithmetic_of(model).depth == 5
    assert model.SerializeToString() == before


# ------------------------------------------------------------------------------------- the rounding model and emulation

RNG = np.random.default_rng(7)


def _weights(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def _parsed(body, **constants):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>\n'
        f"net (float[1,24,9,7] x) => (float[1,24,9,7] y) <int64[3] flat = {{1, 24, 63}}, "
        f"int64[4] map = {{1, 24, 9, 7}}> {{{body}}}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def _convolutions():
    body, source = "", "x"
    for index in range(8):
        body += f"c{index} = Conv <pads = [1, 1, 1, 1]> ({source}, w{index})  r{index} = Relu (c{index})\n"
        source = f"r{index}"
    return _parsed(f"{body} y = Identity ({source})", **{f"w{index}": _weights(24, 24, 3, 3) for index in range(8)})


def _attention():
    return _parsed(
        """q = Conv (x, wq)  k = Conv (x, wk)  v = Conv (x, wv)
        qf = Reshape (q, flat)  kf = Reshape (k, flat)  vf = Reshape (v, flat)
        qt = Transpose <perm = [0, 2, 1]> (qf)  e = MatMul (qt, kf)  a = Softmax <axis = -1> (e)
        at = Transpose <perm = [0, 2, 1]> (a)  o = MatMul (vf, at)  m = Reshape (o, map)  y = Add (m, x)""",
        **{name: _weights(24, 24, 1, 1) for name in ("wq", "wk", "wv")},
    )


def _gated():
    return _parsed(
        """p = GlobalAveragePool (x)  a = Conv (p, w0)  r = Relu (a)  b = Conv (r, w1)  g = Sigmoid (b)
        s = Mul (x, g)  y = Conv (s, w2)""",
        **{f"w{index}": _weights(24, 24, 1, 1) for index in range(3)},
    )


def _normalised():
    return _parsed(
        """f = Reshape (x, flat)  t = Transpose <perm = [0, 2, 1]> (f)
        n = LayerNormalization <axis = -1> (t, scale, bias)  h = MatMul (n, w0)  r = Relu (h)  o = MatMul (r, w1)
        z = Add (o, t)  b = Transpose <perm = [0, 2, 1]> (z)  y = Reshape (b, map)""",
        scale=np.ones(24, np.float32),
        bias=np.zeros(24, np.float32),
        w0=_weights(24, 96),
        w1=_weights(96, 24),
    )


def _run(model, image):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": image}
    )[0]


@pytest.mark.parametrize("make", [_convolutions, _attention, _gated, _normalised])
@pytest.mark.parametrize(
    ("precision", "convert", "accumulation"),
    [("fp16", to_fp16, None), ("fp16", to_fp16, ACCUMULATION_BLOCK), ("bf16", to_bf16, None)],
)
def test_the_rounding_model_bounds_the_emulation(make, precision, convert, accumulation):
    """The bound holds, and is not so loose that a fault of a few per cent would hide below it for FP16."""
    model = make()
    form = convert(model).model
    emulated = emulate_fp16(form, accumulation=accumulation)
    arithmetic = arithmetic_of(form, accumulation=accumulation)
    limit = tolerance(precision, arithmetic, peak=1.0, rms=1.0).relative_l2
    for seed in range(3):
        image = np.random.default_rng(seed).standard_normal((1, 24, 9, 7)).astype(np.float32)
        exact = _run(model, image)
        error = np.linalg.norm(_run(emulated, image) - exact) / np.linalg.norm(exact)
        assert limit / 40 < error < limit


def test_accumulation_counts_as_roundings():
    form = to_fp16(_convolutions()).model
    plain, totals = arithmetic_of(form), arithmetic_of(form, accumulation=ACCUMULATION_BLOCK)
    assert (plain.depth, totals.depth) == (8, 8 * -(-24 * 9 // 16))
    assert "rounded after every 16 terms" in tolerance("fp16", totals, peak=1.0, rms=1.0).derivation
    # What stays in FP32 is summed in FP32.
    assert arithmetic_of(_convolutions(), accumulation=ACCUMULATION_BLOCK).depth == 8


@pytest.mark.parametrize(
    ("node", "terms"),
    [
        ("ReduceSum (x, axes)", 63),
        ("ReduceMean (x, axes)", 63),
        ("ReduceMax (x, axes)", 1),
        ("GlobalAveragePool (x)", 63),
        ("AveragePool <kernel_shape = [3, 2]> (x)", 6),
        ("MaxPool <kernel_shape = [3, 2]> (x)", 1),
        ("Softmax <axis = 1> (x)", 24),
        ("LayerNormalization <axis = 2> (x, s)", 63),
        ("InstanceNormalization (x, t, t)", 63),
        ('Resize <mode = "linear"> (x, , f)', 9),
        ('Resize <mode = "nearest"> (x, , f)', 1),
        ('Einsum <equation = "bchw,bchw->bh"> (x, x)', 24 * 7),
        ("ConvTranspose <group = 2> (x, w)", 12 * 6),
    ],
)
def test_every_sum_is_counted(node, terms):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        net (float[1,24,9,7] x, float[9,7] s, float[24] t, float[24,5,3,2] w) => (int64 y)
        <int64[2] axes = {{2, 3}}, float[4] f = {{1.0, 1.0, 2.0, 2.0}}> {{ r = {node}  y = Size (r) }}"""
    )
    assert arithmetic_of(model).reduction == terms


# ------------------------------------------------------------------------------------------------- outputs of a Sigmoid


def _sigmoid(values):
    return 1 / (1 + np.exp(-values))


def _squashed(function="Sigmoid", layout=""):
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        net (float[2,3,50] x) => (float[2,3,50] y) {{ s = {function} (x)  {layout or "y = Identity (s)"} }}"""
    )


def test_squashed_outputs_are_found():
    found = arithmetic_of(_squashed("Sigmoid")).squashed
    assert [(entry.output, entry.function) for entry in found] == [("y", "Sigmoid")]
    assert arithmetic_of(_squashed("Softmax <axis = 1>")).squashed[0].axis == 1
    assert not arithmetic_of(_squashed("Relu")).squashed
    assert not arithmetic_of(_squashed("Sigmoid", "y = Mul (s, s)")).squashed
    assert len(arithmetic_of(_squashed("Sigmoid", "y = Transpose <perm = [0, 1, 2]> (s)")).squashed) == 1
    assert not arithmetic_of(_squashed("Softmax", "y = Transpose <perm = [0, 1, 2]> (s)")).squashed


@pytest.mark.parametrize("function", ["Sigmoid", "Softmax <axis = 1>"])
@pytest.mark.parametrize("mean", [-14.0, -6.0, 0.0, 6.0])
def test_the_condition_of_a_squashed_output(function, mean):
    """What an error of the logits becomes is predicted from the right output alone, however small that is."""
    squashing = arithmetic_of(_squashed(function)).squashed[0]
    rng = np.random.default_rng(0)
    logits = mean + 4 * rng.standard_normal((2, 3, 50))
    if function != "Sigmoid":
        logits -= logits.mean(1, keepdims=True)

    def squash(values):
        if function == "Sigmoid":
            return _sigmoid(values)
        weights = np.exp(values - values.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    right, size = squash(logits), 1e-6
    condition = condition_of(squashing, right)
    rms = np.sqrt(np.square(logits).mean())
    errors = [
        np.linalg.norm(squash(logits + size * rms * rng.standard_normal(logits.shape)) - right) for _ in range(30)
    ]
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(size * condition.logits, rel=0.15)
    assert condition.reference == pytest.approx(np.linalg.norm(right))


def test_an_almost_empty_mask_is_judged_by_its_logits():
    arithmetic = arithmetic_of(_squashed())
    limits = tolerance("fp32", arithmetic, peak=1.0, rms=1.0)
    assert "limit counts for its logits" in limits.derivation
    empty = _sigmoid(np.full((2, 3, 50), -13.0) + np.random.default_rng(0).standard_normal((2, 3, 50)))
    condition = condition_of(arithmetic.squashed[0], empty)
    allowed = limits.allowed_error("y", condition)
    assert allowed > 20 * limits.relative_l2 * condition.reference
    # A form whose logits are wrong beyond the limit is still caught, where the mask is not below the kernel's accuracy.
    full = _sigmoid(np.random.default_rng(0).standard_normal((2, 3, 50)))
    condition = condition_of(arithmetic.squashed[0], full)
    wrong = _sigmoid(np.log(full / (1 - full)) * (1 + 1e-5)) - full
    assert limits.relative_l2 < 2e-6
    assert np.linalg.norm(wrong) > limits.allowed_error("y", condition)


def test_int8_is_judged_by_its_noise():
    limits = tolerance("int8", Arithmetic(40, 576, 24), peak=12.0, rms=3.0)
    noise = np.sqrt(24) * 4 / (127 * np.sqrt(12))
    assert limits.relative_l2 == pytest.approx(CONFIDENCE * np.hypot(noise, np.sqrt(80) * 2**-11))
    rng = np.random.default_rng(0)
    exact = rng.uniform(-1, 1, 100_000) * np.linspace(0, 1, 100_000) ** 2  # a crest of about four
    step = np.abs(exact).max() / 127
    once = np.linalg.norm(np.rint(exact / step) * step - exact) / np.linalg.norm(exact)
    crest = np.abs(exact).max() / np.sqrt(np.square(exact).mean())
    single = tolerance("int8", Arithmetic(0, 1, 1), peak=crest, rms=1.0)
    assert 0.5 * single.expected_relative_l2 < once < single.expected_relative_l2


# -------------------------------------------------------------------------------------------------- limits of the user


def test_limits_of_the_user():
    limits = UserLimits.parse(["mask:1e-3", "5e-2"], ["mask:1e-4"])
    limits.check(["mask", "other"])
    assert limits.of_output("mask") == OutputLimit("mask", 1e-3, 1e-4)
    assert limits.of_output("other") == OutputLimit("other", 5e-2, None)
    derived = tolerance("fp32", Arithmetic(3, 27, 0), peak=1.0, rms=1.0)
    given = as_set_by_user(derived, UserLimits.parse([], ["mask:1e-4"]), ["mask", "other"])
    assert given.of_output("mask") == OutputLimit("mask", None, 1e-4)
    assert given.of_output("other") == OutputLimit("other", derived.relative_l2, None)
    assert "Set by the user for output mask, in place of the derived limit: absolute" in given.derivation
    assert as_set_by_user(derived, UserLimits.parse(), ["mask"]) == derived
    assert UserLimits.parse(["scope::mask:2"]).relative == {"scope::mask": 2.0}


@pytest.mark.parametrize("text", ["mask", "mask:", "mask:-1", "nan", "mask:inf", ""])
def test_limits_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"--atol .* is no limit"):
        UserLimits.parse([], [text])


def test_limits_of_unknown_outputs_are_refused():
    with pytest.raises(UserError, match=r"--rtol names the output 'masc', but the model has mask, other"):
        UserLimits.parse(["masc:1"]).check(["mask", "other"])
    with pytest.raises(UserError, match="two limits"):
        UserLimits.parse(["a:1", "a:2"])
