"""What a `PluginSpec` is in ONNX: a local function of standard operators, and an operator schema."""

from __future__ import annotations

from functools import cache

import onnx
from onnx import TensorProto, helper

from edgeattn.plugins_trt.spec import DOMAIN, PluginSpec

_WIDEN, _NARROW = "Widen", "Narrow"


def local_function(spec: PluginSpec, opset: int, *, fp32_island: bool = False) -> onnx.FunctionProto:
    """Build the ONNX local function of a declaration from its body.

    Args:
        spec: the declaration.
        opset: version of the standard operators, equal to the model's.
        fp32_island: keep the marked region in FP32 whatever the type of the inputs.

    Returns:
        A function `edgeattn::<op_type>` whose inputs and outputs follow the signature.
    """
    function = onnx.FunctionProto()
    function.CopyFrom(_parsed(spec))
    for entry in function.opset_import:
        entry.version = opset
    nodes: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in function.node:
        if node.op_type in (_WIDEN, _NARROW):
            if not fp32_island:
                renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
                continue
            if node.op_type == _WIDEN:
                node.op_type = "Cast"
                node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
            else:
                node.op_type = "CastLike"
            node.domain = ""
        nodes.append(node)

    def unique(name: str) -> str:
        return spec.prefix + name if name else name

    for node in nodes:
        node.input[:] = [unique(renamed.get(name, name)) for name in node.input]
        node.output[:] = [unique(name) for name in node.output]
        node.name = node.output[0]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del function.node[:]
    function.node.extend(kept)
    function.input[:] = [unique(name) for name in function.input]
    function.output[:] = [unique(renamed.get(name, name)) for name in function.output]
    function.doc_string = spec.summary
    return function


@cache
def _parsed(spec: PluginSpec) -> onnx.FunctionProto:
    inputs = ", ".join(tensor.name for tensor in spec.inputs)
    outputs = ", ".join(tensor.name for tensor in spec.outputs)
    header = f'<opset_import: ["" : 18], domain: "{DOMAIN}">\n{spec.op_type} ({inputs}) => ({outputs})'
    return onnx.parser.parse_function(f"{header}\n{{{spec.body}}}")


def operator_schema(spec: PluginSpec) -> onnx.defs.OpSchema:
    """Return the operator schema that torch's exporter needs to emit the operation as one node."""
    formal = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        spec.op_type,
        DOMAIN,
        1,
        doc=spec.summary,
        inputs=[formal(tensor.name, "T") for tensor in spec.inputs],
        outputs=[formal(tensor.name, "T") for tensor in spec.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "")],
    )
