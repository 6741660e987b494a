"""The support check: what TensorRT's parser would say of a model, without TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import ShapeInferencePass

from edgeattn.export.metadata import module_scopes
from edgeattn.export.support.calls import CALL_SITE, CallFinder, KnownPlugins, inline_bodies
from edgeattn.export.support.catalogue import CALL_RULES, MODEL_RULES, NODE_RULES
from edgeattn.export.support.context import (
    STANDARD_DOMAINS,
    CallContext,
    ModelContext,
    NodeContext,
    Shape,
    shape_of,
)
from edgeattn.export.support.function_rules import describe_choice
from edgeattn.export.support.operator_rules import unsupported_remedy
from edgeattn.export.support.operators import is_imported
from edgeattn.export.support.result import CheckedNode, Finding, SupportReport
from edgeattn.export.support.rule import Rule
from edgeattn.export.support.versions import Version, check_covered
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN


def check_support(
    model: str | Path | onnx.ModelProto,
    version: Version,
    *,
    target: str = "",
    dla_cores: int = 0,
    own_plugins: bool = True,
    plugins: Collection[str] = (),
) -> SupportReport:
    """Say for every node whether TensorRT's ONNX parser takes it in a strongly typed network.

    Types and shapes come from ONNX's inference; a rule that needs one that is unknown stays silent. Weights are not
    copied. Function bodies are checked where the version runs them rather than a plugin.

    Args:
        model: an ONNX file, with or without external data, or a model; not changed.
        version: TensorRT version (major, minor), from 10.0 on.
        target: name of the deployment target, for the report.
        dla_cores: DLA cores of the target; with any, nodes that DLA does not run get advice.
        own_plugins: edgeattn's plugin library is loaded on the target.
        plugins: other plugins that are loaded there, as `NAMESPACE::NAME`.

    Returns:
        The findings and the verdict on every node.

    Raises:
        UserError: the file cannot be read, the model has no standard operators, its functions run in a circle, or
            the version is not covered.
    """
    check_covered(version)
    name, working = _load(model)
    opset = _opset(working)
    _name_nodes(working)
    finder = CallFinder(working, version, opset, KnownPlugins(own_plugins, frozenset(plugins)))
    calls = list(finder.calls())
    depths = finder.depths()
    findings = [finding for origin, call in calls for finding in _call_findings(origin, call)]
    runs = {call.node.name or "": describe_choice(call) for _, call in calls}
    inline_bodies(working, [call for _, call in calls])
    declared = _forget_outputs(working)
    error = _infer(working)
    _type_the_rest(working, declared)
    context = ModelContext(working, version, opset, declared, depths, error)
    general = list(_model_findings(context))
    nodes = []
    for node in ir.traversal.RecursiveGraphIterator(working.graph):
        own = list(_node_findings(NodeContext(node, version, opset, dla_cores > 0)))
        call_name = node.metadata_props.get(CALL_SITE)
        about = [item for item in findings if item.subject == (node.name or "") and call_name is None]
        nodes.append(_checked(node, own + about, runs))
    # A call whose body took its place has no node left; it is listed in front of its body.
    nodes = [*_gone(calls, nodes, findings, runs), *nodes]
    listed = tuple(finding for node in nodes for finding in node.findings)
    return SupportReport(name, target, version, opset, tuple(nodes), (*general, *listed))


def _load(model: str | Path | onnx.ModelProto) -> tuple[str, ir.Model]:
    """Read a model without its weights, which stay where they are until a rule asks for one."""
    if isinstance(model, onnx.ModelProto):
        return model.graph.name or "model", ir.from_proto(model)
    path = Path(model)
    if not path.is_file():
        raise UserError(f"there is no ONNX file {path}. Check the path.")
    try:
        loaded = ir.load(path)
    except (DecodeError, OSError, ValueError, KeyError, ir.serde.SerdeError) as error:
        raise UserError(f"{path} cannot be read as an ONNX model: {error}. Export it again.") from error
    if not len(loaded.graph) and not loaded.graph.outputs:
        raise UserError(f"{path} holds no ONNX graph. Check that it is the exported model.")
    return path.name, loaded


def _opset(model: ir.Model) -> int:
    for domain in STANDARD_DOMAINS:
        if domain in model.opset_imports:
            return model.opset_imports[domain]
    raise UserError("the ONNX model imports no standard operator set. Export it again with an explicit opset.")


def _name_nodes(model: ir.Model) -> None:
    """Give every node of the main graph and of control-flow bodies a unique name."""
    taken: set[str] = set()
    for index, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
        stem = node.name or f"{node.op_type}_{index}"
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        node.name = name


def _forget_outputs(model: ir.Model) -> dict[str, tuple[ir.DataType | None, Shape | None]]:
    """Take the declared types and shapes off computed outputs, so that inference says what they really are."""
    declared = {}
    for value in model.graph.outputs:
        declared[value.name or ""] = (value.dtype, shape_of(value))
        if value.producer() is not None:
            value.type = None
            value.shape = None
    return declared


def _infer(model: ir.Model) -> str:
    """Add types and shapes in place; return why that failed, or an empty text.

    The pass takes large weights off the model meanwhile, and tells of a failure in its log only.
    """
    log, listener = logging.getLogger(ShapeInferencePass.__module__), _Listener()
    passed_on, log.propagate = log.propagate, False
    log.addHandler(listener)
    try:
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    finally:
        log.removeHandler(listener)
        log.propagate = passed_on
    return " ".join(str(listener.failure).split()) if listener.failure else ""


class _Listener(logging.Handler):
    """Keeps the exception that a log record tells of."""

    failure: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.failure = record.exc_info[1] if record.exc_info else None


def _type_the_rest(model: ir.Model, declared: dict[str, tuple[ir.DataType | None, Shape | None]]) -> None:
    """Give results of plugin nodes without a function the type of their first input, and unknown outputs their own."""
    for node in model.graph:
        if node.domain == DOMAIN and node.inputs and node.inputs[0] is not None and node.inputs[0].dtype is not None:
            for value in node.outputs:
                if value.dtype is None:
                    value.dtype = node.inputs[0].dtype
    for value in model.graph.outputs:
        kind = declared[value.name or ""][0]
        if value.dtype is None and kind is not None:
            value.dtype = kind


def _model_findings(context: ModelContext) -> Iterator[Finding]:
    for rule in MODEL_RULES:
        if rule.covers(context.version):
            for subject, detail in rule.find(context):
                yield _finding(rule, detail, subject=subject)


def _call_findings(origin: ir.Node, call: CallContext) -> Iterator[Finding]:
    for rule in CALL_RULES:
        detail = rule.find(call) if rule.covers(call.version) else None
        if detail:
            inside = "" if call.node is origin else f" (inside {origin.op_type})"
            yield _finding(rule, detail + inside, origin)


def _node_findings(context: NodeContext) -> Iterator[Finding]:
    for rule in NODE_RULES:
        if not rule.covers(context.version) or (rule.operators and context.operator not in rule.operators):
            continue
        if rule.operators and not is_imported(context.operator, context.version):
            continue
        detail = rule.find(context)
        if detail:
            yield _finding(rule, detail, context.node)


def _finding(rule: Rule, detail: str, node: ir.Node | None = None, *, subject: str = "") -> Finding:
    return Finding(
        rule=rule.id,
        title=rule.title,
        severity=rule.severity,
        subject=_name(node) if node is not None else subject,
        operator=_operator(node) if node is not None else "",
        module=_module(node) if node is not None else "",
        detail=detail,
        versions=rule.versions,
        remedy=rule.remedy or unsupported_remedy(node.op_type if node is not None else ""),
        source=rule.source,
        mark=rule.mark,
    )


def _checked(node: ir.Node, findings: list[Finding], runs: dict[str, str]) -> CheckedNode:
    name = _name(node)
    return CheckedNode(name, _operator(node), _module(node), runs.get(name, ""), tuple(findings))


def _gone(
    calls: list[tuple[ir.Node, CallContext]], nodes: list[CheckedNode], findings: list[Finding], runs: dict[str, str]
) -> Iterator[CheckedNode]:
    present = {node.name for node in nodes}
    done: set[str] = set()
    for origin, _ in calls:
        name = origin.name or ""
        if name not in present and name not in done:
            done.add(name)
            yield _checked(origin, [item for item in findings if item.subject == name], runs)


def _name(node: ir.Node) -> str:
    call = node.metadata_props.get(CALL_SITE)
    own = node.name or ""
    return f"{call}/{own}" if call is not None and own != call else own


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in STANDARD_DOMAINS else node.op_type


def _module(node: ir.Node) -> str:
    """Return the path of the innermost torch module, without the root."""
    return next(iter(reversed(module_scopes(node.metadata_props))), "")
