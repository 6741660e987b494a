"""Rules about attributes, shapes and constant inputs of single operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.export.support.context import NodeContext, is_weights, shape_of
from edgeattn.export.support.rule import CHANGES, HEADERS, OBSERVATIONS, PARSER, TABLE, Mark, NodeRule, Rule, Severity

REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
)
POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
_ACTIVATIONS = frozenset(
    {
        *("Relu", "Tanh", "Sigmoid", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu", "Softsign"),
        "Softplus",
    }
)
_GATES = {"LSTM": 3, "GRU": 2, "RNN": 1}
_TOPK_LIMIT = 3840

Find = Callable[[NodeContext], str | None]


def _value(name: str, default: Any, wrong: Callable[[Any], bool]) -> Find:
    """Make a predicate that finds an attribute whose value is wrong."""

    def find(node: NodeContext) -> str | None:
        value = node.attribute(name, default)
        return f"{name} is {value}" if wrong(value) else None

    return find


def _one_of(name: str, default: str, allowed: tuple[str, ...]) -> Find:
    return _value(name, default, lambda value: value not in allowed)


def _rank(index: int, allowed: tuple[int, ...]) -> Find:
    """Make a predicate that finds an input of a rank that is not taken."""

    def find(node: NodeContext) -> str | None:
        rank = node.rank(index)
        return None if rank is None or rank in allowed else f"input {index} has {rank} axes"

    return find


def _computed(index: int, what: str) -> Find:
    """Make a predicate that finds an input that is not an initializer or Constant."""
    return lambda node: f"{what} is computed in the graph" if node.is_computed(index) else None


def _grid_sample(node: NodeContext) -> str | None:
    ranks = {rank for rank in (node.rank(0), node.rank(1)) if rank is not None}
    return f"its inputs have {max(ranks)} axes" if ranks and ranks != {4} else None


def _resize_rounding(node: NodeContext) -> str | None:
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if node.attribute("coordinate_transformation_mode") == "tf_half_pixel_for_nn" and rounding != "round_prefer_floor":
        return f"nearest_mode is {rounding} with tf_half_pixel_for_nn"
    return None


def _resize_scales(node: NodeContext) -> str | None:
    mode = node.attribute("mode", "nearest")
    limit = {"linear": 3, "cubic": 2}.get(mode)
    index = 2 if node.opset >= 11 else 1
    scales, rank = node.constant(index), node.rank(0)
    if limit is None or scales is None or rank is None or not scales.size or node.input(3) is not None:
        return None
    # The importer compares the scales as written with the axes of the tensor, with axes in between put at their place.
    axes = [axis % rank for axis in node.attribute("axes", list(range(rank)))]
    full = dict(zip(axes, scales.ravel().tolist(), strict=False))
    outer = [axis for axis in range(max(0, scales.size - limit)) if full.get(axis, 1.0) != 1.0]
    return f"{mode} scales axis {outer[0]} of {rank}; the last {limit} may be scaled" if outer else None


def _resize_axes(node: NodeContext) -> str | None:
    axes, rank = node.attribute("axes", []), node.rank(0)
    if not axes or rank is None:
        return None
    normal = [axis % rank for axis in axes]
    if len(set(normal)) < len(normal):
        return f"axes {axes} repeat"
    if node.input(3) is None and node.is_computed(2) and normal != list(range(rank)):
        return f"axes {axes} with scales that are computed in the graph"
    return None


def _pool_ceil(node: NodeContext) -> str | None:
    """Find windows that would start in the end padding, which ONNX drops and TensorRT's formula counts."""
    if not node.attribute("ceil_mode", 0) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    kernel, shape = node.attribute("kernel_shape", []), node.shape(0)
    if shape is None or len(shape) != len(kernel) + 2:
        return None
    strides = node.attribute("strides", [1] * len(kernel))
    pads = node.attribute("pads", [0] * 2 * len(kernel))
    for axis, (size, window, stride) in enumerate(zip(shape[2:], kernel, strides, strict=False)):
        begin, end = pads[axis], pads[axis + len(kernel)]
        if size is None:
            continue
        last = math.ceil((size + begin + end - window) / stride) * stride
        if last >= size + begin:
            return f"the last window of axis {axis + 2} starts in the padding (at {last - begin} of {size})"
    return None


def _pool_dilations(node: NodeContext) -> str | None:
    dilations = node.attribute("dilations", [])
    return f"dilations is {dilations}" if any(step != 1 for step in dilations) else None


def _window_rank(node: NodeContext) -> str | None:
    kernel, rank = node.attribute("kernel_shape", []), node.rank(0)
    if kernel and (len(kernel) > 3 or (rank is not None and rank - 2 > 3)):
        return f"it has {len(kernel)} spatial axes"
    return None


