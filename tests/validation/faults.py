"""Realistic faults of exports, passes and hands, declared once: what they imitate and what they do to a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from fault_editor import Editor, NotApplicableError

Transform = Callable[[Editor], None]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: unique name.
        imitates: the mistake that it stands for.
        transform: damages a graph and records the modules whose computation is wrong now.
        precisions: forms of which the fault is typical; others may suffer it as well.
    """

    name: str
    imitates: str
    transform: Transform
    precisions: tuple[str, ...] = ("fp32",)


@dataclass(frozen=True)
class Injection:
    """A damaged form.

    Attributes:
        fault: what was injected.
        model: the damaged form.
        modules: innermost modules whose computation is wrong now; `""` stands for the network itself.
    """

    fault: Fault
    model: onnx.ModelProto
    modules: frozenset[str] = field(default_factory=frozenset)


FAULTS: dict[str, Fault] = {}


def fault(imitates: str, *precisions: str) -> Callable[[Transform], Transform]:
    """Declare a fault; its name is the function's."""

    def declare(transform: Transform) -> Transform:
        name = transform.__name__.strip("_").replace("_", "-")
        assert name not in FAULTS
        FAULTS[name] = Fault(name, imitates, transform, precisions or ("fp32",))
        return transform

    return declare


def inject(
    kind: Fault, model: onnx.ModelProto, weights: Mapping[str, np.ndarray], epsilons: Mapping[str, float]
) -> Injection | None:
    """Damage a form; None where it holds nothing that the fault could befall.

    Args:
        kind: the fault.
        model: clean form; not modified.
        weights: the torch network's parameters and buffers by name.
        epsilons: of its normalisations, by module.
    """
    editor = Editor(model, weights, epsilons)
    try:
        kind.transform(editor)
    except NotApplicableError:
        return None
    # Rewiring may leave a node in front of one that it reads; no exporter writes that.
    model = ir.from_proto(editor.model)
    model.graph.sort()
    return Injection(kind, ir.to_proto(model), frozenset(editor.touched))


# Attention -------------------------------------------------------------------------------------------


def _attention(edit: Editor) -> tuple[onnx.NodeProto, list[onnx.NodeProto]]:
    """Return the first Softmax, and all nodes of its module's call."""
    softmax = edit.one("Softmax")
    scopes = _leaf(softmax)
    return softmax, [
        node for node in edit.graph.node if _leaf(node) == scopes or edit.owner(node) == edit.owner(softmax)
    ]


