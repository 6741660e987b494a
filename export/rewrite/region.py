"""Cuts a core out of its graph, digests it, and runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from edgeattn.export.rewrite.candidates import Candidate, Mismatch
from edgeattn.export.rewrite.sizes import Sizes
from edgeattn.plugins_trt import DOMAIN

Arrays = dict[str, np.ndarray]


class Runner:
    """ONNX Runtime on a handful of nodes, unoptimised, on one thread.

    Args:
        nodes: in topological order.
        initializers: constants that they read.
        inputs: values of the other tensors that they read; further ones are ignored.
        outputs: names of the tensors to return.
        opset: version of the standard operators.
        functions: bodies of the plugin operations among the nodes.
    """

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        initializers: Sequence[onnx.TensorProto],
        inputs: Arrays,
        outputs: Sequence[str],
        *,
        opset: int,
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> None:
        constant = {tensor.name for tensor in initializers}
        read = {name for node in nodes for name in node.input} | {*outputs}
        self._inputs = [name for name in inputs if name in read and name not in constant]
        graph = helper.make_graph(
            list(nodes),
            "core",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(inputs[name].dtype), inputs[name].shape
                )
                for name in self._inputs
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            list(initializers),
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._outputs = list(outputs)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run once and return the outputs by name."""
        results = self._session.run(self._outputs, {name: inputs[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))


class Cutter:
    """Cuts cores out of one model.

    Args:
        model: the model, in topological order.
        trials: its sizes; shape tensors become constants of each trial.
        opset: version of the standard operators.
    """

    def __init__(self, model: onnx.ModelProto, trials: Sequence[Sizes], *, opset: int) -> None:
        self.trials = trials
        self.opset = opset
        self._producers = {name: node for node in model.graph.node for name in node.output if name}
        self._place = {id(node): index for index, node in enumerate(model.graph.node)}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known = {*trials[0].values}.intersection(*(sizes.values for sizes in trials))
        self._digests: dict[str, bytes] = {}

    def cut(self, candidate: Candidate) -> list[onnx.NodeProto]:
        """Return the nodes between a core's inputs and its results, in topological order.

        Raises:
            Mismatch: the results depend on something else than the inputs.
        """
        stop = {tensor.name for tensor in candidate.inputs}
        found: dict[int, onnx.NodeProto] = {}
        names = [result.tensor.name for result in candidate.results]
        while names:
            name = names.pop()
            if not name or name in stop or name in self._initializers or name in self._known:
                continue
            node = self._producers.get(name)
            if node is None:
                raise Mismatch(f"the result also depends on the input {name!r} of the model")
            if id(node) not in found:
                found[id(node)] = node
                names.extend(node.input)
        return sorted(found.values(), key=lambda node: self._place[id(node)])

    def runner(self, candidate: Candidate, nodes: Sequence[onnx.NodeProto], sizes: Sizes, inputs: Arrays) -> Runner:
        """Prepare a cut core to be run at one size; it returns the core's results and attention tensors."""
        produced = {name for node in nodes for name in node.output}
        needed = {name for node in nodes for name in node.input if name} - produced - {*inputs}
        constants = [
            numpy_helper.from_array(sizes.values[name], name) if name in sizes.values else self._initializers[name]
            for name in sorted(needed)
        ]
        outputs = [*(result.tensor.name for result in candidate.results)]
        outputs += [tensor.name for tensor in candidate.attention.values()]
        return Runner(nodes, constants, inputs, outputs, opset=self.opset)

    def signature(self, candidate: Candidate, nodes: Sequence[onnx.NodeProto]) -> str:
        """Digest everything that decides whether a core equals its replacement, tensor names left out."""
        digest = hashlib.sha256()
        numbers: dict[str, int] = {}

        def number(name: str) -> int:
            return numbers.setdefault(name, len(numbers)) if name else -1

        for tensor in candidate.inputs:
            digest.update(
                repr((number(tensor.name), [sizes.shapes.get(tensor.name) for sizes in self.trials])).encode()
            )
        for node in nodes:
            constants = [self._digest(name) for name in node.input if name not in numbers]
            parts = (node.domain, node.op_type, [number(name) for name in (*node.input, *node.output)], constants)
            digest.update(repr(parts).encode())
            for attribute in node.attribute:
                digest.update(attribute.SerializeToString())
        feeds = [
            (
                [number(tensor.name) for tensor in feed.tensors],
                feed.source.channel,
                feed.scale,
                feed.operators,
                feed.flips,
            )
            for feed in candidate.feeds
        ]
        results = [(number(result.tensor.name), result.flat) for result in candidate.results]
        residual = number(candidate.residual.name) if candidate.residual is not None else None
        gate = [array.tobytes() for array in candidate.gate or ()]
        digest.update(repr((candidate.spec.name, feeds, results, residual, gate)).encode())
        return digest.hexdigest()

    def _digest(self, name: str) -> bytes:
        """Digest a constant's type, shape and values, or a shape tensor's value in each trial."""
        if name not in self._digests:
            arrays = [sizes.values[name] for sizes in self.trials if name in sizes.values]
            if not arrays and name in self._initializers:
                arrays = [numpy_helper.to_array(self._initializers[name])]
            digest = hashlib.sha256()
            for array in arrays:
                digest.update(repr((array.dtype.str, array.shape)).encode() + array.tobytes())
            self._digests[name] = digest.digest()
        return self._digests[name]
