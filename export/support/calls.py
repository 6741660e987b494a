"""Plugin nodes and function calls: what TensorRT runs for each, and function bodies in place of their calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgeattn.export.support.context import STANDARD_DOMAINS, CallContext
from edgeattn.export.support.function_rules import plugin_preferred
from edgeattn.export.support.operators import is_imported, is_refused_by_name, library_plugin
from edgeattn.export.support.versions import Version
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGINS

CALL_SITE = "edgeattn.support.call"
"""Temporary metadata key: the call that a node of a function's body comes from."""

_PLUGIN_FIRST: Version = (10, 15)
"""First version in which a node that names its plugin's namespace is taken before an operator of the same name."""


@dataclass(frozen=True)
class KnownPlugins:
    """The plugins that the target loads.

    Attributes:
        own: whether edgeattn's plugin library is among them.
        others: further plugins, as `NAMESPACE::NAME`.
    """

    own: bool = True
    others: frozenset[str] = frozenset()

    def has(self, namespace: str, operator: str, inputs: int) -> bool:
        """Say whether a plugin of that name takes that many inputs."""
        own = self.own and namespace == DOMAIN
        return (own and any(spec.op_type == operator and len(spec.inputs) == inputs for spec in PLUGINS)) or (
            f"{namespace}::{operator}" in self.others
        )


class CallFinder:
    """Finds plugin nodes and function calls, those inside function bodies that run included.

    Args:
        model: the model; not changed.
        version: TensorRT version.
        opset: version of the standard operators.
        plugins: the plugins that the target loads.
    """

    def __init__(self, model: ir.Model, version: Version, opset: int, plugins: KnownPlugins) -> None:
        self._model = model
        self._version = version
        self._opset = opset
        self._plugins = plugins
        self._by_name: dict[str, list[ir.Function]] = defaultdict(list)
        for function in model.functions.values():
            self._by_name[function.name].append(function)

    def calls(self) -> Iterator[tuple[ir.Node, CallContext]]:
        """Yield each node of the main graph with itself, and with every call inside the function bodies it runs."""
        graph = self._model.graph
        known = {value.name or "" for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs)}
        yield from self._calls(graph, known, None, ())

    def depths(self) -> dict[str, int]:
        """Return how deep the deepest node inside each node of the main graph is nested."""
        return {node.name or node.op_type: self._depth(node, ()) for node in self._model.graph}

    def _calls(
        self,
        nodes: Iterable[ir.Node],
        known: set[str],
        top: ir.Node | None,
        stack: tuple[str, ...],
    ) -> Iterator[tuple[ir.Node, CallContext]]:
        seen = set(known)
        for node in nodes:
            origin = top or node
            call = self._call(node, seen)
            if call is not None:
                yield origin, call
                function = call.function
                if call.body_runs and function is not None and function.name not in stack:
                    inside = seen | {value.name or "" for value in function.inputs}
                    yield from self._calls(function, inside, origin, (*stack, function.name))
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH and isinstance(attribute.value, ir.Graph):
                    body = attribute.value
                    names = {value.name or "" for value in (*body.inputs, *body.initializers.values())}
                    yield from self._calls(body, seen | names, origin, stack)
            seen.update(value.name or "" for value in node.outputs)

    def _call(self, node: ir.Node, known: set[str]) -> CallContext | None:
        """Return what a rule may ask of a call, or None for a node that is one of ONNX's operators."""
        attribute = node.attributes.get("plugin_namespace")
        namespace = None if attribute is None or attribute.value is None else str(attribute.value)
        plugin = self._has_plugin(node, namespace)
        named = is_imported(node.op_type, self._version) or is_refused_by_name(node.op_type, self._version)
        if named and not (plugin and namespace is not None and self._version >= _PLUGIN_FIRST):
            return None
        functions = self._by_name.get(node.op_type, [])
        nobodys = library_plugin(node.op_type) or (node.domain in STANDARD_DOMAINS and namespace is None)
        if nobodys and not functions and not plugin:
            return None
        function = functions[0] if functions else None
        runs = plugin and (function is None or (namespace is not None and plugin_preferred(self._version)))
        return CallContext(
            node=node,
            version=self._version,
            opset=self._opset,
            function=function,
            same_name=[f"{item.domain}::{item.name}" for item in functions],
            plugin=plugin,
            plugin_runs=runs,
            tensors=frozenset(known),
        )

    def _has_plugin(self, node: ir.Node, namespace: str | None) -> bool:
        inputs = len(node.inputs)
        if namespace is not None and self._plugins.has(namespace, node.op_type, inputs):
            return True
        if namespace is not None and self._version < (10, 10):
            return False
        return bool(node.domain) and self._plugins.has(node.domain, node.op_type, inputs)

    def _depth(self, node: ir.Node, stack: tuple[str, ...]) -> int:
        inner: list[int] = []
        call = self._call(node, set())
        if call is not None and call.body_runs and call.function is not None and call.function.name not in stack:
            inner += [self._depth(item, (*stack, call.function.name)) for item in call.function]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and isinstance(attribute.value, ir.Graph):
                inner += [self._depth(item, stack) for item in attribute.value]
        return 1 + max(inner) if inner else 0


def inline_bodies(model: ir.Model, calls: Collection[CallContext]) -> None:
    """Put the bodies of the functions that TensorRT runs in place of their calls, as it does while parsing.

    Bodies are read at the model's opset, whatever they declare. Each node of a body carries the name of its call as
    metadata `CALL_SITE`, beside the metadata of the call. Functions that are called in a way the parser refuses stay.

    Args:
        model: changed in place.
        calls: every call.

    Raises:
        UserError: functions call each other in a circle, or take graphs as attributes.
    """
    wanted: dict[str, bool] = {}
    for call in calls:
        if call.function is not None:
            fits = call.body_runs and len(call.node.inputs) == len(call.function.inputs)
            wanted[call.function.name] = wanted.get(call.function.name, True) and fits
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if wanted.get(node.op_type):
            node.metadata_props[CALL_SITE] = node.name or node.op_type
    for function in model.functions.values():
        for domain, version in model.opset_imports.items():
            if domain in function.opset_imports:
                function.opset_imports[domain] = version
    try:
        InlinePass(criteria=lambda function: wanted.get(function.name, False))(model)
    except (ValueError, ir.passes.InvariantError, ir.passes.PassError) as error:
        raise UserError(
            f"the functions of the ONNX model cannot be followed: {error}. Inline them with onnx.inliner first."
        ) from error
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for index, value in enumerate(node.outputs):
            if CALL_SITE in node.metadata_props and not value.name:
                value.name = f"{node.name}_unread_{index}"  # a result that the call leaves out