def _leaf(node: onnx.NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")


def _energies(edit: Editor) -> list[onnx.NodeProto]:
    """Return the products of queries and keys in front of the first Softmax."""
    softmax, nodes = _attention(edit)
    found, pending = [], [softmax.input[0]]
    while pending:
        node = edit.producer(pending.pop())
        if node is None or node not in nodes:
            continue
        if node.op_type == "MatMul":
            found.append(node)
        else:
            pending.extend(node.input)
    if not found:
        raise NotApplicableError("no product in front of the Softmax")
    return found


def _entry(edit: Editor, tensor: str, module: str) -> str:
    """Follow a tensor back to where it enters the attention or is split off."""
    while (node := edit.producer(tensor)) is not None and edit.owner(node) == module:
        if node.op_type not in ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity", "Mul"):
            break
        tensor = node.input[0]
    return tensor


@fault("softmax over the wrong axis")
def softmax_axis(edit: Editor) -> None:
    node = edit.one("Softmax")
    edit.set(node, axis=1)


@fault("softmax left out, as when a pattern is fused away")
def softmax_missing(edit: Editor) -> None:
    edit.bypass(edit.one("Softmax"))


@fault("scale of the energies applied twice")
def scale_twice(edit: Editor) -> None:
    for node in _energies(edit):
        edit.behind(node, "Mul", 0.25)


@fault("scale of the energies forgotten")
def scale_forgotten(edit: Editor) -> None:
    for node in _energies(edit):
        edit.behind(node, "Mul", 4.0)


@fault("queries and keys swapped")
def query_key_swapped(edit: Editor) -> None:
    softmax, nodes = _attention(edit)
    energy = _energies(edit)[0]
    query, key = (_entry(edit, name, edit.owner(softmax)) for name in energy.input)
    if edit.shape(query) != edit.shape(key):
        raise NotApplicableError("queries and keys differ in shape")
    edit.swap_reads([node for node in nodes if node.op_type not in ("Split",)], query, key)


@fault("attention map used without its transposition")
def map_transposed(edit: Editor) -> None:
    softmax, nodes = _attention(edit)
    behind = {softmax.output[0]}
    for node in nodes:
        if behind & set(node.input):
            if node.op_type == "MatMul":
                perm = None
                slot = next(index for index, name in enumerate(node.input) if name in behind)
                source = edit.producer(node.input[slot])
                assert source is not None
                edit.touch(node)
                if source.op_type == "Transpose":
                    perm = [int(axis) for axis in edit.get(source, "perm") or ()]  # type: ignore[attr-defined]
                if perm is not None:
                    perm[-1], perm[-2] = perm[-2], perm[-1]
                    edit.set(source, perm=perm)
                    return
            behind.update(node.output)
    raise NotApplicableError("the map is not transposed")


@fault("mask of the own position missing: self is counted twice")
def mask_missing(edit: Editor) -> None:
    edit.bypass(edit.one("Where"), slot=2)


@fault("diagonal of the mask shifted by one")
def mask_shifted(edit: Editor) -> None:
    node = edit.one("Where")
    mask = edit.constant(node.input[0])
    if mask is None:
        raise NotApplicableError("the mask is not stored")
    edit.store(node, 0, np.roll(mask, 1, axis=-1))


@fault("mask inverted")
def mask_inverted(edit: Editor) -> None:
    node = edit.one("Where")
    node.input[1], node.input[2] = node.input[2], node.input[1]


@fault("masked energies set to zero instead of minus infinity")
def mask_value(edit: Editor) -> None:
    node = edit.one("Where", where=edit.stores(1))
    edit.store(node, 1, np.zeros_like(edit.weight(node)))


@fault("one recurrence of the attention too few")
def recurrence_short(edit: Editor) -> None:
    steps: dict[str, list[onnx.NodeProto]] = {}
    for node in edit.all("Softmax"):
        if _leaf(node) not in [_leaf(known) for known in steps.get(edit.owner(node), [])]:
            steps.setdefault(edit.owner(node), []).append(node)
    module, calls = next(((owner, nodes) for owner, nodes in steps.items() if len(nodes) > 1), ("", []))
    if not calls:
        raise NotApplicableError("the attention is applied once")
    leaf = _leaf(calls[-1])
    last = [node for node in edit.graph.node if _leaf(node) == leaf][-1]
    before = [node for node in edit.graph.node if _leaf(node) == _leaf(calls[0])][-1]
    edit.touched = {module.rpartition(".")[0], module}
    for reader in edit.readers(last.output[0]):
        reader.input[:] = [before.output[0] if name == last.output[0] else name for name in reader.input]
    used = {value.name for value in edit.graph.output}
    for node in reversed(list(edit.graph.node)):
        if used & set(node.output):
            used.update(node.input)
        else:
            edit.graph.node.remove(node)


@fault("values from the wrong projection")
def value_from_key(edit: Editor) -> None:
    softmax, nodes = _attention(edit)
    module = edit.owner(softmax)
    key = _entry(edit, _energies(edit)[0].input[0], module)
    behind = {softmax.output[0]}
    for node in nodes:
        if not behind & set(node.input):
            continue
        behind.update(node.output)
        values = [_entry(edit, name, module) for name in node.input if node.op_type == "MatMul" and name not in behind]
        for value in values:
            readers = [reader for reader in edit.readers(value) if reader in nodes]
            if value != key and edit.shape(value) == edit.shape(key) and readers:
                edit.touch(*readers)
                for reader in readers:
                    reader.input[:] = [key if name == value else name for name in reader.input]
                return
    raise NotApplicableError("no value of the shape of a key")


@fault("height and width swapped where a flattened map is unfolded")
def height_width_swapped(edit: Editor) -> None:
    def unfolds(node: onnx.NodeProto) -> bool:
        shape = edit.constant(node.input[1])
        return shape is not None and shape.size == 4 and shape[2] != shape[3] and bool((shape[2:] > 1).all())

    node = edit.one("Reshape", where=unfolds)
    shape = edit.constant(node.input[1])
    assert shape is not None
    edit.store(node, 1, shape[[0, 1, 3, 2]])
    edit.behind(node, "Transpose", perm=[0, 1, 3, 2])


@fault("rows attended where columns should be")
def rows_for_columns(edit: Editor) -> None:
    node = edit.one("Concat", where=lambda item: "energy" in item.name)
    softmax = edit.producer(edit.readers(node.output[0])[0].output[0])
    assert softmax is not None
    slices = [item for item in edit.graph.node if item.op_type == "Slice" and softmax.output[0] in item.input]
    if len(slices) != 2:
        raise NotApplicableError("the map is not cut in two")
    node.input[0], node.input[1] = node.input[1], node.input[0]


@fault("heads merged in the wrong order")
def heads_merged(edit: Editor) -> None:
    softmax, nodes = _attention(edit)
    place = nodes.index(softmax)
    found = [node for node in nodes[place:] if node.op_type == "Transpose" and len(edit.get(node, "perm") or ()) == 4]  # type: ignore[arg-type]
    if not found or len(_energies(edit)) > 1:
        raise NotApplicableError("no heads are merged")
    node = found[-1]
    edit.touch(node)
    edit.set(node, perm=[0, 1, 2, 3])


@fault("position embedding forgotten")
def position_forgotten(edit: Editor) -> None:
    edit.bypass(edit.one("Add", where=lambda node: edit.stores()(node) and edit.constant(node.input[1]).ndim == 3))  # type: ignore[union-attr]


# Gates and branches ----------------------------------------------------------------------------------


def _is_gate(edit: Editor, node: onnx.NodeProto) -> bool:
    return any((source := edit.producer(name)) is not None and source.op_type == "Sigmoid" for name in node.input)


def _gate_slot(edit: Editor, node: onnx.NodeProto) -> int:
    sources = [edit.producer(name) for name in node.input]
    return next(slot for slot, source in enumerate(sources) if source is not None and source.op_type == "Sigmoid")


@fault("gate forgotten")
def gate_forgotten(edit: Editor) -> None:
    node = edit.one("Mul", where=lambda item: _is_gate(edit, item))
    edit.bypass(node, slot=1 - _gate_slot(edit, node))


@fault("gate applied twice")
def gate_twice(edit: Editor) -> None:
    node = edit.one("Mul", where=lambda item: _is_gate(edit, item))
    edit.behind(node, "Mul", node.input[_gate_slot(edit, node)])


@fault("sigmoid of a gate forgotten")
def sigmoid_forgotten(edit: Editor) -> None:
    edit.bypass(edit.one("Sigmoid"))


@fault("hard sigmoid instead of sigmoid")
def hard_sigmoid(edit: Editor) -> None:
    edit.become(edit.one("Sigmoid"), "HardSigmoid", alpha=1 / 6, beta=0.5)


@fault("residual connection forgotten")
def residual_forgotten(edit: Editor) -> None:
    edit.bypass(edit.one("Add", where=lambda node: not edit.stores()(node)))


@fault("residual added twice")
def residual_twice(edit: Editor) -> None:
    node = edit.one("Add", where=lambda item: not edit.stores()(item))
    edit.behind(node, "Add", node.input[1])


@fault("residual subtracted")
def residual_sign(edit: Editor) -> None:
    edit.become(edit.one("Add", where=lambda node: not edit.stores()(node)), "Sub")


@fault("residual taken from behind the activation instead of before it, or the other way round")
def residual_source(edit: Editor) -> None:
    for node in edit.all("Add", where=lambda item: not edit.stores()(item)):
        source = edit.producer(node.input[1])
        if source is not None and source.op_type == "Relu":
            edit.touch(node)
            node.input[1] = source.input[0]
            return
    raise NotApplicableError("no residual comes from a ReLU")


@fault("branches concatenated in the wrong order")
def concat_order(edit: Editor) -> None:
    node = edit.one("Concat", where=lambda item: len(item.input) > 1 and edit.get(item, "axis") == 1)
    node.input[:] = list(reversed(node.input))


@fault("one branch concatenated twice, another one lost")
def concat_repeated(edit: Editor) -> None:
    node = edit.one("Concat", where=lambda item: len(item.input) > 2 and edit.get(item, "axis") == 1)
    node.input[-1] = node.input[-2]


@fault("reference and query frame swapped")
def frames_swapped(edit: Editor) -> None:
    names = [value.name for value in edit.graph.input]
    if len(names) != 2:
        raise NotApplicableError("one input")
    edit.swap_reads(list(edit.graph.node), *names)


@fault("outputs swapped")
def outputs_swapped(edit: Editor) -> None:
    names = [value.name for value in edit.graph.output]
    if len(names) != 2:
        raise NotApplicableError("one output")
    first, second = (edit.producer(name) for name in names)
    assert first is not None
    assert second is not None
    edit.touch(first, second)
    first.input[0], second.input[0] = second.input[0], first.input[0]
    order = sorted((first, second), key=lambda node: len(node.output[0]))
    for node in order:
        edit.graph.node.remove(node)
    edit.graph.node.extend(order)


# Convolutions and linear layers ----------------------------------------------------------------------


@fault("stale weights of one layer, from an earlier checkpoint")
def stale_weights(edit: Editor) -> None:
    nodes = edit.all("Conv", where=edit.stores())
    node = nodes[len(nodes) // 2]
    edit.touch(node)
    weight = edit.weight(node)
    edit.store(node, 1, weight * 0.9 + weight.std() * 0.1 * np.random.default_rng(0).standard_normal(weight.shape))


@fault("bias dropped")
def bias_dropped(edit: Editor) -> None:
    nodes = edit.all("Conv", where=edit.stores(2))
    node = nodes[len(nodes) // 3]
    edit.touch(node)
    del node.input[2:]


@fault("colour channels in the other order")
def colour_order(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores(1, lambda array: array.shape[1] == 3))
    edit.store(node, 1, edit.weight(node)[:, ::-1])


@fault("output channels in another order")
def channel_order(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores(1, lambda array: array.shape[0] > 8), place=3)
    edit.store(node, 1, np.roll(edit.weight(node), 1, axis=0))


@fault("weight of a square layer transposed")
def weight_transposed(edit: Editor) -> None:
    square = edit.stores(1, lambda array: array.ndim >= 2 and array.shape[0] == array.shape[1] > 1)
    node = edit.one("Conv", "MatMul", where=square)
    edit.store(node, 1, np.swapaxes(edit.weight(node), 0, 1))


@fault("kernel mirrored: convolution instead of correlation")
def kernel_mirrored(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores(1, lambda array: array.ndim == 4 and array.shape[-1] > 1), place=1)
    edit.store(node, 1, edit.weight(node)[..., ::-1, ::-1])


@fault("kernel height and width swapped")
def kernel_transposed(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores(1, lambda array: array.ndim == 4 and array.shape[-1] > 1), place=2)
    edit.store(node, 1, np.swapaxes(edit.weight(node), 2, 3))


@fault("dilation lost")
def dilation_lost(edit: Editor) -> None:
    node = edit.one("Conv", where=lambda item: max(edit.get(item, "dilations") or [1]) > 1)  # type: ignore[call-overload]
    edit.set(node, dilations=[1, 1], pads=[1, 1, 1, 1])


@fault("padding of a strided convolution put to one side, as TensorFlow does")
def padding_one_sided(edit: Editor) -> None:
    def strided(node: onnx.NodeProto) -> bool:
        return list(edit.get(node, "strides") or []) == [2, 2] and max(edit.get(node, "pads") or [0]) > 0  # type: ignore[call-overload]

    node = edit.one("Conv", where=strided)
    top, left, bottom, right = edit.get(node, "pads")  # type: ignore[misc]
    edit.set(node, pads=[top - 1, left - 1, bottom + 1, right + 1])


@fault("stride on the first instead of the second convolution of a residual unit")
def stride_moved(edit: Editor) -> None:
    for node in edit.all("Conv", where=lambda item: list(edit.get(item, "strides") or []) == [2, 2]):  # type: ignore[call-overload]
        relu = edit.producer(node.input[0])
        before = edit.producer(relu.input[0]) if relu is not None and relu.op_type == "Relu" else None
        if before is not None and before.op_type == "Conv" and list(edit.get(before, "kernel_shape") or []) == [1, 1]:  # type: ignore[call-overload]
            edit.touch(before, node)
            edit.set(before, strides=[2, 2])
            edit.set(node, strides=[1, 1])
            return
    raise NotApplicableError("no strided residual unit")


@fault("factor gamma of a residual branch forgotten")
def gamma_forgotten(edit: Editor) -> None:
    name, gamma = next(((key, value) for key, value in edit.weights.items() if key.endswith("gamma")), ("", np.ones(1)))
    module = name.removesuffix("gamma")
    nodes = edit.all("Conv", where=lambda item: edit.owner(item) == f"{module}value_conv" and edit.stores()(item))
    edit.touch(nodes[0])
    for node in nodes:
        for slot in (1, 2):
            edit.store(node, slot, edit.weight(node, slot) / gamma)


# Normalisation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folded:
    """A convolution with a folded normalisation, and the parameters of the latter."""

    node: onnx.NodeProto
    mean: np.ndarray
    variance: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    epsilon: float

    def rescale(self, edit: Editor, factor: np.ndarray) -> None:
        """Multiply the folded scale by a factor for each channel; the folded shift follows."""
        edit.touch(self.node)
        weight, bias = edit.weight(self.node, 1), edit.weight(self.node, 2)
        edit.store(self.node, 1, weight * factor.reshape(-1, 1, 1, 1))
        edit.store(self.node, 2, (bias - self.bias) * factor + self.bias)


def _folded(edit: Editor) -> list[_Folded]:
    """Return the convolutions that hold a normalisation."""
    found = []
    for node in edit.all("Conv", where=lambda item: edit.stores()(item) and edit.stores(2)(item)):
        module = edit.owner(node)
        # An ABN has become a sequence of normalisation and activation.
        path = next(
            (path for path in (module, module.rpartition(".")[0]) if f"{path}.running_var" in edit.weights), None
        )
        if path is not None:
            names = ("running_mean", "running_var", "weight", "bias")
            values = (edit.weights[f"{path}.{name}"].astype(np.float64) for name in names)
            found.append(_Folded(node, *values, edit.epsilons[path]))
    if not found:
        raise NotApplicableError("no folded normalisation")
    return found


@fault("normalisation folded with the wrong epsilon")
def epsilon_wrong(edit: Editor) -> None:
    norm = _folded(edit)[0]
    norm.rescale(edit, np.sqrt((norm.variance + norm.epsilon) / (norm.variance + 1e-2)))


@fault("every normalisation folded without epsilon")
def epsilon_missing(edit: Editor) -> None:
    for norm in _folded(edit):
        norm.rescale(edit, np.sqrt((norm.variance + norm.epsilon) / norm.variance))


@fault("absolute value of the weight forgotten in activated batch normalisation")
def abn_absolute_forgotten(edit: Editor) -> None:
    # Only ABN weights have all been given a negative third, see `fault_subjects.bundled`.
    negative = [norm for norm in _folded(edit) if (norm.weight[::3] < 0).all()]
    if not negative:
        raise NotApplicableError("no negative weight of an ABN")
    negative[-1].rescale(edit, np.where(negative[-1].weight < 0, -1.0, 1.0))


@fault("running mean forgotten when a normalisation is folded")
def running_mean_forgotten(edit: Editor) -> None:
    norm = _folded(edit)[min(4, len(_folded(edit)) - 1)]
    edit.touch(norm.node)
    scale = np.abs(norm.weight) / np.sqrt(norm.variance + norm.epsilon)
    edit.store(norm.node, 2, edit.weight(norm.node, 2) + norm.mean * scale)


@fault("epsilon of a layer normalisation wrong")
def layer_norm_epsilon(edit: Editor) -> None:
    edit.set(edit.one("LayerNormalization"), epsilon=1e-2)


@fault("layer normalisation without its weight")
def layer_norm_weight(edit: Editor) -> None:
    node = edit.one("LayerNormalization", where=edit.stores())
    edit.store(node, 1, np.ones_like(edit.weight(node)))


# Activations, pools, interpolation -------------------------------------------------------------------


@fault("activation forgotten")
def activation_forgotten(edit: Editor) -> None:
    edit.bypass(edit.one("Relu", place=1))


@fault("slope of a leaky ReLU wrong")
def leaky_slope(edit: Editor) -> None:
    edit.set(edit.one("LeakyRelu"), alpha=0.1)


@fault("ReLU instead of leaky ReLU")
def leaky_lost(edit: Editor) -> None:
    edit.become(edit.one("LeakyRelu"), "Relu")


@fault("slope of a parametric ReLU left at its initial value")
def prelu_initial(edit: Editor) -> None:
    node = edit.one("PRelu", where=edit.stores())
    edit.store(node, 1, np.full_like(edit.weight(node), 0.25))


@fault("exact GELU replaced by ReLU")
def gelu_replaced(edit: Editor) -> None:
    erf = edit.one("Erf")
    edit.become(erf, "Sign")


@fault("ceil_mode of a pool forgotten")
def ceil_mode(edit: Editor) -> None:
    node = edit.one("MaxPool", where=lambda item: edit.get(item, "ceil_mode") == 1)
    edit.set(node, ceil_mode=0)


@fault("average pool instead of maximum pool")
def pool_kind(edit: Editor) -> None:
    node = edit.one("MaxPool")
    kept = {
        item.name: edit.get(node, item.name)
        for item in node.attribute
        if item.name not in ("dilations", "storage_order")
    }
    edit.become(node, "AveragePool", **kept)


@fault("global sum instead of global mean")
def mean_as_sum(edit: Editor) -> None:
    edit.one("ReduceMean").op_type = "ReduceSum"


@fault("global maximum instead of global mean")
def mean_as_maximum(edit: Editor) -> None:
    node = edit.one("ReduceMean")
    edit.become(node, "ReduceMax", list(node.input), keepdims=edit.get(node, "keepdims"))


def _resize(edit: Editor, mode: bytes) -> onnx.NodeProto:
    return edit.one("Resize", where=lambda item: edit.get(item, "mode") == mode)


@fault("align_corners confused")
def align_corners(edit: Editor) -> None:
    node = _resize(edit, b"linear")
    now = edit.get(node, "coordinate_transformation_mode")
    edit.set(node, coordinate_transformation_mode="pytorch_half_pixel" if now == b"align_corners" else "align_corners")


@fault("asymmetric instead of half-pixel coordinates")
def resize_asymmetric(edit: Editor) -> None:
    edit.set(_resize(edit, b"linear"), coordinate_transformation_mode="asymmetric")


@fault("nearest instead of linear interpolation")
def resize_nearest(edit: Editor) -> None:
    edit.set(_resize(edit, b"linear"), mode="nearest")


@fault("rounding of nearest interpolation wrong")
def nearest_rounding(edit: Editor) -> None:
    node = _resize(edit, b"nearest")
    edit.set(node, nearest_mode="ceil")


# FP16 ------------------------------------------------------------------------------------------------


@fault("activations that exceed 65504 in FP16", "fp16")
def fp16_overflow(edit: Editor) -> None:
    _scaled_pair(edit, 2.0**17)


@fault("activations too small for FP16", "fp16")
def fp16_underflow(edit: Editor) -> None:
    _scaled_pair(edit, 2.0**-28)


def _scaled_pair(edit: Editor, factor: float) -> None:
    """Scale what a ReLU passes on, and undo it behind: exact in real numbers, wrong in FP16."""
    node = edit.one(
        "Relu", where=lambda item: all(reader.op_type == "Conv" for reader in edit.readers(item.output[0])), place=1
    )
    edit.require_half(node)
    half = factor**0.5  # the factor itself may be beyond FP16
    first = edit.behind(edit.behind(node, "Mul", half), "Mul", half)
    edit.behind(edit.behind(first, "Mul", 1 / half), "Mul", 1 / half)


@fault("weights that vanish in FP16", "fp16")
def fp16_weights_vanish(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores())
    edit.require_half(node)
    weight = edit.weight(node)
    edit.store(node, 1, (weight * np.float32(2.0**-22)).astype(np.float16).astype(np.float32) * 2.0**22)


@fault("weights stored with the eight bits of BF16", "fp16")
def fp16_weights_coarse(edit: Editor) -> None:
    node = edit.one("Conv", where=edit.stores(1, lambda array: array.shape[1] == 3))
    edit.require_half(node)
    weight = edit.weight(node)
    step = 2.0 ** (np.floor(np.log2(np.abs(weight) + 1e-20)) - 2)
    edit.store(node, 1, np.round(weight / step) * step)


# INT8 ------------------------------------------------------------------------------------------------


def _weight_dequantisers(edit: Editor) -> list[onnx.NodeProto]:
    """Return the nodes that turn stored weights back, one scale for each channel; the most different scales first."""

    def stored(node: onnx.NodeProto) -> bool:
        array, scale = edit.constant(node.input[0]), edit.constant(node.input[1])
        return array is not None and scale is not None and array.ndim == 4 and scale.size > 1

    return sorted(edit.all("DequantizeLinear", where=stored), key=lambda node: -_spread(edit, node))


def _spread(edit: Editor, node: onnx.NodeProto) -> float:
    scale = edit.constant(node.input[1])
    assert scale is not None
    return float(scale.std() / scale.mean())


def _touch_readers(edit: Editor, node: onnx.NodeProto) -> onnx.NodeProto:
    edit.touch(*edit.readers(node.output[0]))
    return node


def _activation_pair(edit: Editor) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Return the quantiser and dequantiser of the first activation map inside the network."""

    def inner(node: onnx.NodeProto) -> bool:
        return min(edit.shape(node.input[0])[2:], default=0) > 1 and edit.producer(node.input[0]) is not None

    quantise = edit.all("QuantizeLinear", where=inner)[0]
    dequantise = edit.readers(quantise.output[0])[0]
    edit.touch(*edit.readers(dequantise.output[0]))
    return quantise, dequantise


@fault("per-channel scales along the wrong axis", "int8")
def int8_axis(edit: Editor) -> None:
    for node in _weight_dequantisers(edit):
        weight = edit.constant(node.input[0])
        assert weight is not None
        if weight.shape[0] == weight.shape[1]:
            edit.set(_touch_readers(edit, node), axis=1 - int(edit.get(node, "axis") or 0))  # type: ignore[call-overload]
            return
    raise NotApplicableError("no square weight")


@fault("per-channel scales of another channel", "int8")
def int8_scales_shifted(edit: Editor) -> None:
    node = _touch_readers(edit, _weight_dequantisers(edit)[0])
    scale = edit.constant(node.input[1])
    assert scale is not None
    edit.store(node, 1, np.roll(scale, 1))


@fault("zero point on one side only", "int8")
def int8_zero_point(edit: Editor) -> None:
    quantise, _ = _activation_pair(edit)
    edit.store(quantise, 2, np.array(24, np.int8))


@fault("scale off by two on one side", "int8")
def int8_scale_doubled(edit: Editor) -> None:
    _, dequantise = _activation_pair(edit)
    scale = edit.constant(dequantise.input[1])
    assert scale is not None
    edit.store(dequantise, 1, scale * 2)


@fault("calibration on too few images: ranges truncated", "int8")
def int8_truncated(edit: Editor) -> None:
    for node in _activation_pair(edit):
        scale = edit.constant(node.input[1])
        assert scale is not None
        edit.store(node, 1, scale / 8)


@fault("calibration on images of 0 to 255 for a network of 0 to 1: ranges far too wide", "int8")
def int8_range_too_wide(edit: Editor) -> None:
    for node in _activation_pair(edit):
        scale = edit.constant(node.input[1])
        assert scale is not None
        edit.store(node, 1, scale * 64)


@fault("bias dropped from a quantised layer", "int8")
def int8_bias_dropped(edit: Editor) -> None:
    def quantised(node: onnx.NodeProto) -> bool:
        source = edit.producer(node.input[0])
        return source is not None and source.op_type == "DequantizeLinear" and len(node.input) > 2

    node = edit.one("Conv", where=quantised)
    del node.input[2:]


@fault("weights read as unsigned", "int8")
def int8_unsigned(edit: Editor) -> None:
    node = _touch_readers(edit, _weight_dequantisers(edit)[0])
    weight = edit.constant(node.input[0])
    assert weight is not None
    edit.store(node, 0, np.clip(weight.astype(np.int16) + 64, -128, 127).astype(np.int8))
