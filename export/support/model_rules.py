"""Rules about inputs, outputs, constants and the model as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from edgeattn.export.support.context import ModelContext, shape_of, type_of
from edgeattn.export.support.operator_rules import is_storable
from edgeattn.export.support.operators import opset_range
from edgeattn.export.support.rule import OBSERVATIONS, PARSER, TABLE, Mark, ModelRule, Rule, Severity
from edgeattn.export.support.versions import version_text

OLDEST_OPSET = 7
"""First opset with the broadcasting that the parser implements."""

DEEPEST = 24
"""Control-flow bodies and function calls inside each other that the parser allows."""

Found = Iterator[tuple[str, str]]


def _inputs(model: ModelContext) -> Iterator[ir.Value]:
    """Yield the inputs that are no initializers."""
    return (value for value in model.model.graph.inputs if not value.is_initializer())


def _input_types(model: ModelContext) -> Found:
    for value in _inputs(model):
        if not is_storable(type_of(value)) or isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            yield value.name or "", f"the input is {value.type}"


def _initializer_types(model: ModelContext) -> Found:
    for value in model.model.graph.initializers.values():
        kind = value.const_value.dtype if value.const_value is not None else type_of(value)
        if not is_storable(kind):
            yield value.name or "", f"the initializer is {kind}"


def _doubles(model: ModelContext) -> Found:
    graph = model.model.graph
    for value in (*_inputs(model), *graph.initializers.values()):
        if value.dtype == ir.DataType.DOUBLE:
            place = "initializer" if value.is_initializer() else "input"
            yield value.name or "", f"the {place} is FP64 and becomes FP32"


def _input_shapes(model: ModelContext) -> Found:
    for value in _inputs(model):
        if value.shape is None and isinstance(value.type, (ir.TensorType, type(None))):
            yield value.name or "", "the input has no shape and is taken as a scalar"


def _passed_through(model: ModelContext) -> Found:
    for value in model.model.graph.outputs:
        if value.producer() is None and value.is_graph_input() and not value.is_initializer():
            yield value.name or "", f"the input is an output too, and is renamed to __{value.name}"


def _narrow_outputs(model: ModelContext) -> Found:
    for value in model.model.graph.outputs:
        declared = model.declared.get(value.name or "", (None, None))[0]
        if type_of(value) == ir.DataType.INT32 and declared not in (None, ir.DataType.INT32):
            yield value.name or "", f"it is INT32 and is declared {declared}"


def _other_outputs(model: ModelContext) -> Found:
    for value in model.model.graph.outputs:
        declared, actual = model.declared.get(value.name or "", (None, None))[0], type_of(value)
        if declared is None or actual in (None, ir.DataType.INT32, declared) or declared == ir.DataType.DOUBLE:
            continue
        yield value.name or "", f"it is {actual} and is declared {declared}"


def _output_shapes(model: ModelContext) -> Found:
    for value in model.model.graph.outputs:
        declared, actual = model.declared.get(value.name or "", (None, None))[1], shape_of(value)
        if declared is None or actual is None:
            continue
        if len(declared) != len(actual) or any(
            a != b for a, b in zip(declared, actual, strict=True) if a is not None and b is not None
        ):
            yield value.name or "", f"it has shape {_text(actual)} and is declared {_text(declared)}"


def _text(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def _new_opset(model: ModelContext) -> Found:
    oldest, newest = opset_range(model.version)
    if model.opset > newest:
        version = version_text(model.version)
        yield "", f"opset {model.opset}; TensorRT {version} documents {oldest} to {newest}"


def _old_opset(model: ModelContext) -> Found:
    oldest, newest = opset_range(model.version)
    if OLDEST_OPSET <= model.opset < oldest:
        version = version_text(model.version)
        yield "", f"opset {model.opset}; TensorRT {version} documents {oldest} to {newest}"


def _too_old_opset(model: ModelContext) -> Found:
    if model.opset < OLDEST_OPSET:
        yield "", f"opset {model.opset}"


def _inference(model: ModelContext) -> Found:
    if model.inference_error:
        yield "", f"types and shapes are unknown: {model.inference_error}"


def _depth(model: ModelContext) -> Found:
    for name, depth in model.depths.items():
        if depth > DEEPEST:
            yield name, f"{depth} control-flow bodies and functions inside each other; {DEEPEST} is the most"


def _parent_folder(model: ModelContext) -> Found:
    for value in model.model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and ".." in str(value.const_value.location).split("/"):
            yield value.name or "", f"its data lie in {value.const_value.location}"


RULES: tuple[Rule, ...] = (
    ModelRule(
        id="input-type",
        title="input of a type that TensorRT does not have",
        severity=Severity.REJECTED,
        remedy="Use FP32, FP16, BF16, INT8, UINT8, INT32, INT64 or BOOL.",
        source=PARSER,
        mark=Mark.CODE,
        find=_input_types,
    ),
    ModelRule(
        id="initializer-type",
        title="constant of a type that TensorRT does not have",
        severity=Severity.REJECTED,
        remedy="Store it as FP32, FP16, BF16, INT32, INT64 or BOOL; quantise to INT8.",
        source=f"{PARSER}; {OBSERVATIONS}",
        mark=Mark.CODE,
        find=_initializer_types,
    ),
    ModelRule(
        id="double-tensor",
        title="FP64 becomes FP32",
        severity=Severity.ATTENTION,
        remedy="Export in FP32, so that parity is judged in the precision that runs.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        find=_doubles,
    ),
    ModelRule(
        id="input-shape",
        title="input without a shape",
        severity=Severity.ATTENTION,
        remedy="Declare the input's shape; sizes that vary get names.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_input_shapes,
    ),
    ModelRule(
        id="input-is-output",
        title="input that is an output as well",
        severity=Severity.ATTENTION,
        remedy="Put an Identity in between, so that both keep their names.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_passed_through,
    ),
    ModelRule(
        id="output-int32",
        title="INT32 output declared as another type",
        severity=Severity.REJECTED,
        remedy="Declare the output as INT32, or cast it in the graph.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_narrow_outputs,
    ),
    ModelRule(
        id="output-type",
        title="output of another type than declared",
        severity=Severity.ATTENTION,
        remedy="Declare the output's type as it is.",
        source=PARSER,
        mark=Mark.CODE,
        find=_other_outputs,
    ),
    ModelRule(
        id="output-shape",
        title="output of another shape than declared, which the parser never compares",
        severity=Severity.ATTENTION,
        remedy="Declare the shape that the graph gives; one of the two is a mistake.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_output_shapes,
    ),
    ModelRule(
        id="opset-newer",
        title="opset newer than the operator table",
        severity=Severity.ADVICE,
        remedy="Nothing, as long as no operator is refused; opset 18 is known to every version.",
        source=f"{TABLE}; {OBSERVATIONS}",
        mark=Mark.OBSERVED,
        unverified="limits of 10.7 to 10.16",
        find=_new_opset,
    ),
    ModelRule(
        id="opset-older",
        title="opset older than the operator table",
        severity=Severity.ATTENTION,
        remedy="Convert the model with onnx.version_converter.convert_version, or export at opset 18.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        find=_old_opset,
    ),
    ModelRule(
        id="inference",
        title="ONNX cannot infer the model's types",
        severity=Severity.ATTENTION,
        remedy="Repair the model: onnx.checker.check_model(model, full_check=True) says what is wrong.",
        source="ONNX, shape inference",
        mark=Mark.ARITHMETIC,
        find=_inference,
    ),
    ModelRule(
        id="opset-too-old",
        title="opset without today's broadcasting",
        severity=Severity.REJECTED,
        remedy="Convert the model with onnx.version_converter.convert_version, or export at opset 18.",
        source=PARSER,
        mark=Mark.CODE,
        find=_too_old_opset,
    ),
    ModelRule(
        id="nesting",
        title="control flow and functions nested too deeply",
        severity=Severity.REJECTED,
        remedy="Inline the functions, or flatten the control flow.",
        source=f"{PARSER}; {TABLE}",
        mark=Mark.CODE,
        find=_depth,
    ),
    ModelRule(
        id="external-folder",
        title="weights in a folder above the model",
        severity=Severity.REJECTED,
        remedy="Put the file of weights beside the model.",
        source=PARSER,
        mark=Mark.CODE,
        find=_parent_folder,
    ),
)
