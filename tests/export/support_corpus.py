"""Small ONNX models that break, or nearly break, one rule of the support check each, with the verdict per version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VERSIONS = ((10, 3), (10, 10), (10, 13), (10, 16), (11, 4))
LETTERS = {".": "accepted", "A": "needs attention", "R": "rejected"}

ALWAYS, WARNED, FINE = "RRRRR", "AAAAA", "....."


@dataclass(frozen=True)
class Case:
    """One model of the corpus.

    Attributes:
        name: unique name.
        verdicts: one letter for each of `VERSIONS`: accepted (.), needs attention (A), rejected (R).
        rule: the only rule that it breaks wherever it is not accepted; empty for none.
        build: makes the model.
        plugins: plugins that the target loads.
        checked: whether ONNX's own checker takes the model.
    """

    name: str
    verdicts: str
    rule: str
    build: Callable[[], onnx.ModelProto]
    plugins: tuple[str, ...] = ()
    checked: bool = True
    own_plugins: bool = True


CASES: list[Case] = []


def model_of(
    inputs: str, outputs: str, body: str, opset: int, constants: Mapping[str, object], functions: str = ""
) -> onnx.ModelProto:
    domains = ', "edgeattn": 1, "other": 1, "third": 1' if functions or "edgeattn." in body or "other." in body else ""
    head = f'<ir_version: 10, opset_import: ["": {opset}{domains}]>'
    text = f"{head}\nnet ({inputs}) => ({outputs}) {{\n{body}\n}}\n{functions}"
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        model.graph.initializer.append(tensor)
    return model


def add(
    name: str,
    verdicts: str,
    rule: str,
    inputs: str,
    outputs: str,
    body: str,
    *,
    opset: int = 18,
    functions: str = "",
    change: Callable[[onnx.ModelProto], None] | None = None,
    plugins: tuple[str, ...] = (),
    checked: bool = True,
    own_plugins: bool = True,
    **constants: object,
) -> None:
    def build() -> onnx.ModelProto:
        model = model_of(inputs, outputs, body, opset, constants, functions)
        if change is not None:
            change(model)
        return model

    assert name not in {case.name for case in CASES}, name
    CASES.append(Case(name, verdicts, rule, build, plugins, checked, own_plugins))


IMAGE, ANY = "float[1,4,8,8] x", "float[] y"
HALF_IMAGE, HALF = "float16[1,4,8,8] x", "float16[] y"
KERNEL = np.ones((4, 4, 3, 3), np.float32)

# --- operators ------------------------------------------------------------------------------------------------------
add("chain of plain operators", FINE, "", IMAGE, ANY, "c = Conv(x, w) r = Relu(c) y = GlobalAveragePool(r)", w=KERNEL)
add("Det", ALWAYS, "operator-unsupported", "float[3,3] x", ANY, "y = Det(x)")
add("Unique", ALWAYS, "operator-unsupported", "float[9] x", ANY, "y = Unique(x)")
add(
    "BitShift",
    ALWAYS,
    "operator-unsupported",
    "uint8[4] x, uint8[4] s",
    "uint8[4] y",
    'y = BitShift <direction = "LEFT"> (x, s)',
)
add(
    "Col2Im",
    ALWAYS,
    "operator-unsupported",
    "float[1,4,16] x",
    ANY,
    "y = Col2Im(x, size, block)",
    size=np.int64([5, 5]),
    block=np.int64([2, 2]),
)
add(
    "SequenceConstruct",
    ALWAYS,
    "operator-unsupported",
    "float[2] x",
    ANY,
    "s = SequenceConstruct(x, x) y = SequenceAt(s, i)",
    i=np.int64(0),
)
add("DynamicQuantizeLinear", ALWAYS, "operator-unsupported", IMAGE, "uint8[] y", "y, s, z = DynamicQuantizeLinear(x)")
add("HannWindow", ".....", "", "float[10] x", ANY, "y = Add(x, x)")
add(
    "STFT",
    "R....",
    "operator-unsupported",
    "float[1,32] x",
    ANY,
    "y = STFT(x, step, window)",
    opset=17,
    step=np.int64(8),
    window=np.ones(16, np.float32),
)
add(
    "RMSNormalization",
    "RRR..",
    "operator-unsupported",
    IMAGE,
    ANY,
    "y = RMSNormalization(x, s)",
    opset=23,
    s=np.ones(8, np.float32),
)
add("Swish", "RRRR.", "operator-unsupported", IMAGE, ANY, "y = Swish(x)", opset=24)
add("domain of its own", WARNED, "domain-ignored", IMAGE, ANY, "y = other.Relu(x)", checked=False)
add("operator of nobody", ALWAYS, "operator-unknown", IMAGE, ANY, "y = other.Mystery(x)", checked=False)
add(
    "operator of a known plugin",
    "R....",
    "plugin-namespace",
    IMAGE,
    ANY,
    "y = other.Mystery(x)",
    plugins=("other::Mystery",),
    checked=False,
)
add(
    "plugin with its namespace",
    FINE,
    "",
    IMAGE,
    ANY,
    'y = other.Mystery<plugin_namespace = "other">(x)',
    plugins=("other::Mystery",),
    checked=False,
)
add("operator refused by name", ALWAYS, "operator-refused-by-name", IMAGE, ANY, "y = other.Det(x)", checked=False)
add(
    "roi align",
    WARNED,
    "library-plugin",
    "float[1,4,8,8] x, float[2,4] r",
    ANY,
    "y = RoiAlign(x, r, i)",
    opset=16,
    i=np.int64([0, 0]),
)
add(
    "scatter elements that adds",
    WARNED,
    "library-plugin",
    "float[3,3] x",
    ANY,
    'y = ScatterElements <axis = 1, reduction = "add"> (x, i, u)',
    i=np.int64([[0, 1]]),
    u=np.ones((1, 2), np.float32),
)
add(
    "scatter elements that assigns",
    FINE,
    "",
    "float[3,3] x",
    ANY,
    "y = ScatterElements <axis = 1> (x, i, u)",
    i=np.int64([[0, 1]]),
    u=np.ones((1, 2), np.float32),
)
add(
    "layer norm with three outputs",
    ALWAYS,
    "too-many-outputs",
    IMAGE,
    "float[] y, float[] m, float[] d",
    "y, m, d = LayerNormalization(x, s)",
    s=np.ones(8, np.float32),
)
add("layer norm with one output", FINE, "", IMAGE, ANY, "y = LayerNormalization(x, s)", s=np.ones(8, np.float32))
add(
    "max pool with indices",
    ALWAYS,
    "too-many-outputs",
    IMAGE,
    "float[] y, int64[] i",
    "y, i = MaxPool <kernel_shape = [2, 2]> (x)",
)
LOOP_TWO = """
    y = Loop (trips, yes, x) <body = b (int64 n, bool c, float[3] s) => (bool k, float[3] t, float[3] o) {
        k = Identity(c) t = Add(s, s) o = Identity(t) }>
