"""Rules about whole operators: which are imported, and for which element types."""

from __future__ import annotations

import onnx_ir as ir

from edgeattn.export.support.context import STANDARD_DOMAINS, NodeContext, type_of
from edgeattn.export.support.operators import (
    documented_types,
    first_version,
    is_imported,
    is_refused_by_name,
    library_plugin,
    refused_types,
    returned_outputs,
)
from edgeattn.export.support.rule import CHANGES, HEADERS, OBSERVATIONS, PARSER, TABLE, Mark, NodeRule, Rule, Severity
from edgeattn.export.support.versions import version_text

_DATA_INPUT = {"OneHot": 2, "Where": 1}
"""Input whose element type counts, where it is not the first."""

_UNSTORABLE = frozenset(
    {
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.STRING,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.UINT4,
    }
)
_REMEDIES = {
    "Attention": "Export at opset 22 or earlier, where attention becomes MatMul, Softmax and MatMul.",
    "RMSNormalization": "Export at opset 22 or earlier, where it is written in elementary operators.",
    "Swish": "Write it as x * Sigmoid(x): export at opset 22 or earlier.",
    "Col2Im": "Write F.fold as a transposed convolution or as slices that are added.",
    "AffineGrid": "Compute the sampling grid with MatMul from a constant base grid.",
    "CenterCropPad": "Use Slice and Pad with sizes known at export.",
    "DynamicQuantizeLinear": "Quantise with constant scales: QuantizeLinear and DequantizeLinear.",
    "QLinearConv": "Quantise in the Q/DQ format, with float operators between the pairs.",
    "QLinearMatMul": "Quantise in the Q/DQ format, with float operators between the pairs.",
    "ConvInteger": "Quantise in the Q/DQ format, with float operators between the pairs.",
    "MatMulInteger": "Quantise in the Q/DQ format, with float operators between the pairs.",
}


def is_storable(kind: ir.DataType | None) -> bool:
    """Say whether TensorRT has an element type."""
    return kind is None or kind not in _UNSTORABLE


def data_type(node: NodeContext) -> ir.DataType | None:
    """Return the element type that an operator's type limits are about."""
    return node.type(_DATA_INPUT.get(node.operator, 0))


def _not_imported(node: NodeContext) -> str | None:
    """Find operators of the standard domain that nothing imports."""
    if is_imported(node.operator, node.version) or node.node.domain not in STANDARD_DOMAINS:
        return None
    if "plugin_namespace" in node.node.attributes or library_plugin(node.operator):
        return None
    first = first_version(node.operator)
    since = f"; {version_text(first)} is the first version that does" if first else ""
    return f"TensorRT {version_text(node.version)} does not import {node.operator}{since}"


def unsupported_remedy(operator: str) -> str:
    """Return what to do about an operator that is not imported."""
    general = "Replace it by operators of the table, export at another opset, or register a plugin of that name."
    return _REMEDIES.get(operator, general)


def _foreign_refused(node: NodeContext) -> str | None:
    if is_refused_by_name(node.operator, node.version) and node.node.domain not in STANDARD_DOMAINS:
        return f"{node.node.domain}::{node.operator} has the name of an operator that the parser refuses by name"
    return None


def _foreign(node: NodeContext) -> str | None:
    if node.node.domain in STANDARD_DOMAINS or not is_imported(node.operator, node.version):
        return None
    if node.operator.startswith("TRT_"):
        return None  # TensorRT's own operators have no other meaning
    return f"the domain {node.node.domain} is ignored: ONNX's own {node.operator} is imported, extra inputs are dropped"


def _refused_type(node: NodeContext) -> str | None:
    kind = data_type(node)
    if kind in refused_types(node.operator, node.version):
        return f"{node.operator} does not take {kind}"
    return None


def _undocumented_type(node: NodeContext) -> str | None:
    kind, known = data_type(node), documented_types(node.operator)
    if kind is None or not known or kind in known or kind in refused_types(node.operator, node.version):
        return None
    if not is_storable(kind):
        return None  # the tensor itself is refused already
    listed = ", ".join(sorted(item.name for item in known))
    return f"the operator table lists {listed} for {node.operator}, and this one has {kind}"


def _needs_library(node: NodeContext) -> str | None:
    if node.operator == "ScatterElements" and node.attribute("reduction", "none") == "none":
        return None
    plugin = library_plugin(node.operator)
    if plugin is None or (plugin != node.operator and not is_imported(node.operator, node.version)):
        return None
    return f"{node.operator} is imported as the plugin {plugin}"