def _convolution_rank(node: NodeContext) -> str | None:
    rank = node.rank(0)
    return f"its input has {rank} axes" if rank is not None and not 3 <= rank <= 5 else None


def _auto_pad(node: NodeContext) -> str | None:
    mode = node.attribute("auto_pad", "NOTSET")
    return f"auto_pad is {mode} and pads is written too" if mode.startswith("SAME") and node.has("pads") else None


def _runtime_kernel(node: NodeContext) -> str | None:
    if node.has("kernel_shape") or not (node.is_computed(1) or node.is_computed(2)):
        return None
    return f"{'the weight' if node.is_computed(1) else 'the bias'} is not a constant, and kernel_shape is not written"


def _unknown_channels(node: NodeContext) -> str | None:
    shape = node.shape(0)
    return "its number of channels is not fixed" if shape and len(shape) > 2 and shape[1] is None else None


def _recurrent_activations(node: NodeContext) -> str | None:
    unknown = [name for name in node.attribute("activations", []) if name not in _ACTIVATIONS]
    return f"activations holds {unknown[0]}" if unknown else None


def _directions_differ(node: NodeContext) -> str | None:
    names, gates = node.attribute("activations", []), _GATES[node.operator]
    if node.attribute("direction", "forward") == "bidirectional" and names and names[:gates] != names[gates:]:
        return f"activations are {names[:gates]} forward and {names[gates:]} backward"
    return None


def _topk_size(node: NodeContext) -> str | None:
    count = node.constant(1) if node.opset >= 10 else node.attribute("k")
    if count is None:
        return None
    largest = int(np.max(np.asarray(count), initial=0))
    return f"K is {largest}; {_TOPK_LIMIT} is the most" if largest > _TOPK_LIMIT else None


def _einsum(node: NodeContext) -> tuple[list[str], str]:
    equation = node.attribute("equation", "").replace(" ", "")
    return equation.split("->")[0].split(","), equation


def _einsum_characters(node: NodeContext) -> str | None:
    _, equation = _einsum(node)
    wrong = sorted(set(equation) - set("abcdefghijklmnopqrstuvwxyz->.,"))
    return f"the equation {equation!r} holds {', '.join(wrong)}" if wrong else None


def _einsum_diagonal(node: NodeContext) -> str | None:
    for term in _einsum(node)[0]:
        letters = term.replace(".", "")
        if len(set(letters)) < len(letters):
            return f"{term!r} repeats an index"
    return None


def _einsum_broadcast(node: NodeContext) -> str | None:
    sizes: dict[str, int] = {}
    terms = _einsum(node)[0]
    for index, term in enumerate(terms):
        shape = node.shape(index)
        if shape is None or "." in term or len(shape) != len(term):
            continue
        for letter, size in zip(term, shape, strict=True):
            if size is not None and sizes.setdefault(letter, size) != size:
                return f"index {letter} has sizes {sizes[letter]} and {size}"
    return None


def _reduced_axes(node: NodeContext) -> list[int] | None:
    """Return the axes of a reduction as non-negative numbers, or None where they are unknown."""
    rank, given = node.rank(0), node.attribute("axes")
    if given is None and node.input(1) is not None:
        array = node.constant(1)
        if array is None:
            return None
        given = array.ravel().tolist()
    if rank is None:
        return None
    return sorted(axis % rank for axis in given) if given else list(range(rank))


def _log_sum_exp(node: NodeContext) -> str | None:
    if node.opset < 18 or node.input(1) is None:
        return None
    axes, rank = _reduced_axes(node), node.rank(0)
    if axes is None or rank is None:
        return "its axes are an input, which the importer drops: it reduces over all axes"
    return None if axes == list(range(rank)) else f"it reduces over all axes instead of {axes}"


def _group_norm(node: NodeContext) -> str | None:
    if node.opset < 21:
        return None
    groups, channels = node.attribute("num_groups"), node.size(0, 1)
    return None if channels is not None and groups == channels else "its scale per channel is read per group"


def _norm_rank(node: NodeContext) -> str | None:
    rank = node.rank(0)
    return f"its input has {rank} axes; it needs 3" if rank is not None and rank < 3 else None


def _batch_norm_types(node: NodeContext) -> str | None:
    kinds = [kind for kind in (node.type(index) for index in range(5)) if kind is not None]
    return f"its inputs are {', '.join(map(str, dict.fromkeys(kinds)))}" if len(set(kinds)) > 1 else None


def _eye_like(node: NodeContext) -> str | None:
    shape = node.shape(0)
    if shape is None:
        return None
    if len(shape) != 2:
        return f"its input has {len(shape)} axes"
    return "the sizes of its input are not fixed" if None in shape else None


