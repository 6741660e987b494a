"""`PluginSpec`: the single declaration of an operation that a TensorRT plugin may run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import TensorProto, helper

DOMAIN = "edgeattn"
"""ONNX domain, plugin namespace and torch library namespace of every operation."""

PLUGIN_VERSION = "1"
"""`plugin_version` that TensorRT's parser looks the creator up with."""

_WIDEN, _NARROW = "Widen", "Narrow"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: field name of the tensor.
        shape: one symbol per axis, such as `("batch", "channels", "height", "width")`; equal symbols are equal sizes.
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class PluginSpec:
    """An operation of domain `edgeattn`: signature, and the standard-op body that any runtime can execute.

    The body is ONNX text (see `onnx.parser`) over the plain names of the signature. Two pseudo-operations mark the
    region that has to stay in FP32 when the rest of the graph runs in FP16: `Widen(x)` enters the region and
    `Narrow(x, like)` leaves it, back to the type of `like`. In an FP32 body both disappear.

    Attributes:
        name: unique name of the declaration.
        op_type: operator name in ONNX, TensorRT and torch; declarations that differ in optional inputs share it.
        inputs: input tensors; all have one floating-point type.
        outputs: output tensors, of the same type.
        body: the statements between the braces of an ONNX function.
        summary: the mathematics in one line.
    """

    name: str
    op_type: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    body: str
    summary: str

    @property
    def prefix(self) -> str:
        """Prefix of every tensor name inside the body.

        TensorRT's parser binds a formal name to an outer tensor of the same name, so formals have to be unique in any
        graph they may meet.
        """
        return f"__{DOMAIN}_{self.name}_"

    def function(self, opset: int, *, fp32_island: bool = False) -> onnx.FunctionProto:
        """Build the ONNX local function.

        Args:
            opset: version of the standard operators, equal to the model's.
            fp32_island: keep the marked region in FP32 whatever the type of the inputs.

        Returns:
            A function `edgeattn::<op_type>` whose inputs and outputs follow the signature.
        """
        function = onnx.FunctionProto()
        function.CopyFrom(self._parsed)
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
        for node in nodes:
            node.input[:] = [self._unique(renamed.get(name, name)) for name in node.input]
            node.output[:] = [self._unique(name) for name in node.output]
            node.name = node.output[0]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del function.node[:]
        function.node.extend(kept)
        function.input[:] = [self._unique(name) for name in function.input]
        function.output[:] = [self._unique(renamed.get(name, name)) for name in function.output]
        function.doc_string = self.summary
        return function

    def _unique(self, name: str) -> str:
        return self.prefix + name if name else name

    @cached_property
    def _parsed(self) -> onnx.FunctionProto:
        inputs = ", ".join(tensor.name for tensor in self.inputs)
        outputs = ", ".join(tensor.name for tensor in self.outputs)
        header = f'<opset_import: ["" : 18], domain: "{DOMAIN}">\n{self.op_type} ({inputs}) => ({outputs})'
        return onnx.parser.parse_function(f"{header}\n{{{self.body}}}")

    def schema(self) -> onnx.defs.OpSchema:
        """Return the operator schema that torch's exporter needs to emit the operation as one node."""
        formal = onnx.defs.OpSchema.FormalParameter
        return onnx.defs.OpSchema(
            self.op_type,
            DOMAIN,
            1,
            doc=self.summary,
            inputs=[formal(tensor.name, "T") for tensor in self.inputs],
            outputs=[formal(tensor.name, "T") for tensor in self.outputs],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "")],
        )
