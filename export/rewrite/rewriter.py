"""Recognises attention cores in graphs that others exported, and replaces them by plugin nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs

from edgeattn.export.graph import export_graph, import_graph, module_path
from edgeattn.export.names import unique_node_names
from edgeattn.export.rewrite.apply import Editor
from edgeattn.export.rewrite.candidates import Candidate, build
from edgeattn.export.rewrite.co_attention import are_opposite, have_same_gate, join_directions, value_fault, with_gate
from edgeattn.export.rewrite.region import Cutter
from edgeattn.export.rewrite.sizes import Sizes
from edgeattn.export.rewrite.structure import Findings, find
from edgeattn.export.rewrite.trace import Tracer
from edgeattn.export.rewrite.verify import Verdict, Verifier
from edgeattn.export.surgery import attach_plugins, default_opset
from edgeattn.plugins_trt import CO_ATTENTION, CO_ATTENTION_GATED

# Heights and widths to try in a model of free size, in pairs: the first is used to read the graph, both to verify.
# None is square, and each fits networks that reduce the resolution by 8 times more than the one before.
_TRIALS = (((5, 7), (6, 4)), ((40, 56), (48, 32)), ((160, 224), (192, 128)), ((320, 448), (384, 256)))
_SMALLEST_MAP = 3  # on a smaller attended map, a column may be the whole map


@dataclass(frozen=True)
class Replacement:
    """A core that was replaced.

    Attributes:
        operation: the plugin operation.
        module: path of the torch module it came from, empty when the graph does not say.
        node: name of the plugin node.
        difference: relative L2 difference between the core and the operation on random inputs.
    """

    operation: str
    module: str
    node: str
    difference: float


@dataclass(frozen=True)
class Refusal:
    """Something that looks like a core and is not one.

    Attributes:
        module: path of the torch module it came from, empty when the graph does not say.
        node: name of its softmax node.
        reason: what is different.
    """

    module: str
    node: str
    reason: str


@dataclass(frozen=True)
class RewriteResult:
    """Outcome of `rewrite`.

    Attributes:
        model: the model with plugin nodes and their bodies; the given one when nothing was replaced.
        accepted: what was replaced, in graph order.
        refused: what was left alone although it looks alike, in graph order.
    """

    model: onnx.ModelProto
    accepted: tuple[Replacement, ...]
    refused: tuple[Refusal, ...]


def rewrite(model: onnx.ModelProto, *, seed: int = 0) -> RewriteResult:
    """Replace criss-cross and co-attention cores, whatever way they are written, by plugin nodes.

    A core is found by structure and accepted by numbers: it is cut out and run beside its replacement on random
    inputs, at two sizes where the model leaves the size free. Everything else in the model stays as it was. CCNet's
    gamma moves from the result to the values (into the convolution that yields them, where nothing else reads it), a
    constant factor on the energies moves to the query, and a graph that adds no residual gets one of zeros.

    Args:
        model: any ONNX model; not modified.
        seed: of the random inputs.

    Returns:
        The rewritten model, what was replaced, and what was not, with the reason.

    Raises:
        UserError: the model has a core, but its opset is too old for the replacement.
    """
    graph = import_graph(model)
    trials, tracer, findings = _read(model, graph)
    softmax_order = {id(node): index for index, node in enumerate(graph.nodes)}
    if not findings.criss_cross and not findings.one_way:
        return RewriteResult(model, (), _refusals(model, findings.refused))
    verifier = Verifier(Cutter(model, trials, opset=default_opset(model)), seed=seed)
    accepted, refused = _verify(tracer, findings, verifier)
    accepted.sort(key=lambda item: softmax_order[id(item.candidate.softmax)])
    refused.sort(key=lambda item: softmax_order[id(item[0])])
    if not accepted:
        return RewriteResult(model, (), _refusals(model, refused))
    result, replaced = _apply(model, graph, accepted, static=trials[0].static)
    return RewriteResult(result, replaced, _refusals(model, refused))


def _read(model: onnx.ModelProto, graph: gs.Graph) -> tuple[list[Sizes], Tracer, Findings]:
    """Choose trial sizes at which the attended maps are large enough to be told apart, and find the candidates."""
    best: tuple[tuple[int, int], Tracer, Findings, tuple[int, int]] | None = None
    for first, second in _TRIALS:
        tracer = Tracer(graph, Sizes(model, height=first[0], width=first[1]))
        findings = find(tracer)
        candidates = [*findings.criss_cross, *(candidate for _, candidate in findings.one_way)]
        score = len(candidates), len(findings.refused)
        if best is None or score > best[0]:
            best = score, tracer, findings, second
        maps = [feed.shape[2:] for candidate in candidates for feed in candidate.feeds]
        clear = [min(shape) >= _SMALLEST_MAP and shape[0] != shape[1] for shape in maps]
        if tracer.sizes.static or (clear and all(clear)):
            break
    assert best is not None  # there are trials
    _, tracer, findings, second = best
    if tracer.sizes.static:
        return [tracer.sizes], tracer, findings
    return [tracer.sizes, Sizes(model, height=second[0], width=second[1])], tracer, findings


Refused = list[tuple[gs.Node, str, str]]


@dataclass(frozen=True)
class _Found:
    """A verified core, and the same core with the gate that follows it, where that was verified too."""

    candidate: Candidate
    verdict: Verdict
    gated: _Found | None = None


def _verify(tracer: Tracer, findings: Findings, verifier: Verifier) -> tuple[list[_Found], Refused]:
    """Run every candidate beside its replacement."""
    accepted: list[_Found] = []
    refused: Refused = list(findings.refused)
    groups: dict[str, list[_Found]] = defaultdict(list)
    for group, candidate in [*(("", item) for item in findings.criss_cross), *findings.one_way]:
        verdict = verifier.check(candidate)
        found = _Found(candidate.swapped() if verdict.swapped else candidate, verdict)
        if group and not verdict.reason:
            found = replace(found, verdict=replace(verdict, reason=value_fault(tracer, found.candidate)))
        if group:
            groups[group].append(found)
        elif verdict.reason:
            refused.append((candidate.softmax, "", verdict.reason))
        else:
            accepted.append(found)
    for group, members in groups.items():
        almost = [reason for _, other, reason in findings.refused if other == group]
        almost += [member.verdict.reason for member in members if member.verdict.reason]
        if not almost:
            accepted.extend(_join(tracer, members, verifier))
        for member in members if almost else ():
            other = f"the other direction of the same affinity is refused: {almost[0]}"
            refused.append((member.candidate.softmax, "", member.verdict.reason or other))
    return _one_arity(accepted), refused


def _join(tracer: Tracer, members: Sequence[_Found], verifier: Verifier) -> list[_Found]:
    """Join two directions of one affinity into one operation, and add the gates where there are any."""
    gates = [with_gate(tracer, member.candidate) for member in members]
    if len(members) == 2 and are_opposite(members[0].candidate, members[1].candidate):
        pair = join_directions(members[0].candidate, members[1].candidate, CO_ATTENTION)
        both = None
        if gates[0] is not None and gates[1] is not None and have_same_gate(gates[0], gates[1]):
            both = join_directions(gates[0], gates[1], CO_ATTENTION_GATED)
        verdict = verifier.check(pair)
        if not verdict.reason and not verdict.swapped:
            return [_Found(pair, verdict, _verified(both, verifier))]
    return [replace(member, gated=_verified(gate, verifier)) for member, gate in zip(members, gates, strict=True)]


def _verified(candidate: Candidate | None, verifier: Verifier) -> _Found | None:
    verdict = verifier.check(candidate) if candidate is not None else None
    if candidate is None or verdict is None or verdict.reason or verdict.swapped:
        return None
    return _Found(candidate, verdict)


def _one_arity(found: Sequence[_Found]) -> list[_Found]:
    """Use an operation with its gate only where every core of the model that uses it has one."""
    ungated = {item.candidate.spec.op_type for item in found if item.gated is None}
    return [item.gated if item.gated and item.candidate.spec.op_type not in ungated else item for item in found]


def _apply(
    model: onnx.ModelProto, graph: gs.Graph, accepted: Sequence[_Found], *, static: bool
) -> tuple[onnx.ModelProto, tuple[Replacement, ...]]:
    """Edit the graph and bring it back."""
    protos = dict(zip(unique_node_names(model.graph), model.graph.node, strict=True))
    editor = Editor(graph)
    replaced = []
    for found in accepted:
        candidate = found.candidate
        module = module_path(*(protos[node.name] for node in candidate.core))
        snippet = build(candidate, editor.prefix(module or "attention"), static=static)
        editor.replace(candidate, snippet)
        editor.fold_matrices(snippet)
        editor.fold_factors(snippet)
        name = f"{snippet.prefix}/{candidate.spec.op_type}"
        replaced.append(Replacement(candidate.spec.op_type, module, name, found.verdict.difference))
    result = export_graph(editor.finish(), model, inherited=editor.inherited)
    return attach_plugins(result), tuple(replaced)


def _refusals(model: onnx.ModelProto, refused: Refused) -> tuple[Refusal, ...]:
    protos = dict(zip(unique_node_names(model.graph), model.graph.node, strict=True))
    return tuple(Refusal(module_path(protos[node.name]), node.name, reason) for node, _, reason in refused)