def _scatter_reduction(node: NodeContext) -> str | None:
    value = node.attribute("reduction", "none")
    return f"reduction is {value}" if value != "none" else None


def _scatter_ranks(node: NodeContext) -> str | None:
    ranks = [rank for rank in (node.rank(index) for index in range(3)) if rank is not None]
    return f"its inputs have {ranks} axes" if len(set(ranks)) > 1 else None


def _slice_starts(node: NodeContext) -> str | None:
    if node.opset < 10 or node.input(3) is not None:
        return None
    rank, length = node.rank(0), node.size(1, 0)
    if rank is None or length is None or length == rank:
        return None
    shape = node.shape(0)
    inputs = [node.input(index) for index in range(1, len(node.node.inputs))]
    fast = node.type(1) == ir.DataType.INT32 and all(is_weights(value) for value in inputs)
    if fast and shape is not None and None not in shape:
        return None  # the importer's way for INT32 constants takes it
    return f"{length} starts without axes for a tensor of {rank} axes"


def _vector_times_stack(node: NodeContext) -> str | None:
    if node.rank(0) != 1 or (node.rank(1) or 0) < 3 or node.size(1, 0) == 1:
        return None
    return f"a vector times a tensor of {node.rank(1)} axes"


def _integer_power(node: NodeContext) -> str | None:
    for index, name in ((0, "base"), (1, "exponent")):
        kind = node.type(index)
        if kind in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL):
            return f"its {name} is {kind}"
    return None


def _integer_base(node: NodeContext) -> str | None:
    kind = node.type(0)
    return f"its base is {kind}" if kind in (ir.DataType.INT32, ir.DataType.INT64) else None


def _squeeze_all(node: NodeContext) -> str | None:
    if node.input(1) is not None or node.has("axes"):
        return None
    shape = node.shape(0)
    return "no axes are given and the shape is not fixed" if shape is not None and None in shape else None


def _gemm_rank(node: NodeContext) -> str | None:
    for index in (0, 1):
        rank = node.rank(index)
        if rank is not None and rank != 2:
            return f"input {index} has {rank} axes"
    return None


def _unknown_length(node: NodeContext) -> str | None:
    """Find a shape that is itself an input of the graph with an unknown number of entries."""
    value = node.input(1)
    while value is not None and (producer := value.producer()) is not None and producer.op_type in ("Cast", "Identity"):
        value = producer.inputs[0]
    if value is None or value.producer() is not None or not value.is_graph_input() or value.is_initializer():
        return None
    shape = shape_of(value)
    return "the length of its shape is not fixed" if shape == (None,) else None


def _baked_size(node: NodeContext) -> str | None:
    """Find a reshape to fixed sizes of a tensor that has a size which the caller of the network chooses."""
    value, target = node.input(0), node.constant(1)
    if value is None or value.shape is None or target is None:
        return None
    if np.any(target == -1) or (np.any(target == 0) and not node.attribute("allowzero", 0)):
        return None
    graph = node.node.graph
    inputs = graph.inputs if isinstance(graph, ir.Graph) else ()
    chosen = {str(size) for item in inputs for size in item.shape or () if not isinstance(size, int)} - {"None", ""}
    found = [str(size) for size in value.shape if not isinstance(size, int) and str(size) in chosen]
    return f"{value.name} varies with {found[0]} and is given the fixed shape {target.tolist()}" if found else None


def _training(node: NodeContext) -> str | None:
    if node.operator == "BatchNormalization":
        return "training_mode is 1" if node.attribute("training_mode", 0) else None
    if node.is_computed(2):
        return "training_mode is computed in the graph"
    mode = node.constant(2)
    return "training_mode is true" if mode is not None and bool(np.any(mode)) else None


def _constant_form(node: NodeContext) -> str | None:
    wrong = [name for name in ("sparse_value", "value_string", "value_strings") if node.has(name)]
    return f"it holds a {wrong[0]}" if wrong else None


def _fill_type(node: NodeContext) -> str | None:
    tensor = node.attribute("value")
    return "it fills with UINT8" if tensor is not None and tensor.dtype == ir.DataType.UINT8 else None


def _random_type(node: NodeContext) -> str | None:
    kind = node.attribute("dtype")
    if kind is not None and kind not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"dtype is {ir.DataType(kind)}"
    return None


def _negative_pads(node: NodeContext) -> str | None:
    pads = node.constant(1)
    return f"pads holds {int(pads.min())}" if pads is not None and pads.size and pads.min() < 0 else None


def _cast_type(node: NodeContext) -> str | None:
    kind = node.attribute("to")
    quantised = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4}
    return f"it casts to {ir.DataType(kind)}" if kind in quantised else None


