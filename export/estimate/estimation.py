"""What a model takes on a target: the composition of everything in this package."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from edgeattn.export.estimate.costing import Costs, Machine, costs_of, suppose_half, suppose_int8
from edgeattn.export.estimate.fusion import FusedGraph, cost_declaration, fuse
from edgeattn.export.estimate.hardware import assumptions, roof_of, sentences
from edgeattn.export.estimate.operators import UNKNOWN
from edgeattn.export.estimate.result import Band, BlockShare, Estimate, Gain, LayerEstimate, total
from edgeattn.export.estimate.sized_graph import element_bytes, inlined, load, pin_inputs, sized, without_weights
from edgeattn.export.rewrite import rewrite
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN
from edgeattn.targets import Target

NO_MODULE = "(no module)"
_NOTHING = Band(0.0, 0.0, 0.0)


def estimate(
    model: onnx.ModelProto | Path,
    target: Target,
    *,
    input_sizes: Mapping[str, tuple[int, ...]] | None = None,
    tf32: bool = False,
    gains: bool = True,
) -> Estimate:
    """Estimate what a model takes on a target. Nothing is run, and no GPU or TensorRT is needed.

    Args:
        model: ONNX model or file, plain or with plugin nodes, in any precision; not modified.
        target: the target, with known memory, bandwidth and peak rates.
        input_sizes: shapes of inputs with free axes, by name (see `sized_graph.image_sizes`).
        tf32: FP32 products round their inputs to TF32, as `edgeattn build --tf32` allows.
        gains: also estimate what plugins, FP16 and INT8 would gain. In a plain model that looks for attention cores and
            verifies them with ONNX Runtime, which takes longer than everything else.

    Returns:
        The estimate.

    Raises:
        UserError: the file is no ONNX model; a free axis has no size; the target does not state a figure; the model has
            control flow, or a size that cannot be inferred.
    """
    roof = roof_of(target, tf32=tf32)
    machine = Machine(roof, target.sm)
    whole = load(model) if isinstance(model, Path) else model
    light = without_weights(whole)
    shapes = pin_inputs(light, input_sizes or {})
    fused = fuse(sized(inlined(light, plugins=False)))
    if not fused.layers:
        raise UserError("the model computes nothing that depends on its inputs. Give a model with inputs.")
    costs = costs_of(fused, machine)
    memory = assumptions()["memory"]
    engine = costs.weight_bytes + len(costs.layers) * memory["engine_bytes_per_layer"]
    tensors = fused.graph.tensors
    inputs = sum(int(tensors[name].count * element_bytes(tensors[name].element)) for name in fused.graph.inputs)
    required = engine + costs.peak_activation_bytes + inputs + memory["runtime_bytes"]
    assert target.memory_gib is not None  # `roof_of` has checked
    available = int(target.memory_gib * 2**30 * memory["usable"])
    return Estimate(
        model=str(model) if isinstance(model, Path) else whole.graph.name,
        target=target.name,
        input_sizes=shapes,
        layers=costs.layers,
        macs=sum(layer.macs for layer in costs.layers),
        flops=sum(layer.flops for layer in costs.layers),
        bytes_moved=costs.bytes_moved,
        seconds=costs.seconds,
        peak_activation_bytes=costs.peak_activation_bytes,
        live_activation_bytes=costs.memory.live_bytes + costs.memory.output_bytes,
        peak_layer=costs.memory.peak_layer,
        input_bytes=inputs,
        weight_bytes=costs.weight_bytes,
        engine_bytes=engine,
        required_bytes=required,
        available_bytes=available,
        fits=required <= available,
        fit_reason=(
            f"engine {_mib(engine)}, activations {_mib(costs.peak_activation_bytes)}, inputs {_mib(inputs)} and the "
            f"runtime {_mib(memory['runtime_bytes'])} take {_mib(required)} of {_mib(available)}, which is "
            f"{memory['usable']:.0%} of {target.memory_gib:g} GiB"
        ),
        blocks=_blocks(costs.layers),
        gains=tuple(_gains(whole, light, fused, costs, machine)) if gains else (),
        roof=roof,
        assumptions=sentences(roof),
        notes=tuple(_notes(fused)),
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _notes(fused: FusedGraph) -> list[str]:
    unknown = sorted(
        {
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for layer in fused.layers
            for node in layer.nodes
            if cost_declaration(node) is UNKNOWN
        }
    )
    if not unknown:
        return []
    return [
        f"no cost is declared for {', '.join(unknown)}: counted as one pass over inputs and outputs, without "
        "operations (export/estimate/operators.py)"
    ]


def _blocks(layers: Sequence[LayerEstimate]) -> tuple[BlockShare, ...]:
    """Group layers by the outermost part of their module path that tells the network's parts apart."""
    depth = _depth([layer.module for layer in layers])
    groups: dict[str, list[LayerEstimate]] = defaultdict(list)
    for layer in layers:
        groups[".".join(layer.module.split(".")[:depth]) or NO_MODULE].append(layer)
    whole = total(layer.seconds for layer in layers).typical
    shares = [
        BlockShare(
            module,
            len(members),
            sum(layer.flops for layer in members),
            sum(layer.bytes_moved for layer in members),
            (time := total(layer.seconds for layer in members)),
            time.typical / whole,
        )
        for module, members in groups.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.seconds.typical))


