"""Rules about plugin nodes and local functions."""

from __future__ import annotations

from edgeattn.export.support.context import STANDARD_DOMAINS, CallContext
from edgeattn.export.support.rule import CHANGES, OBSERVATIONS, PARSER, CallRule, Mark, Rule, Severity
from edgeattn.export.support.versions import version_text

_UNIQUE = "Give the function's formal names that no other tensor has, such as __mydomain_myoperator_x."


def _unknown(call: CallContext) -> str | None:
    if call.function is not None or call.plugin:
        return None
    return f"{call.label} is no operator, has no function in the model, and no such plugin is known"


def _without_namespace(call: CallContext) -> str | None:
    if call.function is not None or not call.plugin or call.namespace is not None:
        return None
    return f"{call.label} has no attribute plugin_namespace, and the parser looks in the namespace '' only"


def _ignored_plugin(call: CallContext) -> str | None:
    if call.function is None or call.namespace is None:
        return None
    return f"the function runs, and the plugin {call.namespace}::{call.node.op_type} is never asked for"


def _idle_plugin(call: CallContext) -> str | None:
    if call.function is None or call.namespace is not None or not call.plugin:
        return None
    return f"{call.label} has no attribute plugin_namespace, so the function's body runs"


def _inputs(call: CallContext) -> str | None:
    if not call.body_runs or call.function is None:
        return None
    given, wanted = len(call.node.inputs), len(call.function.inputs)
    if given != wanted:
        return f"it has {given} inputs and the function {wanted}"
    return "an input is left out" if any(value is None for value in call.node.inputs) else None


def _outputs(call: CallContext) -> str | None:
    if not call.body_runs or call.function is None:
        return None
    named, wanted = sum(bool(value.name) for value in call.node.outputs), len(call.function.outputs)
    return f"it names {named} outputs and the function {wanted}" if named != wanted else None


def _names(call: CallContext) -> list[tuple[str, str]]:
    """Return the actual and the formal name of each input."""
    if not call.body_runs or call.function is None:
        return []
    actual = [value.name or "" if value is not None else "" for value in call.node.inputs]
    return list(zip(actual, (value.name or "" for value in call.function.inputs), strict=False))


def _collision(call: CallContext) -> str | None:
    for actual, formal in _names(call):
        if actual != formal and formal in call.tensors:
            return f"the formal input {formal} is bound to the outer tensor {formal} instead of {actual}"
    return None


def _alias(call: CallContext) -> str | None:
    names = _names(call)
    for index, (actual, formal) in enumerate(names):
        if actual != formal and any(later == formal for later, _ in names[index + 1 :]):
            return f"the formal input {formal} takes {actual}, and so does a later input that is called {formal}"
    return None


def _same_name(call: CallContext) -> str | None:
    if len(call.same_name) < 2 or not call.body_runs:
        return None
    return f"{' and '.join(call.same_name)} share a name, and the first is used for both"


def _opset(call: CallContext) -> str | None:
    if not call.body_runs or call.function is None:
        return None
    versions = [call.function.opset_imports[name] for name in STANDARD_DOMAINS if name in call.function.opset_imports]
    if not versions or versions[0] == call.opset:
        return None
    return f"the body is of opset {versions[0]} and is read as of opset {call.opset}"


RULES: tuple[Rule, ...] = (
    CallRule(
        id="operator-unknown",
        title="neither an operator nor a function nor a known plugin",
        severity=Severity.REJECTED,
        remedy="Add the function's body to the model, or name the plugin that the target loads with --plugin.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_unknown,
    ),
    CallRule(
        id="plugin-namespace",
        title="plugin node without its namespace",
        severity=Severity.REJECTED,
        remedy="Write plugin_namespace and plugin_version on the node (edgeattn.export.surgery.attach_plugins does).",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.10",
        mark=Mark.OBSERVED,
        before=(10, 10),
        find=_without_namespace,
    ),
    CallRule(
        id="plugin-ignored",
        title="the function hides the plugin",
        severity=Severity.ATTENTION,
        remedy="Strip the functions for this target (edgeattn.export.surgery.strip_bodies), or mean the function.",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.7",
        mark=Mark.OBSERVED,
        before=(10, 7),
        unverified="10.4 to 10.6",
        find=_ignored_plugin,
    ),
    CallRule(
        id="plugin-not-asked-for",
        title="the plugin is not asked for",
        severity=Severity.ADVICE,
        remedy="Write plugin_namespace and plugin_version on the node to run the plugin.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        since=(10, 7),
        find=_idle_plugin,
    ),
    CallRule(
        id="function-inputs",
        title="call with other inputs than the function has",
        severity=Severity.REJECTED,
        remedy="Give every input; write one function for each set of optional inputs.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_inputs,
    ),
    CallRule(
        id="function-outputs",
        title="call that leaves an output out",
        severity=Severity.REJECTED,
        remedy="Name every output of the call, also those that nothing reads.",
        source=f"{OBSERVATIONS}; {CHANGES}, 10.6",
        mark=Mark.OBSERVED,
        since=(10, 6),
        unverified="10.6 to 10.9",
        find=_outputs,
    ),
    CallRule(
        id="function-formal-names",
        title="formal name that an outer tensor has: the wrong tensor is read, without an error",
        severity=Severity.REJECTED,
        remedy=_UNIQUE,
        source=f"{OBSERVATIONS}; {CHANGES}, 10.8",
        mark=Mark.OBSERVED,
        before=(10, 8),
        find=_collision,
    ),
    CallRule(
        id="function-permuted-names",
        title="formal names that are actual names in another order: one tensor is read twice, without an error",
        severity=Severity.ATTENTION,
        remedy=_UNIQUE,
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        since=(10, 8),
        unverified="10.11 and later",
        find=_alias,
    ),
    CallRule(
        id="function-same-name",
        title="functions of one name in several domains",
        severity=Severity.ATTENTION,
        remedy="Give every function a name of its own; domains do not count.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_same_name,
    ),
    CallRule(
        id="function-opset",
        title="function of another opset than the model",
        severity=Severity.ATTENTION,
        remedy="Give function and model the same version of ai.onnx.",
        source=PARSER,
        mark=Mark.CODE,
        find=_opset,
    ),
)


def plugin_preferred(version: tuple[int, int]) -> bool:
    """Say whether a version runs a registered plugin rather than a function of the same name."""
    return version >= (10, 7)


def describe_choice(call: CallContext) -> str:
    """Say what runs for a call, for reports."""
    if call.plugin_runs:
        return f"plugin {call.namespace or call.node.domain}::{call.node.op_type}"
    return "function body" if call.function is not None else f"nothing in TensorRT {version_text(call.version)}"