def _plugin_type(node: NodeContext) -> str | None:
    """Find plugin nodes with types that no plugin may have; function bodies are in place of their calls by now."""
    if is_imported(node.operator, node.version) or node.node.domain in STANDARD_DOMAINS:
        return None
    for value in (*node.node.inputs, *node.node.outputs):
        if type_of(value) in (ir.DataType.BOOL, ir.DataType.UINT8):
            return f"{value.name} is {type_of(value)}"  # type: ignore[union-attr]
    return None


def _too_many_outputs(node: NodeContext) -> str | None:
    limit = returned_outputs(node.operator)
    outputs = list(node.node.outputs)
    named = [value for value in outputs if value.name]
    count = len(named) if node.version >= (10, 6) else len(outputs)
    if limit is not None and count > limit:
        return f"{node.operator} has {count} outputs and the importer gives {limit}"
    return None


def _omitted_output(node: NodeContext) -> str | None:
    named = sum(bool(value.name) for value in node.node.outputs)
    if node.operator == "TopK" and named < 2:
        return f"TopK gives two outputs and the node names {named}"
    bodies = dict(node.bodies())
    given: int | None = None
    if node.operator == "Loop" and "body" in bodies:
        given = len(bodies["body"].outputs) - 1
    elif node.operator == "Scan" and "body" in bodies:
        given = len(bodies["body"].outputs)
    elif node.operator == "If" and "then_branch" in bodies:
        given = len(bodies["then_branch"].outputs)
    elif node.operator == "Split":
        given = len(node.node.outputs)
    if given is not None and named < given:
        return f"{node.operator} gives {given} outputs and the node names {named}"
    return None


RULES: tuple[Rule, ...] = (
    NodeRule(
        id="operator-unsupported",
        title="no importer for the operator",
        severity=Severity.REJECTED,
        remedy="",  # by operator, see `unsupported_remedy`
        source=f"{TABLE}; {PARSER}",
        mark=Mark.OBSERVED,
        find=_not_imported,
    ),
    NodeRule(
        id="operator-refused-by-name",
        title="operator name that the parser refuses",
        severity=Severity.REJECTED,
        remedy="Give the function or the plugin another name.",
        source=PARSER,
        mark=Mark.CODE,
        find=_foreign_refused,
    ),
    NodeRule(
        id="domain-ignored",
        title="operator of another domain is imported as ONNX's own",
        severity=Severity.ATTENTION,
        remedy="Give the operator a name that no ONNX operator has.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_foreign,
    ),
    NodeRule(
        id="type-refused",
        title="element type that the importer refuses",
        severity=Severity.REJECTED,
        remedy="Cast the input to a type that the operator takes, and the result back.",
        source=PARSER,
        mark=Mark.CODE,
        find=_refused_type,
    ),
    NodeRule(
        id="type-undocumented",
        title="element type that the operator table does not list",
        severity=Severity.ATTENTION,
        remedy="Cast the input to a listed type, or try the build on the target.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        find=_undocumented_type,
    ),
    NodeRule(
        id="library-plugin",
        title="needs NVIDIA's plugin library",
        severity=Severity.ATTENTION,
        remedy="Call init_libnvinfer_plugins before parsing; trtexec and Polygraphy do.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_needs_library,
    ),
    NodeRule(
        id="plugin-type",
        title="plugin with BOOL or UINT8",
        severity=Severity.REJECTED,
        remedy="Cast to INT32 or a floating-point type around the plugin.",
        source=HEADERS,
        mark=Mark.HEADER,
        find=_plugin_type,
    ),
    NodeRule(
        id="too-many-outputs",
        title="more outputs than the importer gives",
        severity=Severity.REJECTED,
        remedy="Remove the optional outputs; they are only needed in training.",
        source=f"{OBSERVATIONS}; {TABLE}",
        mark=Mark.OBSERVED,
        find=_too_many_outputs,
    ),
    NodeRule(
        id="output-omitted",
        title="an output is left out",
        severity=Severity.REJECTED,
        remedy="Name every output of the node, also those that nothing reads.",
        source=f"{PARSER}; {CHANGES}, 10.6",
        mark=Mark.CODE,
        since=(10, 6),
        operators=frozenset({"TopK", "Loop", "Scan", "If", "Split"}),
        find=_omitted_output,
    ),
)