"""


def no_last_output(model: onnx.ModelProto) -> None:
    """Leave the output unnamed that nothing reads."""
    model.graph.node[0].output.append("")


add(
    "loop output left out",
    ".RRRR",
    "output-omitted",
    "float[3] x",
    "float[3] y",
    LOOP_TWO,
    change=no_last_output,
    trips=np.int64(4),
    yes=np.bool_(True),
)

# --- types ----------------------------------------------------------------------------------------------------------
add("exp of integers", ALWAYS, "type-refused", "int32[4] x", "int32[] y", "y = Exp(x)", checked=False)
add("abs of integers", FINE, "", "int32[4] x", "int32[] y", "y = Abs(x)")
add("matmul of integers", ALWAYS, "type-refused", "int32[4,4] x", "int32[] y", "y = MatMul(x, x)")
add("relu of integers", "R....", "type-refused", "int32[4] x", "int32[] y", "y = Relu(x)")
add("BF16 hard swish", ALWAYS, "type-refused", "bfloat16[4] x", "bfloat16[] y", "y = HardSwish(x)", opset=22)
add("BF16 mish", ALWAYS, "type-refused", "bfloat16[4] x", "bfloat16[] y", "y = Mish(x)", opset=22)
add(
    "BF16 instance norm",
    "R....",
    "type-refused",
    "bfloat16[1,4,8] x, bfloat16[4] s",
    "bfloat16[] y",
    "y = InstanceNormalization(x, s, s)",
    opset=22,
)
add("BF16 relu", FINE, "", "bfloat16[4] x", "bfloat16[] y", "y = Relu(x)")
add(
    "BF16 grid sample",
    WARNED,
    "type-undocumented",
    "bfloat16[1,1,4,4] x, bfloat16[1,4,4,2] g",
    "bfloat16[] y",
    "y = GridSample(x, g)",
    opset=22,
)
add(
    "FP16 range",
    ALWAYS,
    "type-refused",
    "float16 x",
    "float16[] y",
    "y = Range(a, x, d)",
    checked=False,
    a=np.float16(0),
    d=np.float16(1),
)
add("INT64 range", FINE, "", "int64 x", "int64[] y", "y = Range(a, x, d)", a=np.int64(0), d=np.int64(1))
add("sum of booleans", ALWAYS, "type-refused", "bool[4] x", "bool[] y", "y = Add(x, x)", checked=False)
add("where with booleans", FINE, "", "bool[4] x, float[4] a", ANY, "y = Where(x, a, a)")
add("FP16 times FP32", ALWAYS, "types-mixed", "float16[4] x, float[4] z", HALF, "y = Mul(x, z)", checked=False)
add("FP16 times FP16", FINE, "", "float16[4] x, float16[4] z", HALF, "y = Mul(x, z)")
add(
    "FP16 convolution with FP32 weight",
    ALWAYS,
    "types-mixed",
    HALF_IMAGE,
    HALF,
    "y = Conv(x, w)",
    w=KERNEL,
    checked=False,
)
add("FP16 power of an FP32 exponent", "R....", "power-mixed", "float16[4] x", HALF, "y = Pow(x, e)", e=np.float32(2))
add("power of an integer exponent", "R....", "power-integer", "float[4] x", ANY, "y = Pow(x, e)", e=np.int64(2))
add("power of an integer base", "RR...", "", "int64[4] x", "int64[] y", "y = Pow(x, e)", e=np.int64(2))
add("power of floats", FINE, "", "float[4] x", ANY, "y = Pow(x, e)", e=np.float32(2))
add("FP16 celu", ALWAYS, "parser-constants", "float16[4] x", HALF, "y = Celu(x)", opset=22, checked=False)
add("FP32 celu", FINE, "", "float[4] x", ANY, "y = Celu(x)")
add("FP16 Gemm with alpha", "R....", "gemm-factors", "float16[4,4] x", HALF, "y = Gemm <alpha = 0.5> (x, x)")
add("FP16 Gemm", FINE, "", "float16[4,4] x", HALF, "y = Gemm(x, x)")
add("FP16 mean", WARNED, "mean-half", "float16[4] x", HALF, "y = Mean(x, x)")
add("UINT8 between nodes", ALWAYS, "uint8-inside", IMAGE, ANY, "u = Cast <to = 2> (x) y = Cast <to = 1> (u)")
add(
    "UINT8 input and output",
    FINE,
    "",
    "uint8[4] x",
    "uint8[] y",
    "f = Cast <to = 1> (x) g = Relu(f) y = Cast <to = 2> (g)",
)
add("cast to INT16", ALWAYS, "type-unknown-to-tensorrt", "float[4] x", "int16[] y", "y = Cast <to = 5> (x)")
add("cast to FP64", WARNED, "double", "float[4] x", "double[] y", "y = Cast <to = 11> (x)")
add("cast to INT8", WARNED, "cast-quantised", "float[4] x", "int8[] y", "y = Cast <to = 3> (x)")
add("FP64 input", WARNED, "double-tensor", "double[4] x", "double[] y", "y = Relu(x)")
add("INT16 input", ALWAYS, "input-type", "int16[4] x", "float[] y", "y = Cast <to = 1> (x)")
add(
    "UINT16 constant",
    ALWAYS,
    "initializer-type",
    "float[4] x",
    ANY,
    "c = Cast <to = 1> (k) y = Add(x, c)",
    k=np.uint16([1, 2, 3, 4]),
)
add("integer mod", FINE, "", "int64[4] x", "int64[] y", "y = Mod(x, x)")
add("float mod without fmod", ALWAYS, "mod-float", "float[4] x", ANY, "y = Mod(x, x)", checked=False)

# --- attributes and shapes ------------------------------------------------------------------------------------------
add(
    "grid sample 5-D",
    ALWAYS,
    "grid-sample-rank",
    "float[1,1,4,4,4] x, float[1,4,4,4,3] g",
    ANY,
    'y = GridSample <mode = "linear"> (x, g)',
    opset=20,
)
add("grid sample 4-D", FINE, "", "float[1,1,4,4] x, float[1,4,4,2] g", ANY, "y = GridSample(x, g)", opset=16)
TWICE = np.float32([1, 1, 2, 2])


def resize(
    name: str, verdicts: str, rule: str, attributes: str, scales: np.ndarray = TWICE, inputs: str = IMAGE
) -> None:
    add(f"resize {name}", verdicts, rule, inputs, ANY, f"y = Resize <{attributes}> (x, , s)", s=np.asarray(scales))


resize("linear", FINE, "", 'mode = "linear"')
resize("cubic", FINE, "", 'mode = "cubic", coordinate_transformation_mode = "pytorch_half_pixel"')
resize("antialias", ALWAYS, "resize-antialias", 'mode = "linear", antialias = 1')
resize("crop", ALWAYS, "resize-coordinates", 'coordinate_transformation_mode = "half_pixel_symmetric"')
resize("linear channels", ALWAYS, "resize-outer-axes", 'mode = "linear"', np.float32([2, 1, 2, 2]))
resize("linear volume", FINE, "", 'mode = "linear"', np.float32([1, 2, 2, 2]))
resize("cubic volume", ALWAYS, "resize-outer-axes", 'mode = "cubic"', np.float32([1, 2, 2, 2]))
resize("axes", FINE, "", 'mode = "linear", axes = [2, 3]', np.float32([2, 2]))
resize("mode", ALWAYS, "resize-mode", 'mode = "area"')
add(
    "resize rounding",
    ALWAYS,
    "resize-rounding",
    IMAGE,
    ANY,
    'y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "floor"> (x, , s)',
    opset=13,
    s=TWICE,
)
add(
    "resize aspect",
    ALWAYS,
    "resize-aspect",
    IMAGE,
    ANY,
    'y = Resize <keep_aspect_ratio_policy = "not_larger", axes = [2, 3]> (x, , , z)',
    z=np.int64([16, 9]),
)
add("resize to sizes", FINE, "", IMAGE, ANY, 'y = Resize <mode = "linear"> (x, , , z)', z=np.int64([1, 4, 5, 9]))
add(
    "resize with axes and computed scales",
    ALWAYS,
    "resize-axes",
    "float[1,4,8,8] x, float[2] s",
    ANY,
    'y = Resize <mode = "linear", axes = [2, 3]> (x, , s)',
)


def pool(name: str, verdicts: str, rule: str, attributes: str, inputs: str = IMAGE, operator: str = "MaxPool") -> None:
    add(f"pool {name}", verdicts, rule, inputs, ANY, f"y = {operator} <{attributes}> (x)", opset=22)


pool("plain", FINE, "", "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]")
pool("with rounding up", FINE, "", "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1")
pool("window in the padding", WARNED, "pool-ceil-mode", "kernel_shape = [1, 1], strides = [2, 2], ceil_mode = 1")
pool(
    "window in the end padding",
    WARNED,
    "pool-ceil-mode",
    "kernel_shape = [2, 2], strides = [3, 3], pads = [0, 0, 1, 1], ceil_mode = 1",
    "float[1,4,6,6] x",
)
pool(
    "rounding up of an unknown size",
    FINE,
    "",
    "kernel_shape = [2, 2], strides = [3, 3], pads = [0, 0, 1, 1], ceil_mode = 1",
    "float[1,4,H,W] x",
)
pool("dilated", ALWAYS, "pool-dilations", "kernel_shape = [2, 2], dilations = [2, 2]")
pool("dilated by one", FINE, "", "kernel_shape = [2, 2], dilations = [1, 1]", operator="AveragePool")
pool("in four axes", ALWAYS, "pool-rank", "kernel_shape = [2, 2, 2, 2]", "float[1,1,4,4,4,4] x")
pool("of order 3", ALWAYS, "norm-order", "kernel_shape = [2, 2], p = 3", operator="LpPool")
pool("of order 1", FINE, "", "kernel_shape = [2, 2], p = 1", operator="LpPool")
pool(
    "padded twice",
    ALWAYS,
    "auto-pad-and-pads",
    'kernel_shape = [2, 2], auto_pad = "SAME_UPPER", pads = [0, 0, 0, 0]',
    operator="AveragePool",
)
add(
    "convolution in four axes",
    ALWAYS,
    "convolution-rank",
    "float[1,1,4,4,4,4] x",
    ANY,
    "y = Conv(x, w)",
    w=np.ones((1, 1, 2, 2, 2, 2), np.float32),
)
add("convolution in one axis", FINE, "", "float[1,4,8] x", ANY, "y = Conv(x, w)", w=np.ones((4, 4, 3), np.float32))
add(
    "convolution with weights at run time",
    "R....",
    "convolution-runtime-weight",
    "float[1,4,8,8] x, float[4,4,3,3] w",
    ANY,
    "y = Conv(x, w)",
)
add(
    "convolution with weights at run time and kernel_shape",
    FINE,
    "",
    "float[1,4,8,8] x, float[4,4,3,3] w",
    ANY,
    "y = Conv <kernel_shape = [3, 3]> (x, w)",
)
add(
    "convolution over unknown channels",
    ALWAYS,
    "convolution-channels",
    "float[1,C,8,8] x",
    ANY,
    "y = Conv(x, w)",
    w=KERNEL,
)
add("convolution over unknown sizes", FINE, "", "float[N,4,H,W] x", ANY, "y = Conv(x, w)", w=KERNEL)


def recurrent(
    name: str, verdicts: str, rule: str, attributes: str = "", directions: int = 1, operator: str = "LSTM"
) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator] * 3
    add(
        f"{operator} {name}",
        verdicts,
        rule,
        "float[5,1,2] x",
        "float[] y",
        f"y = {operator} <hidden_size = 3{', ' if attributes else ''}{attributes}> (x, w, r)",
        w=np.ones((directions, gates, 2), np.float32),
        r=np.ones((directions, gates, 3), np.float32),
    )


recurrent("plain", FINE, "")
recurrent("plain", FINE, "", operator="GRU")
recurrent("batch first", WARNED, "recurrent-layout", "layout = 1")
recurrent("batch first", WARNED, "recurrent-layout", "layout = 1", operator="RNN")
recurrent("coupled", ALWAYS, "lstm-input-forget", "input_forget = 1")
recurrent("affine", ALWAYS, "recurrent-activation", 'activations = ["Affine", "Tanh"]', operator="GRU")
recurrent(
    "directions that differ",
    ALWAYS,
    "recurrent-directions",
    'direction = "bidirectional", activations = ["Tanh", "Relu"]',
    2,
    "RNN",
)
recurrent("directions that agree", FINE, "", 'direction = "bidirectional", activations = ["Relu", "Relu"]', 2, "RNN")
add("top 3840", FINE, "", "float[5000] x", "float[] y, int64[] i", "y, i = TopK(x, k)", k=np.int64([3840]))
add("top 3841", ALWAYS, "topk-size", "float[5000] x", "float[] y, int64[] i", "y, i = TopK(x, k)", k=np.int64([3841]))
add("top of an unknown number", FINE, "", "float[5000] x, int64[1] k", "float[] y, int64[] i", "y, i = TopK(x, k)")
add("top, unsorted", FINE, "", "float[9] x", "float[] y, int64[] i", "y, i = TopK <sorted = 0> (x, k)", k=np.int64([3]))
PAIR = "float[2,3,4] x, float[2,4,5] z"
add("einsum", FINE, "", PAIR, ANY, 'y = Einsum <equation = "bij,bjk->bik"> (x, z)')
add("einsum with dots", FINE, "", PAIR, ANY, 'y = Einsum <equation = "...ij,...jk->...ik"> (x, z)')
add("einsum in capitals", ALWAYS, "einsum-letters", PAIR, ANY, 'y = Einsum <equation = "Bij,Bjk->Bik"> (x, z)')
add(
    "einsum of a diagonal",
    "RR...",
    "einsum-diagonal",
    "float[3,3] x",
    ANY,
    'y = Einsum <equation = "ii->i"> (x)',
)
add(
    "einsum that broadcasts",
    "RR...",
    "einsum-broadcast",
    "float[1,3] x, float[2,3] z",
    ANY,
    'y = Einsum <equation = "ij,ij->ij"> (x, z)',
)
add("reduce over an initializer", FINE, "", IMAGE, ANY, "y = ReduceMean(x, a)", a=np.int64([2]))
add("reduce over an input", ALWAYS, "reduce-axes", "float[1,4,8,8] x, int64[1] a", ANY, "y = ReduceMean(x, a)")
add("reduce over a constant node", FINE, "", IMAGE, ANY, "a = Constant <value_ints = [2]> () y = ReduceMax(x, a)")
add(
    "reduce over a cast constant",
    ALWAYS,
    "reduce-axes",
    IMAGE,
    ANY,
    "c = Cast <to = 7> (a) y = ReduceMax(x, c)",
    a=np.int32([2]),
)
add(
    "log-sum-exp over one axis", "AAA..", "reduce-log-sum-exp", IMAGE, ANY, "y = ReduceLogSumExp(x, a)", a=np.int64([1])
)
add("log-sum-exp over all axes", FINE, "", IMAGE, ANY, "y = ReduceLogSumExp(x)")
add("log-sum-exp over all axes by name", FINE, "", "float[4] x", ANY, "y = ReduceLogSumExp(x, a)", a=np.int64([0]))
add("log-sum-exp of opset 17", FINE, "", IMAGE, ANY, "y = ReduceLogSumExp <axes = [1]> (x)", opset=17)
add("log-sum-exp over computed axes", "AAARR", "", "float[1,4,8,8] x, int64[1] a", ANY, "y = ReduceLogSumExp(x, a)")
add(
    "group norm of opset 21",
    "A....",
    "group-norm-21",
    IMAGE,
    ANY,
    "y = GroupNormalization <num_groups = 2> (x, s, s)",
    opset=21,
    s=np.ones(4, np.float32),
)
add(
    "group norm of opset 18",
    FINE,
    "",
    IMAGE,
    ANY,
    "y = GroupNormalization <num_groups = 2> (x, s, s)",
    checked=False,
    s=np.ones(2, np.float32),
)
add(
    "group norm of one channel each",
    FINE,
    "",
    IMAGE,
    ANY,
    "y = GroupNormalization <num_groups = 4> (x, s, s)",
    opset=21,
    s=np.ones(4, np.float32),
)
add(
    "instance norm without an axis",
    ALWAYS,
    "norm-rank",
    "float[1,4] x",
    ANY,
    "y = InstanceNormalization(x, s, s)",
    s=np.ones(4, np.float32),
)
NORM = {name: np.ones(4, np.float32) for name in ("s", "b", "m", "v")}
add(
    "batch norm of mixed types",
    "R....",
    "batch-norm-types",
    HALF_IMAGE,
    HALF,
    "y = BatchNormalization(x, s, b, m, v)",
    **NORM,
)
add("batch norm", FINE, "", IMAGE, ANY, "y = BatchNormalization(x, s, b, m, v)", **NORM)
add(
    "batch norm in training",
    ALWAYS,
    "training-mode",
    IMAGE,
    ANY,
    "y, a, c = BatchNormalization <training_mode = 1> (x, s, b, m, v)",
    change=lambda model: last_outputs_off(model),
    **NORM,
)
add(
    "dropout in training",
    ALWAYS,
    "training-mode",
    IMAGE,
    ANY,
    "y = Dropout(x, p, t)",
    p=np.float32(0.5),
    t=np.bool_(True),
)
add("dropout in inference", FINE, "", IMAGE, ANY, "y = Dropout(x, p, t)", p=np.float32(0.5), t=np.bool_(False))


def last_outputs_off(model: onnx.ModelProto) -> None:
    """Remove the outputs that training adds."""
    del model.graph.node[0].output[1:]


add("eye-like of a fixed size", FINE, "", "float[3,3] x", ANY, "y = EyeLike(x)")
add("eye-like of an unknown size", ALWAYS, "eye-like-dynamic", "float[N,N] x", ANY, "y = EyeLike(x)")
SCATTER = {"i": np.int64([[0]]), "u": np.ones((1, 3), np.float32)}
add("scatter", FINE, "", "float[3,3] x", ANY, "y = ScatterND(x, i, u)", **SCATTER)
add(
    "scatter with reduction none",
    "R....",
    "scatter-nd-attribute",
    "float[3,3] x",
    ANY,
    'y = ScatterND <reduction = "none"> (x, i, u)',
    **SCATTER,
)
add("scatter that adds", ALWAYS, "", "float[3,3] x", ANY, 'y = ScatterND <reduction = "add"> (x, i, u)', **SCATTER)
add(
    "scatter elements of other ranks",
    ALWAYS,
    "scatter-ranks",
    "float[3,3] x",
    ANY,
    "y = ScatterElements(x, i, u)",
    i=np.int64([0]),
    u=np.ones(1, np.float32),
    checked=False,
)
add(
    "slice of the first axis without axes",
    ALWAYS,
    "slice-starts",
    IMAGE,
    ANY,
    "y = Slice(x, b, e)",
    b=np.int64([0]),
    e=np.int64([1]),
)
add(
    "slice of the first axis by INT32 constants",
    FINE,
    "",
    IMAGE,
    ANY,
    "y = Slice(x, b, e)",
    b=np.int32([0]),
    e=np.int32([1]),
)
add("slice with axes", FINE, "", IMAGE, ANY, "y = Slice(x, b, e, a)", b=np.int64([0]), e=np.int64([1]), a=np.int64([0]))
add(
    "slice of every axis without axes",
    FINE,
    "",
    "float[4,4] x",
    ANY,
    "y = Slice(x, b, e)",
    b=np.int64([0, 1]),
    e=np.int64([2, 2]),
)
add("squeeze over an input", "R....", "squeeze-axes", "float[1,4] x, int64[1] a", ANY, "y = Squeeze(x, a)")
add("squeeze without axes", FINE, "", "float[1,4] x", ANY, "y = Squeeze(x)")
add("squeeze without axes of an unknown size", ALWAYS, "squeeze-unknown", "float[N,4] x", ANY, "y = Squeeze(x)")
add("pad over an input", "R....", "pad-axes", "float[4,4] x, int64[1] a", ANY, "y = Pad(x, p, , a)", p=np.int64([1, 1]))
add("pad that crops", "R....", "pad-negative", "float[4,4] x", ANY, "y = Pad(x, p)", p=np.int64([0, -1, 0, 0]))
add("pad by reflection", FINE, "", "float[4,4] x", ANY, 'y = Pad <mode = "reflect"> (x, p)', p=np.int64([1, 1, 1, 1]))
add(
    "pad by mirrors",
    ALWAYS,
    "pad-mode",
    "float[4,4] x",
    ANY,
    'y = Pad <mode = "mirror"> (x, p)',
    p=np.int64([1, 1, 1, 1]),
)
add("cumulative sum over an input", "R....", "cumsum-axis", "float[4,4] x, int64 a", ANY, "y = CumSum(x, a)")
add("cumulative sum", FINE, "", "float[4,4] x", ANY, "y = CumSum(x, a)", a=np.int64(1))
add("vector times a stack", ALWAYS, "matmul-vector", "float[4] x, float[3,4,5] z", ANY, "y = MatMul(x, z)")
add("vector times a stack of one", FINE, "", "float[4] x, float[1,4,5] z", ANY, "y = MatMul(x, z)")
add("stack times a vector", FINE, "", "float[3,5,4] x, float[4] z", ANY, "y = MatMul(x, z)")
add("Gemm of a stack", ALWAYS, "gemm-rank", "float[1,4,4] x", ANY, "y = Gemm(x, x)", checked=False)
add(
    "depth to space of a volume",
    ALWAYS,
    "blocks-rank",
    "float[1,8,2,2,2] x",
    ANY,
    "y = DepthToSpace <blocksize = 2> (x)",
    checked=False,
)
add(
    "reshape by an input of unknown length", ALWAYS, "shape-length", "float[12] x, int64[n] s", ANY, "y = Reshape(x, s)"
)
add("reshape by an input of known length", FINE, "", "float[12] x, int64[3] s", ANY, "y = Reshape(x, s)")
add("reshape by shapes", FINE, "", "float[N,4] x", ANY, "s = Shape(x) y = Reshape(x, s)")
add("fill with UINT8", ALWAYS, "fill-type", "int64[2] x", "uint8[] y", "y = ConstantOfShape <value = uint8[1] {3}> (x)")
add("constant text", ALWAYS, "constant-form", IMAGE, ANY, 't = Constant <value_string = "a"> () y = Relu(x)')
add(
    "random numbers in FP64",
    ALWAYS,
    "random-type",
    IMAGE,
    "double[] y",
    "y = RandomNormal <dtype = 11, shape = [2]> ()",
)
add(
    "random numbers like a constant",
    "RR...",
    "random-like-constant",
    "float[2] x",
    ANY,
    "r = RandomNormalLike(k) y = Add(x, r)",
    k=np.ones(2, np.float32),
)
add("random numbers with a seed", WARNED, "random-seed", "float[2] x", ANY, "y = RandomNormalLike <seed = 1.0> (x)")
ATTENTION = "float[1,2,4,8] x, float[1,2,4,8] k"
add("attention", "RRRAA", "", ATTENTION, ANY, "y = Attention(x, k, k)", opset=23)
add("attention with softcap", "RRRRR", "", ATTENTION, ANY, "y = Attention <softcap = 2.0> (x, k, k)", opset=23)
BRANCHES = "y = If (c) <then_branch = t () => ({}) {{ {} }}, else_branch = e () => ({}) {{ {} }}>"
add(
    "if",
    FINE,
    "",
    "bool c, float[2,3] x",
    ANY,
    BRANCHES.format("float[2,3] a", "a = Relu(x)", "float[2,3] b", "b = Neg(x)"),
)
add(
    "if with branches of two ranks",
    ALWAYS,
    "branch-ranks",
    "bool c, float[1,3] x",
    ANY,
    BRANCHES.format("float[1,3] a", "a = Relu(x)", "float[3] b", "b = Squeeze(x, z)"),
    z=np.int64([0]),
)
add(
    "if inside which an operator is missing",
    ALWAYS,
    "operator-unsupported",
    "bool c, float[3,3] x",
    ANY,
    BRANCHES.format("float a", "a = Det(x)", "float b", "b = ReduceMax <keepdims = 0> (x)"),
)
LOOP = """
    y = Loop (trips, yes, x) <body = b (int64 n, bool c, float[{}] s) => (bool k, float[{}] t) {{
        k = Identity(c) t = {} }}>