def _attention_form(node: NodeContext) -> str | None:
    unsupported = {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}
    given = [name for index, name in unsupported.items() if node.input(index) is not None]
    if given:
        return f"{given[0]} is given"
    if sum(bool(value.name) for value in node.node.outputs) > 1:
        return "it has more than one output"
    if node.attribute("softcap", 0.0):
        return f"softcap is {node.attribute('softcap'):g}"
    return "softmax_precision is written" if node.has("softmax_precision") else None


def _attention_rank(node: NodeContext) -> str | None:
    rank = node.rank(0)
    return f"its query has {rank} axes" if rank is not None and rank != 4 else None


def _branch_count(node: NodeContext) -> str | None:
    counts = {len(body.outputs) for _, body in node.bodies()}
    return "its branches give different numbers of outputs" if len(counts) > 1 else None


def _branch_ranks(node: NodeContext) -> str | None:
    condition = node.constant(0)
    if condition is not None:
        return None  # only one branch is imported
    branches = [body.outputs for _, body in node.bodies()]
    if len(branches) != 2:
        return None
    for first, second in zip(*branches, strict=False):
        left, right = shape_of(first), shape_of(second)
        if left is not None and right is not None and len(left) != len(right):
            return f"{first.name} has {len(left)} axes and {second.name} has {len(right)}"
    return None


def _carried_shapes(node: NodeContext) -> str | None:
    body = dict(node.bodies()).get("body")
    if body is None or node.operator != "Loop":
        return None
    for index in range(2, len(node.node.inputs)):
        if index - 1 >= len(body.outputs):
            break
        before, after = node.shape(index), shape_of(body.outputs[index - 1])
        if before is None or after is None:
            continue
        if len(before) != len(after) or any(
            a != b for a, b in zip(before, after, strict=True) if a is not None and b is not None
        ):
            return f"{body.outputs[index - 1].name} leaves an iteration as {after} and enters the loop as {before}"
    return None


def _scan_length(node: NodeContext) -> str | None:
    body = dict(node.bodies()).get("body")
    if body is None:
        return None
    collected = len(body.outputs) - 1 - (len(node.node.inputs) - 2)
    if collected <= 0:
        return None
    trips = node.constant(0)
    limit = np.iinfo(np.int32).max
    if node.input(0) is None or (trips is not None and int(np.max(trips)) >= limit):
        return "it collects an output in each iteration, and has no trip count: the length is taken as 1024"
    result = body.outputs[0]
    producer = result.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
        result, producer = producer.inputs[0], producer.inputs[0].producer()
    passed = result in body.inputs[1:2] or is_weights(result)
    return None if passed else "it may end early, and what it collects has the length of the trip count then too"


_CONSTANT = "Make it an initializer: fold constants with `polygraphy surgeon sanitize --fold-constants`."

