"""Puts a verified replacement into the graph and takes out what it made useless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from edgeattn.export.graph import constant_value
from edgeattn.export.names import fresh_name
from edgeattn.export.rewrite.candidates import Candidate, Snippet


class Editor:
    """Edits one graph.

    Args:
        graph: graph to edit.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.inherited: dict[str, list[str]] = {}
        self._tensors: dict[str, gs.Tensor] = graph.tensors()
        self._outputs = {tensor.name for tensor in graph.outputs}
        self._removed: set[int] = set()
        self._prefixes = {node.name for node in graph.nodes} | {*self._tensors}
        self._scaled: dict[tuple[object, ...], list[gs.Tensor]] = {}

    def prefix(self, stem: str) -> str:
        """Return an unused start for the names of new nodes and tensors."""
        name = fresh_name(stem, self._prefixes)
        self._prefixes.add(name)
        return name

    def replace(self, candidate: Candidate, snippet: Snippet) -> None:
        """Insert the nodes of a snippet in place of a core, and remove the nodes that nothing reads any more."""
        old = [result.tensor.inputs[0] for result in candidate.results]
        core = [node.name for node in candidate.core]
        for name, value in snippet.constants.items():
            self._tensors[name] = gs.Constant(name, value)
        for result in candidate.results:
            result.tensor.inputs.clear()
        for proto in snippet.nodes:
            self._insert(proto)
            self.inherited[proto.name] = core
        self._remove_unread(old)

    def _insert(self, proto: onnx.NodeProto) -> None:
        inputs = [self._tensors[name] for name in proto.input]
        outputs = []
        for name in proto.output:
            if name not in self._tensors:
                element_type = np.int64 if proto.op_type in ("Shape", "Concat") else np.float32
                self._tensors[name] = gs.Variable(name, dtype=element_type)
            outputs.append(self._tensors[name])
        attributes = {item.name: helper.get_attribute_value(item) for item in proto.attribute}
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        self.graph.nodes.append(
            gs.Node(proto.op_type, proto.name, plain, inputs=inputs, outputs=outputs, domain=proto.domain or None)
        )

    def _remove_unread(self, nodes: Iterable[gs.Node]) -> None:
        """Remove nodes whose results nothing reads, and then those that only they read."""
        queue = list(nodes)
        while queue:
            node = queue.pop()
            if id(node) in self._removed or any(item.outputs or item.name in self._outputs for item in node.outputs):
                continue
            self._removed.add(id(node))
            queue.extend(producer for item in node.inputs for producer in item.inputs)
            node.inputs.clear()
            node.outputs.clear()

    def fold_factors(self, snippet: Snippet) -> None:
        """Fold the constant factors of a snippet into the convolutions that alone feed them.

        The product is rounded once, from FP64; convolutions that share weights and factor share the new weights.
        """
        names = [proto.name for proto in snippet.nodes if proto.op_type in ("Mul", "Div")]
        for node in (self._tensors[name].inputs[0] for name in names):
            source, factor = node.inputs[0], constant_value(node.inputs[1])
            if factor is None or not source.inputs or len(source.outputs) != 1 or source.name in self._outputs:
                continue
            convolution = source.inputs[0]
            arrays = [constant_value(item) for item in convolution.inputs[1:] if item.name]
            if convolution.op != "Conv" or any(array is None for array in arrays):
                continue
            convolution.inputs = [convolution.inputs[0], *self._scale(convolution, node, factor, arrays)]
            result = node.outputs[0]
            readers = list(result.outputs)
            for reader in readers:
                reader.inputs = [source if item is result else item for item in reader.inputs]
            self._remove_unread([node])

    def fold_matrices(self, snippet: Snippet) -> None:
        """Turn the matrices that a snippet uses as convolution weights into constants."""
        for name in [proto.name for proto in snippet.nodes if proto.op_type == "Conv"]:
            convolution = self._tensors[name].inputs[0]
            unsqueeze = convolution.inputs[1].inputs[0]
            matrix = unsqueeze.inputs[0]
            turned = bool(matrix.inputs) and matrix.inputs[0].name.startswith(f"{snippet.prefix}/")
            value = constant_value(matrix.inputs[0].inputs[0] if turned else matrix)
            if value is not None:
                weight = np.ascontiguousarray((value.T if turned else value)[:, :, None, None])
                convolution.inputs = [convolution.inputs[0], gs.Constant(f"{unsqueeze.name}_constant", weight)]
                self._remove_unread([unsqueeze])

    def _scale(
        self, convolution: gs.Node, node: gs.Node, factor: np.ndarray, arrays: Sequence[np.ndarray | None]
    ) -> list[gs.Tensor]:
        """Return the parameters of a convolution times (or divided by) a number."""
        number = np.float64(factor).reshape(())
        key = (*(item.name for item in convolution.inputs[1:]), node.op, float(number))
        if key not in self._scaled:
            self._scaled[key] = [
                gs.Constant(
                    self.prefix(f"{item.name}.scaled"),
                    (np.float64(array) * number if node.op == "Mul" else np.float64(array) / number).astype(np.float32),
                )
                for item, array in zip(convolution.inputs[1:], arrays, strict=False)
                if array is not None
            ]
        return self._scaled[key]

    def finish(self) -> gs.Graph:
        """Return the graph without the removed nodes."""
        self.graph.nodes = [node for node in self.graph.nodes if id(node) not in self._removed]
        return self.graph
