"""What the support check found: plain records for tables, JSON and reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgeattn.export.support.rule import Mark, Severity
from edgeattn.export.support.versions import UNVERIFIED_SINCE, Version, version_text

ACCEPTED = "accepted"
"""Verdict on a node or a model that no rule speaks against; advice does not."""


@dataclass(frozen=True)
class Finding:
    """One rule that one thing breaks.

    Attributes:
        rule: id of the rule.
        title: what is wrong, in one line.
        severity: what it means.
        subject: name of the node, input, output or constant; empty for the model as a whole.
        operator: the node's operator, with its domain; empty for anything else.
        module: path of the torch module it came from; empty where the model does not say.
        detail: what exactly is wrong, with the values.
        versions: TensorRT versions that the rule applies to.
        remedy: what to do.
        source: document the rule comes from.
        mark: how well the rule is known.
    """

    rule: str
    title: str
    severity: Severity
    subject: str
    operator: str
    module: str
    detail: str
    versions: str
    remedy: str
    source: str
    mark: Mark

    def as_dict(self) -> dict[str, str]:
        """Return the record as JSON types."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "subject": self.subject,
            "operator": self.operator,
            "module": self.module,
            "title": self.title,
            "detail": self.detail,
            "versions": self.versions,
            "remedy": self.remedy,
            "source": self.source,
            "mark": self.mark.value,
        }


@dataclass(frozen=True)
class CheckedNode:
    """The verdict on a node.

    Attributes:
        name: the node's name; `CALL/STEP` for a node of a function's body that TensorRT runs.
        operator: operator, with its domain.
        module: path of the torch module it came from; empty where the model does not say.
        runs: for plugin nodes and function calls, what TensorRT runs; empty for others.
        findings: the rules that it breaks.
    """

    name: str
    operator: str
    module: str
    runs: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """`rejected`, `needs attention` or `accepted`."""
        return _verdict(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types; findings are listed once, beside the nodes."""
        record = {"name": self.name, "operator": self.operator, "module": self.module, "verdict": self.verdict}
        return record | ({"runs": self.runs} if self.runs else {})


@dataclass(frozen=True)
class SupportReport:
    """What TensorRT's parser would say of a model, as far as a machine without TensorRT can tell.

    Attributes:
        model: name of the file.
        target: name of the deployment target; empty when only a version was given.
        tensorrt: TensorRT version.
        opset: version of the standard operators of the model.
        nodes: every node, those of control-flow bodies and of function bodies that run included.
        findings: all findings, the model's own first, then by node.
    """

    model: str
    target: str
    tensorrt: Version
    opset: int
    nodes: tuple[CheckedNode, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """`rejected`, `needs attention` or `accepted`."""
        return _verdict(self.findings)

    @property
    def unverified(self) -> bool:
        """Whether nobody has read or run this version's parser; it is taken to be as the last known one."""
        return self.tensorrt >= UNVERIFIED_SINCE

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes have each verdict."""
        counted = Counter(node.verdict for node in self.nodes)
        return {name: counted[name] for name in (ACCEPTED, Severity.ATTENTION.value, Severity.REJECTED.value)}

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings without advice, rejections first."""
        order = [Severity.REJECTED, Severity.ATTENTION]
        return tuple(finding for severity in order for finding in self.findings if finding.severity == severity)

    def passes(self, *, strict: bool = False) -> bool:
        """Say whether TensorRT takes the model; with `strict`, whether nothing needs attention either."""
        return self.verdict == ACCEPTED or (not strict and self.verdict == Severity.ATTENTION.value)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "model": self.model,
            "target": self.target or None,
            "tensorrt": version_text(self.tensorrt),
            "unverified": self.unverified,
            "opset": self.opset,
            "checked_on": "CPU, without TensorRT",
            "verdict": self.verdict,
            "counts": self.counts,
            "findings": [finding.as_dict() for finding in self.findings],
            "nodes": [node.as_dict() for node in self.nodes],
        }


def _verdict(findings: tuple[Finding, ...]) -> str:
    severities = {finding.severity for finding in findings}
    for severity in (Severity.REJECTED, Severity.ATTENTION):
        if severity in severities:
            return severity.value
    return ACCEPTED