RULES: tuple[Rule, ...] = (
    NodeRule(
        id="grid-sample-rank",
        title="GridSample takes four axes only",
        severity=Severity.REJECTED,
        remedy="Sample volumes slice by slice, or gather the corners yourself.",
        source=f"{TABLE}; {OBSERVATIONS}",
        mark=Mark.HEADER,
        operators=frozenset({"GridSample"}),
        find=_grid_sample,
    ),
    NodeRule(
        id="resize-antialias",
        title="Resize without antialias only",
        severity=Severity.REJECTED,
        remedy="Export interpolation with antialias=False, or write the filter as a convolution.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Resize"}),
        find=_value("antialias", 0, bool),
    ),
    NodeRule(
        id="resize-aspect",
        title="Resize stretches only",
        severity=Severity.REJECTED,
        remedy="Give the sizes that keep the aspect ratio.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Resize"}),
        find=_one_of("keep_aspect_ratio_policy", "stretch", ("stretch",)),
    ),
    NodeRule(
        id="resize-coordinates",
        title="coordinate transformation that Resize does not have",
        severity=Severity.REJECTED,
        remedy="Use half_pixel, pytorch_half_pixel, align_corners, asymmetric or tf_half_pixel_for_nn.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Resize"}),
        find=_one_of(
            "coordinate_transformation_mode",
            "half_pixel",
            ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn"),
        ),
    ),
    NodeRule(
        id="resize-rounding",
        title="tf_half_pixel_for_nn rounds in one way only",
        severity=Severity.REJECTED,
        remedy="Use nearest_mode round_prefer_floor, or another coordinate transformation.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Resize"}),
        find=_resize_rounding,
    ),
    NodeRule(
        id="resize-mode",
        title="interpolation mode that the parser does not have",
        severity=Severity.REJECTED,
        remedy="Use nearest, linear or cubic.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Resize"}),
        find=_one_of("mode", "nearest", ("nearest", "linear", "cubic")),
    ),
    NodeRule(
        id="resize-outer-axes",
        title="Resize interpolates in the last axes only",
        severity=Severity.REJECTED,
        remedy="Transpose so that the scaled axes are the last ones.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Resize"}),
        find=_resize_scales,
    ),
    NodeRule(
        id="resize-axes",
        title="Resize with axes that the importer cannot place",
        severity=Severity.REJECTED,
        remedy="Give constant scales, or sizes, for every axis.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=frozenset({"Resize"}),
        find=_resize_axes,
    ),
    NodeRule(
        id="pool-ceil-mode",
        title="pooling counts a window that lies in the padding",
        severity=Severity.ATTENTION,
        remedy="Use ceil_mode=False with explicit padding, or an input size that the stride divides.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=POOLS,
        find=_pool_ceil,
    ),
    NodeRule(
        id="pool-dilations",
        title="pooling without dilation only",
        severity=Severity.REJECTED,
        remedy="Take strided slices before pooling.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=POOLS,
        find=_pool_dilations,
    ),
    NodeRule(
        id="pool-rank",
        title="pooling in up to three axes only",
        severity=Severity.REJECTED,
        remedy="Reshape so that at most three axes are pooled.",
        source=PARSER,
        mark=Mark.CODE,
        operators=POOLS,
        find=_window_rank,
    ),
    NodeRule(
        id="norm-order",
        title="L1 and L2 only",
        severity=Severity.REJECTED,
        remedy="Write it with Abs, Pow and ReduceSum.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"LpNormalization", "LpPool"}),
        find=_value("p", 2, lambda order: order not in (1, 2)),
    ),
    NodeRule(
        id="convolution-rank",
        title="convolution in one to three axes only",
        severity=Severity.REJECTED,
        remedy="Reshape so that one to three axes are convolved.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Conv", "ConvTranspose"}),
        find=_convolution_rank,
    ),
    NodeRule(
        id="auto-pad-and-pads",
        title="auto_pad and pads at once",
        severity=Severity.REJECTED,
        remedy="Remove one of the two.",
        source=PARSER,
        mark=Mark.CODE,
        operators=POOLS | {"Conv", "ConvTranspose"},
        find=_auto_pad,
    ),
    NodeRule(
        id="convolution-runtime-weight",
        title="convolution whose weight is not a constant",
        severity=Severity.REJECTED,
        remedy="Write the attribute kernel_shape on the node, or make weight and bias initializers.",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.4",
        mark=Mark.OBSERVED,
        before=(10, 4),
        operators=frozenset({"Conv"}),
        find=_runtime_kernel,
    ),
    NodeRule(
        id="convolution-channels",
        title="convolution over an unknown number of channels",
        severity=Severity.REJECTED,
        remedy="Fix the channel axis of the input; batch, height and width may vary.",
        source=f"{HEADERS}; {OBSERVATIONS}",
        mark=Mark.HEADER,
        operators=frozenset({"Conv", "ConvTranspose"}),
        find=_unknown_channels,
    ),
    NodeRule(
        id="recurrent-layout",
        title="layout is ignored: batch and time are taken the wrong way round",
        severity=Severity.ATTENTION,
        remedy="Use layout 0 and transpose around the node: export with batch_first=False.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"LSTM", "GRU", "RNN"}),
        find=_value("layout", 0, bool),
    ),
    NodeRule(
        id="lstm-input-forget",
        title="LSTM without coupled gates only",
        severity=Severity.REJECTED,
        remedy="Use input_forget 0.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=frozenset({"LSTM"}),
        find=_value("input_forget", 0, bool),
    ),
    NodeRule(
        id="recurrent-activation",
        title="activation that recurrent layers do not have",
        severity=Severity.REJECTED,
        remedy="Use one of Relu, Tanh, Sigmoid, LeakyRelu, ThresholdedRelu, ScaledTanh, HardSigmoid, Elu, Softsign, "
        "Softplus, spelt so.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"LSTM", "GRU", "RNN"}),
        find=_recurrent_activations,
    ),
    NodeRule(
        id="recurrent-directions",
        title="both directions need the same activations",
        severity=Severity.REJECTED,
        remedy="Split it into one layer for each direction.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=frozenset({"LSTM", "GRU", "RNN"}),
        find=_directions_differ,
    ),
    NodeRule(
        id="topk-size",
        title="TopK of too many",
        severity=Severity.REJECTED,
        remedy=f"Keep K at {_TOPK_LIMIT} or below.",
        source=f"{TABLE}; {OBSERVATIONS}",
        mark=Mark.HEADER,
        operators=frozenset({"TopK"}),
        find=_topk_size,
    ),
    NodeRule(
        id="topk-sorted",
        title="TopK sorts whether asked or not",
        severity=Severity.ADVICE,
        remedy="Nothing, unless something relies on the order of the input.",
        source=f"{TABLE}; {PARSER}",
        mark=Mark.CODE,
        operators=frozenset({"TopK"}),
        find=_value("sorted", 1, lambda value: not value),
    ),
    NodeRule(
        id="einsum-letters",
        title="Einsum takes lower-case letters only",
        severity=Severity.REJECTED,
        remedy="Write the equation in lower case.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Einsum"}),
        find=_einsum_characters,
    ),
    NodeRule(
        id="einsum-diagonal",
        title="Einsum does not take diagonals",
        severity=Severity.REJECTED,
        remedy="Take the diagonal with Gather, or multiply by an identity matrix and sum.",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.12",
        mark=Mark.HEADER,
        before=(10, 12),
        operators=frozenset({"Einsum"}),
        find=_einsum_diagonal,
    ),
    NodeRule(
        id="einsum-broadcast",
        title="Einsum does not broadcast",
        severity=Severity.REJECTED,
        remedy="Expand the smaller operand first.",
        source=f"{TABLE}; {CHANGES}, 10.12",
        mark=Mark.DOCUMENTED,
        before=(10, 12),
        operators=frozenset({"Einsum"}),
        find=_einsum_broadcast,
    ),
    NodeRule(
        id="reduce-axes",
        title="axes of a reduction have to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=REDUCTIONS - {"ReduceLogSumExp"},
        find=_computed(1, "the list of axes"),
    ),
    NodeRule(
        id="reduce-log-sum-exp-computed-axes",
        title="axes of a reduction have to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        since=(10, 15),
        operators=frozenset({"ReduceLogSumExp"}),
        find=_computed(1, "the list of axes"),
    ),
    NodeRule(
        id="reduce-log-sum-exp",
        title="ReduceLogSumExp loses its axes",
        severity=Severity.ATTENTION,
        remedy="Export at opset 17, or write it as max + log(ReduceSum(exp(x - max))).",
        source=f"{OBSERVATIONS}; {PARSER}, 10.15",
        mark=Mark.OBSERVED,
        before=(10, 15),
        unverified="10.11 to 10.14",
        operators=frozenset({"ReduceLogSumExp"}),
        find=_log_sum_exp,
    ),
    NodeRule(
        id="group-norm-21",
        title="GroupNormalization of opset 21 is read as that of opset 18",
        severity=Severity.ATTENTION,
        remedy="Export at opset 18 to 20, where torch writes elementary operators.",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.9",
        mark=Mark.OBSERVED,
        before=(10, 9),
        operators=frozenset({"GroupNormalization"}),
        find=_group_norm,
    ),
    NodeRule(
        id="norm-rank",
        title="normalisation needs a batch, a channel and another axis",
        severity=Severity.REJECTED,
        remedy="Add an axis of size 1 before it, and remove it afterwards.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"GroupNormalization", "InstanceNormalization"}),
        find=_norm_rank,
    ),
    NodeRule(
        id="batch-norm-types",
        title="BatchNormalization of mixed types",
        severity=Severity.REJECTED,
        remedy="Give its parameters the type of its input.",
        source=f"{CHANGES}, 10.7; {PARSER}",
        mark=Mark.CODE,
        before=(10, 7),
        operators=frozenset({"BatchNormalization"}),
        find=_batch_norm_types,
    ),
    NodeRule(
        id="training-mode",
        title="inference only",
        severity=Severity.REJECTED,
        remedy="Export the model in evaluation mode.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=frozenset({"BatchNormalization", "Dropout"}),
        find=_training,
    ),
    NodeRule(
        id="eye-like-dynamic",
        title="EyeLike needs a fixed matrix shape",
        severity=Severity.REJECTED,
        remedy="Compare two Range vectors with Equal, as torch's dynamo exporter does, or fix the size.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"EyeLike"}),
        find=_eye_like,
    ),
    NodeRule(
        id="scatter-nd-attribute",
        title="ScatterND without the attribute reduction only",
        severity=Severity.REJECTED,
        remedy='Remove the attribute where it is "none", or write the assignment with Where or Concat.',
        source=f"{OBSERVATIONS}; {CHANGES}, 10.9",
        mark=Mark.OBSERVED,
        before=(10, 9),
        operators=frozenset({"ScatterND"}),
        find=lambda node: "the attribute reduction is written" if node.has("reduction") else None,
    ),
    NodeRule(
        id="scatter-nd-reduction",
        title="ScatterND assigns only",
        severity=Severity.REJECTED,
        remedy="Write it with a one-hot matrix product, or as ScatterElements.",
        source=f"{OBSERVATIONS}; {TABLE}",
        mark=Mark.OBSERVED,
        since=(10, 9),
        operators=frozenset({"ScatterND"}),
        find=_scatter_reduction,
    ),
    NodeRule(
        id="scatter-ranks",
        title="ScatterElements needs inputs of one rank",
        severity=Severity.REJECTED,
        remedy="Reshape indices and updates to the rank of the data.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Scatter", "ScatterElements"}),
        find=_scatter_ranks,
    ),
    NodeRule(
        id="slice-starts",
        title="Slice without axes needs a start for every axis",
        severity=Severity.REJECTED,
        remedy="Write the axes input.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Slice"}),
        find=_slice_starts,
    ),
    NodeRule(
        id="slice-axes",
        title="axes of Slice have to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {CHANGES}, 10.3",
        mark=Mark.CODE,
        before=(10, 3),
        operators=frozenset({"Slice"}),
        find=_computed(3, "the list of axes"),
    ),
    NodeRule(
        id="squeeze-axes",
        title="axes of Squeeze and Unsqueeze have to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {CHANGES}, 10.7",
        mark=Mark.CODE,
        before=(10, 7),
        operators=frozenset({"Squeeze", "Unsqueeze"}),
        find=_computed(1, "the list of axes"),
    ),
    NodeRule(
        id="squeeze-unknown",
        title="Squeeze of an unknown shape needs axes",
        severity=Severity.REJECTED,
        remedy="Write the axes input.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Squeeze"}),
        find=_squeeze_all,
    ),
    NodeRule(
        id="pad-axes",
        title="axes of Pad have to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {CHANGES}, 10.4",
        mark=Mark.CODE,
        before=(10, 4),
        operators=frozenset({"Pad"}),
        find=_computed(3, "the list of axes"),
    ),
    NodeRule(
        id="pad-negative",
        title="Pad does not crop",
        severity=Severity.REJECTED,
        remedy="Use Slice for the axes that shrink.",
        source=f"{PARSER}; {CHANGES}, 10.4",
        mark=Mark.CODE,
        before=(10, 4),
        operators=frozenset({"Pad"}),
        find=_negative_pads,
    ),
    NodeRule(
        id="pad-mode",
        title="padding mode that the parser does not have",
        severity=Severity.REJECTED,
        remedy="Use constant, reflect, edge or wrap.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Pad"}),
        find=_one_of("mode", "constant", ("constant", "reflect", "edge", "wrap")),
    ),
    NodeRule(
        id="cumsum-axis",
        title="axis of CumSum has to be constant",
        severity=Severity.REJECTED,
        remedy=_CONSTANT,
        source=f"{PARSER}; {CHANGES}, 10.8",
        mark=Mark.CODE,
        before=(10, 8),
        operators=frozenset({"CumSum"}),
        find=_computed(1, "the axis"),
    ),
    NodeRule(
        id="matmul-vector",
        title="MatMul squeezes the wrong axis",
        severity=Severity.REJECTED,
        remedy="Add an axis to the vector and remove it from the result.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"MatMul"}),
        find=_vector_times_stack,
    ),
    NodeRule(
        id="gemm-rank",
        title="Gemm takes matrices only",
        severity=Severity.REJECTED,
        remedy="Use MatMul.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Gemm"}),
        find=_gemm_rank,
    ),
    NodeRule(
        id="blocks-rank",
        title="blocks are moved in NCHW only",
        severity=Severity.REJECTED,
        remedy="Reshape to four axes.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"DepthToSpace", "SpaceToDepth"}),
        find=_rank(0, (4,)),
    ),
    NodeRule(
        id="power-integer",
        title="Pow of integers",
        severity=Severity.REJECTED,
        remedy="Cast base and exponent to FP32; write squares as Mul.",
        source=f"{PARSER}; {CHANGES}, 10.8",
        mark=Mark.CODE,
        before=(10, 8),
        operators=frozenset({"Pow"}),
        find=_integer_power,
    ),
    NodeRule(
        id="power-integer-base",
        title="Pow of an integer base",
        severity=Severity.REJECTED,
        remedy="Cast the base to FP32.",
        source=f"{CHANGES}, 10.12",
        mark=Mark.DOCUMENTED,
        since=(10, 8),
        before=(10, 12),
        operators=frozenset({"Pow"}),
        find=_integer_base,
    ),
    NodeRule(
        id="mod-float",
        title="Mod of floats needs fmod",
        severity=Severity.REJECTED,
        remedy="Set the attribute fmod to 1 (the sign of the result follows the dividend then).",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Mod"}),
        find=lambda node: (
            "fmod is 0"
            if not node.attribute("fmod", 0) and (kind := node.type(0)) is not None and kind.is_floating_point()
            else None
        ),
    ),
    NodeRule(
        id="shape-length",
        title="shape of unknown length",
        severity=Severity.REJECTED,
        remedy="Fix the number of entries of the shape input.",
        source=OBSERVATIONS,
        mark=Mark.HEADER,
        operators=frozenset({"Reshape", "Expand", "ConstantOfShape", "Tile"}),
        find=_unknown_length,
    ),
    NodeRule(
        id="reshape-fixed",
        title="fixed shape for a tensor of varying size",
        severity=Severity.ATTENTION,
        remedy="Export with torch.onnx.export(dynamo=True), which keeps the size in the graph.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        operators=frozenset({"Reshape"}),
        find=_baked_size,
    ),
    NodeRule(
        id="constant-form",
        title="constant that is sparse or text",
        severity=Severity.REJECTED,
        remedy="Store it as a dense tensor of numbers.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        operators=frozenset({"Constant"}),
        find=_constant_form,
    ),
    NodeRule(
        id="fill-type",
        title="ConstantOfShape of UINT8",
        severity=Severity.REJECTED,
        remedy="Fill with INT32 or a floating-point type.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"ConstantOfShape"}),
        find=_fill_type,
    ),
    NodeRule(
        id="random-type",
        title="random numbers in FP32 and FP16 only",
        severity=Severity.REJECTED,
        remedy="Draw FP32 numbers and cast them.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}),
        find=_random_type,
    ),
    NodeRule(
        id="random-like-constant",
        title="random numbers in the shape of a constant",
        severity=Severity.REJECTED,
        remedy="Use RandomNormal or RandomUniform with a shape.",
        source=f"{PARSER}; {CHANGES}, 10.11",
        mark=Mark.CODE,
        before=(10, 11),
        operators=frozenset({"RandomNormalLike", "RandomUniformLike"}),
        find=lambda node: "its input is a constant" if is_weights(node.input(0)) else None,
    ),
    NodeRule(
        id="random-seed",
        title="the seed is ignored",
        severity=Severity.ATTENTION,
        remedy="Draw the numbers at export and store them, if they have to be the same every time.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        operators=frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}),
        find=lambda node: "seed is written" if node.has("seed") else None,
    ),
    NodeRule(
        id="cast-quantised",
        title="cast to a quantised type",
        severity=Severity.ATTENTION,
        remedy="Quantise with QuantizeLinear.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        operators=frozenset({"Cast"}),
        find=_cast_type,
    ),
    NodeRule(
        id="attention-form",
        title="part of Attention that TensorRT does not have",
        severity=Severity.REJECTED,
        remedy="Export at opset 22 or earlier, where attention becomes MatMul, Softmax and MatMul.",
        source=f"{TABLE}; {PARSER}",
        mark=Mark.CODE,
        since=(10, 14),
        operators=frozenset({"Attention"}),
        find=_attention_form,
    ),
    NodeRule(
        id="attention-rank",
        title="Attention of four axes only",
        severity=Severity.REJECTED,
        remedy="Reshape queries, keys and values to (batch, heads, length, size).",
        source=f"{TABLE}; {PARSER}, 11.0",
        mark=Mark.DOCUMENTED,
        since=(10, 14),
        before=(11, 0),
        unverified="10.14 to 10.16",
        operators=frozenset({"Attention"}),
        find=_attention_rank,
    ),
    NodeRule(
        id="attention-fused",
        title="Attention fails to build where no fused kernel fits",
        severity=Severity.ATTENTION,
        remedy="Build with decomposable attention (trtexec --decomposableAttentions), or export at opset 22 or before.",
        source=f"{PARSER}; TensorRT documentation, fused attention",
        mark=Mark.DOCUMENTED,
        since=(10, 14),
        operators=frozenset({"Attention"}),
        find=lambda node: None if node.attribute("TRT_decomposable", 0) else "it is imported as one fused layer",
    ),
    NodeRule(
        id="branch-outputs",
        title="branches of If that do not match",
        severity=Severity.REJECTED,
        remedy="Let both branches give the same outputs.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"If"}),
        find=_branch_count,
    ),
    NodeRule(
        id="branch-ranks",
        title="branches of If that give different ranks",
        severity=Severity.REJECTED,
        remedy="Reshape in one branch, or decide at export which branch is used.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        operators=frozenset({"If"}),
        find=_branch_ranks,
    ),
    NodeRule(
        id="loop-shapes",
        title="loop that changes the shape of what it carries",
        severity=Severity.REJECTED,
        remedy="Carry a tensor of the final size and write into it.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        operators=frozenset({"Loop"}),
        find=_carried_shapes,
    ),
    NodeRule(
        id="loop-scan-length",
        title="loop that collects an unknown number of results",
        severity=Severity.ATTENTION,
        remedy="Give a trip count and run the loop to its end.",
        source=f"{TABLE}; {PARSER}",
        mark=Mark.CODE,
        operators=frozenset({"Loop"}),
        find=_scan_length,
    ),
)