def _depth(modules: Sequence[str]) -> int:
    """Return how many names of a module path tell at least four parts apart, at most three."""
    for depth in (1, 2):
        if len({tuple(module.split(".")[:depth]) for module in modules if module}) >= 4:
            return depth
    return 3


def _gains(
    whole: onnx.ModelProto, light: onnx.ModelProto, fused: FusedGraph, costs: Costs, machine: Machine
) -> list[Gain]:
    return [
        _plugin_gain(whole, light, fused, costs, machine),
        _precision_gain("fp16", fused, costs, machine),
        _precision_gain("int8", fused, costs, machine),
    ]


def _difference(change: str, before: Costs, after: Costs, note: str, *, present: bool = False) -> Gain:
    return Gain(
        change=change,
        present=present,
        applies=True,
        seconds_saved=before.seconds - after.seconds,
        bytes_saved=before.bytes_moved - after.bytes_moved,
        activation_bytes_saved=before.peak_activation_bytes - after.peak_activation_bytes,
        weight_bytes_saved=before.weight_bytes - after.weight_bytes,
        note=note,
    )


def _no_gain(change: str, note: str) -> Gain:
    return Gain(change, False, False, _NOTHING, 0, 0, 0, note)


def _plugin_gain(
    whole: onnx.ModelProto, light: onnx.ModelProto, fused: FusedGraph, costs: Costs, machine: Machine
) -> Gain:
    """Compare plugin nodes with their bodies, or cores that are recognised with the plugin nodes they could be."""
    calls = {node.op_type for layer in fused.layers for node in layer.nodes if node.domain == DOMAIN}
    if calls:
        bodies = {function.name for function in light.functions if function.domain == DOMAIN}
        if missing := calls - bodies:
            return _no_gain(
                "plugins", f"the plugin nodes {', '.join(sorted(missing))} come without bodies to compare them with"
            )
        plain = costs_of(fuse(sized(inlined(light, plugins=True))), machine)
        return _difference(
            "plugins", plain, costs, "over the plain form, the bodies in standard operators", present=True
        )
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in whole.graph.initializer):
        return _no_gain(
            "plugins", "the weights are in another file; estimate what `edgeattn rewrite` makes of the model"
        )
    try:
        found = rewrite(_pinned(whole, light))
    except UserError as error:
        return _no_gain("plugins", str(error))
    if not found.accepted:
        return _no_gain("plugins", "no attention core that a plugin replaces was found (`edgeattn rewrite`)")
    try:
        with_plugins = costs_of(fuse(sized(inlined(without_weights(found.model), plugins=False))), machine)
    except UserError as error:
        return _no_gain("plugins", str(error))
    names = ", ".join(sorted({core.operation for core in found.accepted}))
    return _difference("plugins", costs, with_plugins, f"{len(found.accepted)} cores replaced by {names}")


def _pinned(whole: onnx.ModelProto, light: onnx.ModelProto) -> onnx.ModelProto:
    """Return the whole model with the sizes of the light one."""
    result = onnx.ModelProto()
    result.CopyFrom(whole)
    del result.graph.input[:]
    result.graph.input.extend(light.graph.input)
    return result


def _precision_gain(change: str, fused: FusedGraph, costs: Costs, machine: Machine) -> Gain:
    """Compare the model with the same layers in another precision."""
    present = {layer.precision for layer in costs.layers}
    if change == "fp16":
        if "fp32" not in present:
            return _no_gain(change, "nothing in the model is FP32")
        supposed, note = suppose_half(), "every FP32 tensor in FP16; layers that need FP32 for accuracy would gain less"
    else:
        supposed = suppose_int8(fused)
        done = {layer.nodes for layer in costs.layers if layer.precision == "int8"}
        todo = [
            layer
            for layer, figures in zip(fused.layers, costs.layers, strict=True)
            if layer.product is not None and layer.product.name in supposed.int8 and figures.nodes not in done
        ]
        if not todo:
            return _no_gain(change, "the model is INT8 already" if done else "the model has no layer with weights")
        note = (
            "every convolution and linear layer in INT8, the rest in FP16; layers with too much noise would gain less"
        )
    try:
        return _difference(change, costs, costs_of(fused, machine, supposed), note)
    except UserError as error:
        return _no_gain(change, str(error))