"""
add("loop", FINE, "", "float[3] x", ANY, LOOP.format(3, 3, "Add(s, s)"), trips=np.int64(4), yes=np.bool_(True))
add(
    "loop that grows",
    ALWAYS,
    "loop-shapes",
    "float[3] x",
    ANY,
    LOOP.format(3, 6, "Concat <axis = 0> (s, s)"),
    trips=np.int64(4),
    yes=np.bool_(True),
    checked=False,
)
SCAN = """
    z, y = Loop ({}, yes, x) <body = b (int64 n, bool c, float[3] s) => (bool k, float[3] t, float[3] o) {{
        {} t = Add(s, s) o = Identity(t) }}>
"""
add(
    "loop that collects",
    FINE,
    "",
    "float[3] x",
    "float[] y, float[3] z",
    SCAN.format("trips", "k = Identity(c)"),
    trips=np.int64(4),
    yes=np.bool_(True),
)
add(
    "loop that collects without a count",
    WARNED,
    "loop-scan-length",
    "float[3] x",
    "float[] y, float[3] z",
    SCAN.format("", "k = Identity(c)"),
    yes=np.bool_(True),
)
add(
    "loop that ends early",
    WARNED,
    "loop-scan-length",
    "float[3] x",
    "float[] y, float[3] z",
    SCAN.format("trips", "q = ReduceMax <keepdims = 0> (s) k = Less(q, limit)"),
    trips=np.int64(4),
    yes=np.bool_(True),
    limit=np.float32(9),
)

# --- quantisation ---------------------------------------------------------------------------------------------------
QDQ = """
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    w = DequantizeLinear <axis = 0> (w8, ws, wz)
    y = Conv <kernel_shape = [1, 1]> (d, w)
"""
SCALES = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "w8": np.arange(16, dtype=np.int8).reshape(4, 4, 1, 1),
    "ws": np.float32([0.1, 0.2, 0.3, 0.4]),
    "wz": np.zeros(4, np.int8),
}


def qdq(
    name: str, verdicts: str, rule: str, body: str = QDQ, *, opset: int = 18, checked: bool = True, **more: object
) -> None:
    add(f"quantised {name}", verdicts, rule, IMAGE, ANY, body, opset=opset, checked=checked, **(SCALES | more))


qdq("convolution", FINE, "")
qdq("with a zero point", ALWAYS, "quantised-zero-point", z=np.int8(3))
qdq("weight with a zero point", ALWAYS, "quantised-zero-point", wz=np.int8([0, 0, 1, 0]))
qdq("to UINT8", WARNED, "quantised-uint8", z=np.uint8(0))
qdq(
    "without a zero point", WARNED, "quantised-uint8", "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d)"
)
qdq(
    "to INT8 by attribute",
    FINE,
    "",
    "q = QuantizeLinear <output_dtype = 3> (x, s) d = DequantizeLinear(q, s) y = Relu(d)",
    opset=21,
)
qdq("with a scale of zero", ALWAYS, "quantised-scale", s=np.float32(0))
qdq("with a negative scale", ALWAYS, "quantised-scale", ws=np.float32([0.1, -1, 1, 1]))
qdq(
    "with an INT32 bias",
    ALWAYS,
    "quantised-bias",
    QDQ.replace(
        "y = Conv <kernel_shape = [1, 1]> (d, w)",
        "b = DequantizeLinear <axis = 0> (b32, ws) y = Conv <kernel_shape = [1, 1]> (d, w, b)",
    ),
    b32=np.zeros(4, np.int32),
)
qdq(
    "UINT8 weight",
    ALWAYS,
    "quantised-type",
    w8=np.arange(16, dtype=np.uint8).reshape(4, 4, 1, 1),
    wz=np.zeros(4, np.uint8),
)
qdq(
    "to INT16",
    ALWAYS,
    "",
    "q = QuantizeLinear(x, s, z16) d = DequantizeLinear(q, s, z16) y = Relu(d)",
    opset=21,
    z16=np.int16(0),
)
qdq(
    "activation by channel",
    WARNED,
    "quantised-channels",
    "q = QuantizeLinear <axis = 1> (x, ws, wz) d = DequantizeLinear <axis = 1> (q, ws, wz) y = Relu(d)",
)
qdq("weight by input channel", WARNED, "quantised-channels", QDQ.replace("axis = 0", "axis = 1"))
qdq(
    "weight without axis",
    "A....",
    "quantised-axis",
    "w = DequantizeLinear (wm, ws, wz) f = Reshape(x, fs) y = MatMul(f, w)",
    wm=np.ones((4, 4), np.int8),
    fs=np.int64([64, 4]),
)
qdq(
    "weight with too few scales",
    ALWAYS,
    "quantised-scale-count",
    ws=np.float32([0.1, 0.2, 0.3]),
    wz=np.zeros(3, np.int8),
    checked=False,
)
qdq(
    "with a computed scale",
    WARNED,
    "quantised-scale-computed",
    "m = ReduceMax <keepdims = 0> (x) q = QuantizeLinear(x, m, z) d = DequantizeLinear(q, s, z) y = Relu(d)",
)
HALF_QDQ = "q = QuantizeLinear(x, {}, z) d = DequantizeLinear(q, h, z) y = Relu(d)"
add(
    "quantised FP16 with FP32 scale",
    ALWAYS,
    "quantised-scale-type",
    HALF_IMAGE,
    HALF,
    HALF_QDQ.format("s"),
    opset=19,
    s=np.float32(0.1),
    h=np.float16(0.1),
    z=np.int8(0),
    checked=False,
)
add(
    "quantised FP16 with FP16 scale",
    FINE,
    "",
    HALF_IMAGE,
    HALF,
    HALF_QDQ.format("h"),
    opset=19,
    h=np.float16(0.1),
    z=np.int8(0),
)
add(
    "quantised FP16 that comes back as FP32",
    ALWAYS,
    "types-mixed",
    HALF_IMAGE,
    HALF,
    "q = QuantizeLinear(x, h, z) d = DequantizeLinear(q, s, z) y = Mul(x, d)",
    opset=19,
    s=np.float32(0.1),
    h=np.float16(0.1),
    z=np.int8(0),
    checked=False,
)
qdq(
    "in blocks",
    WARNED,
    "quantised-blocks",
    "w = DequantizeLinear <axis = 1, block_size = 2> (wm, wb) f = Reshape(x, fs) y = MatMul(f, w)",
    opset=21,
    wm=np.ones((4, 4), np.int8),
    wb=np.full((4, 2), 0.5, np.float32),
    fs=np.int64([64, 4]),
)

# --- functions and plugins ------------------------------------------------------------------------------------------
FUNCTION = '<domain: "{}", opset_import: ["": {}]>\n{} ({}) => (fo) {{ {} }}'
DIFFERENCE = FUNCTION.format("other", 18, "Difference", "fp, fq", "fo = Sub(fp, fq)")
TWO = "float[4] x, float[4] z"
add("function", FINE, "", TWO, ANY, "y = other.Difference(x, z)", functions=DIFFERENCE)
add(
    "function with a formal name from outside",
    "R....",
    "function-formal-names",
    "float[4] x, float[4] fq",
    ANY,
    "y = other.Difference(x, x)",
    functions=DIFFERENCE,
)
add(
    "function with a formal name from later on",
    FINE,
    "",
    TWO,
    ANY,
    "y = other.Difference(x, z) fq = Neg(y)",
    functions=DIFFERENCE,
)
add(
    "function with formal names as they are",
    FINE,
    "",
    "float[4] fp, float[4] fq",
    ANY,
    "y = other.Difference(fp, fq)",
    functions=DIFFERENCE,
)
add(
    "function with permuted names",
    "RAAAA",
    "",
    "float[4] fp, float[4] fq",
    ANY,
    "y = other.Difference(fq, fp)",
    functions=DIFFERENCE,
)
add(
    "function with an input too few",
    ALWAYS,
    "function-inputs",
    TWO,
    ANY,
    "y = other.Difference(x)",
    functions=DIFFERENCE,
)
add(
    "function with an empty input",
    ALWAYS,
    "function-inputs",
    TWO,
    ANY,
    "y = other.Difference(x, )",
    functions=DIFFERENCE,
    checked=False,
)
BOTH = '<domain: "other", opset_import: ["": 18]>\nBoth (fp, fq) => (fo, fr) { fo = Sub(fp, fq) fr = Add(fp, fq) }'
add(
    "function with an output left out",
    ".RRRR",
    "function-outputs",
    TWO,
    ANY,
    "y, = other.Both(x, z)",
    functions=BOTH,
    checked=False,
    change=lambda model: model.graph.node[0].output.__setitem__(slice(None), ["y", ""]),
)
add(
    "function of another opset",
    WARNED,
    "function-opset",
    TWO,
    ANY,
    "y = other.Difference(x, z)",
    functions=DIFFERENCE.replace("18", "17"),
    checked=False,
)
add(
    "function with the name of an operator",
    WARNED,
    "domain-ignored",
    TWO,
    ANY,
    "y = other.Mul(x, z)",
    functions=FUNCTION.format("other", 18, "Mul", "fp, fq", "fo = Sub(fp, fq)"),
)
add(
    "function with a name that is refused",
    ALWAYS,
    "operator-refused-by-name",
    TWO,
    ANY,
    "y = other.Det(x, z)",
    functions=FUNCTION.format("other", 18, "Det", "fp, fq", "fo = Sub(fp, fq)"),
)
add(
    "functions of one name",
    WARNED,
    "function-same-name",
    TWO,
    ANY,
    "a = other.Difference(x, z) y = third.Difference(a, z)",
    functions=DIFFERENCE + "\n" + FUNCTION.format("third", 18, "Difference", "tp, tq", "fo = Add(tp, tq)"),
)
add(
    "function whose body is refused",
    ALWAYS,
    "operator-unsupported",
    "float[3,3] x",
    ANY,
    "y = other.Wrap(x)",
    functions=FUNCTION.format("other", 18, "Wrap", "fp", "fo = Det(fp)"),
)
add(
    "function inside a function",
    FINE,
    "",
    TWO,
    ANY,
    "y = other.Outer(x, z)",
    functions=DIFFERENCE
    + "\n"
    + FUNCTION.format("other", 18, "Outer", "op, oq", "m = other.Difference(op, oq) fo = Relu(m)").replace(
        '["": 18]>\nOuter', '["": 18, "other": 1]>\nOuter'
    ),
)
PLUGIN_ATTRIBUTES = 'plugin_namespace = "other", plugin_version = "1"'
add(
    "function that hides a plugin",
    "A....",
    "plugin-ignored",
    TWO,
    ANY,
    f"y = other.Difference <{PLUGIN_ATTRIBUTES}> (x, z)",
    functions=DIFFERENCE,
    plugins=("other::Difference",),
)
add(
    "plugin whose function would be refused",
    "R....",
    "",
    "float[3,3] x",
    ANY,
    f"y = other.Wrap <{PLUGIN_ATTRIBUTES}> (x)",
    functions=FUNCTION.format("other", 18, "Wrap", "fp", "fo = Det(fp)"),
    plugins=("other::Wrap",),
)
add(
    "plugin that is not loaded, with its function",
    "A....",
    "plugin-ignored",
    TWO,
    ANY,
    f"y = other.Difference <{PLUGIN_ATTRIBUTES}> (x, z)",
    functions=DIFFERENCE,
)
CRISS_CROSS = "float[1,4,8,8] q, float[1,4,8,8] k, float[1,8,8,8] v, float[1,8,8,8] r"
add(
    "edgeattn's plugin",
    FINE,
    "",
    CRISS_CROSS,
    "float[1,8,8,8] y",
    'y = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn", plugin_version = "1"> (q, k, v, r)',
    checked=False,
)
add(
    "edgeattn's plugin with an input too few",
    ALWAYS,
    "operator-unknown",
    CRISS_CROSS,
    "float[1,8,8,8] y",
    'y = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn", plugin_version = "1"> (q, k, v)',
    checked=False,
)
add(
    "edgeattn's plugin where it is not loaded",
    ALWAYS,
    "operator-unknown",
    CRISS_CROSS,
    "float[1,8,8,8] y",
    'y = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn", plugin_version = "1"> (q, k, v, r)',
    checked=False,
    own_plugins=False,
)

# --- FP16 and sizes -------------------------------------------------------------------------------------------------
add("FP16 softmax over 65504 keys", FINE, "", "float16[1,65504] x", HALF, "y = Softmax(x)")
add("FP16 softmax over 65505 keys", WARNED, "fp16-softmax", "float16[1,65505] x", HALF, "y = Softmax(x)")
add("FP32 softmax over 65505 keys", FINE, "", "float[1,65505] x", ANY, "y = Softmax(x)")
add("FP16 sum of 65505 numbers", WARNED, "fp16-sum", "float16[4,65505] x", HALF, "y = ReduceSum(x, a)", a=np.int64([1]))
add("FP16 mean of 65505 numbers", FINE, "", "float16[4,65505] x", HALF, "y = ReduceMean(x, a)", a=np.int64([1]))
add("FP16 sum of few numbers", FINE, "", "float16[65505,4] x", HALF, "y = ReduceSum(x, a)", a=np.int64([1]))
add(
    "FP16 product over 65505 numbers",
    WARNED,
    "fp16-matmul",
    "float16[2,65505] x, float16[65505,2] z",
    HALF,
    "y = MatMul(x, z)",
)
add("FP16 log-sum-exp", WARNED, "fp16-exponentials", "float16[4] x", HALF, "y = ReduceLogSumExp(x)")
add("FP16 mask of infinity", WARNED, "fp16-constant", "float16[2] x", HALF, "y = Add(x, m)", m=np.float16([0, -np.inf]))
add("FP16 mask of a large number", FINE, "", "float16[2] x", HALF, "y = Add(x, m)", m=np.float16([0, -65504]))
add(
    "constant that FP16 cannot hold",
    WARNED,
    "fp16-narrowed",
    "float16[2] x",
    HALF,
    "h = Cast <to = 10> (m) y = Add(x, h)",
    m=np.float32([0, -1e9]),
)
add(
    "constant that FP16 can hold",
    FINE,
    "",
    "float16[2] x",
    HALF,
    "h = Cast <to = 10> (m) y = Add(x, h)",
    m=np.float32([0, -1e4]),
)
add("non-zero", WARNED, "size-from-data", "float[4] x", "int64[] y", "y = NonZero(x)")

# --- inputs, outputs, the model -------------------------------------------------------------------------------------


def unshaped(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def declare(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


def nested(model: onnx.ModelProto, levels: int) -> None:
    """Put the only node inside `levels` branches."""
    for level in range(levels):
        inner = list(model.graph.node)
        name = f"y{level}"
        inner[-1].output[0] = name
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        body = helper.make_graph(inner, f"g{level}", [], [output])
        branch = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        del model.graph.node[:]
        model.graph.node.append(branch)


add("input without a shape", WARNED, "input-shape", "float[4] x", ANY, "y = Relu(x)", change=unshaped)
add("input that is an output", WARNED, "input-is-output", "float[4] x", "float[4] x, float[4] y", "y = Relu(x)")
add(
    "INT32 output declared INT64",
    ALWAYS,
    "output-int32",
    "int32[4] x",
    "int32[4] y",
    "y = Abs(x)",
    change=declare,
    checked=False,
)
add("output of another shape than declared", WARNED, "output-shape", "float[4] x", "float[5] y", "y = Relu(x)")
add("output of a named size", FINE, "", "float[N,4] x", "float[M,4] y", "y = Relu(x)")
add(
    "output of another type than declared",
    WARNED,
    "output-type",
    "float[4] x",
    "float16[4] y",
    "y = Relu(x)",
    checked=False,
)
add("opset 25", FINE, "", "float[4] x", ANY, "y = Relu(x)", opset=25)
add("opset 8", WARNED, "opset-older", "float[4] x", ANY, "y = Relu(x)", opset=8)
add("opset 6", ALWAYS, "", "float[4] x", ANY, "y = Relu(x)", opset=6)
add("three branches deep", FINE, "", "bool c, float[4] x", ANY, "y = Relu(x)", change=lambda model: nested(model, 3))


def functions_inside(model: onnx.ModelProto, levels: int) -> None:
    """Add functions that call each other, `levels` deep."""
    model.opset_import.append(helper.make_opsetid("other", 1))
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("other", 1)]
    for level in range(levels):
        call = (
            helper.make_node(f"F{level + 1}", [f"a{level}"], [f"b{level}"], domain="other")
            if level + 1 < levels
            else helper.make_node("Relu", [f"a{level}"], [f"b{level}"])
        )
        model.functions.append(
            helper.make_function("other", f"F{level}", [f"a{level}"], [f"b{level}"], [call], imports)
        )
    model.graph.node[0].op_type, model.graph.node[0].domain = "F0", "other"


add("24 functions deep", FINE, "", "float[4] x", ANY, "y = Relu(x)", change=lambda model: functions_inside(model, 24))
add(
    "25 functions deep",
    ALWAYS,
    "nesting",
    "float[4] x",
    ANY,
    "y = Relu(x)",
    change=lambda model: functions_inside(model, 25),
)

# --- near misses of rules that the rest does not come close to ------------------------------------------------------
add("depth to space", FINE, "", "float[1,8,2,2] x", ANY, "y = DepthToSpace <blocksize = 2> (x)")
add(
    "attention of three axes",
    "RRRRA",
    "",
    "float[1,4,8] x",
    ANY,
    "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)",
    opset=23,
)
add(
    "attention that may fall apart",
    "RRR..",
    "operator-unsupported",
    ATTENTION,
    ANY,
    "y = Attention <TRT_decomposable = 1> (x, k, k)",
    opset=23,
    checked=False,
)
add(
    "if with branches of different counts",
    ALWAYS,
    "branch-outputs",
    "bool c, float[2,3] x",
    ANY,
    BRANCHES.format("float[2,3] a", "a = Relu(x)", "float[2,3] b, float[2,3] d", "b = Neg(x) d = Abs(x)"),
    checked=False,
)
add(
    "function beside a plugin that it does not name",
    FINE,
    "",
    TWO,
    ANY,
    "y = other.Difference(x, z)",
    functions=DIFFERENCE,
    plugins=("other::Difference",),
)
add("random numbers in FP32", FINE, "", "float[2] x", ANY, "r = RandomNormalLike(x) y = Add(x, r)")
add("fill with FP32", FINE, "", "int64[2] x", ANY, "y = ConstantOfShape(x)")
add("non-zero mask instead of indices", FINE, "", "float[4] x", "bool[] y", "y = Equal(x, z)", z=np.float32(0))
add("FP32 mean", FINE, "", "float[4] x", ANY, "y = Mean(x, x)")
add(
    "reshape of a varying batch to fixed sizes",
    WARNED,
    "reshape-fixed",
    "float[N,4] x",
    ANY,
    "r = Relu(x) y = Reshape(r, s)",
    s=np.int64([2, 4]),
)
add(
    "reshape of a varying batch that keeps it",
    FINE,
    "",
    "float[N,4] x",
    ANY,
    "r = Relu(x) y = Reshape(r, s)",
    s=np.int64([0, 2, 2]),
)
add(
    "plugin of booleans",
    ALWAYS,
    "plugin-type",
    "bool[4] x",
    ANY,
    'y = other.Mystery<plugin_namespace = "other">(x)',
    plugins=("other::Mystery",),
    checked=False,
)
add("TensorRT's own operator", FINE, "", "float[4] x, float[4] z", ANY, "y = other.TRT_FloorDiv(x, z)", checked=False)
