"""`Rule`: one thing that TensorRT's parser refuses, gets wrong in silence, or that deserves a look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from edgeattn.export.support.context import CallContext, ModelContext, NodeContext
from edgeattn.export.support.versions import OLDEST, Version, range_text


class Severity(str, Enum):
    """What a rule says of the node that breaks it."""

    REJECTED = "rejected"
    """The parser or the network refuses it, or is known to compute something else with no way around."""
    ATTENTION = "needs attention"
    """It is accepted, but something is lost, hazardous, or needed beside the model."""
    ADVICE = "advice"
    """It works; another form may work better."""


class Mark(str, Enum):
    """How well a rule is known."""

    OBSERVED = "observed"
    """The public parser of 10.3 and 10.10 was run, and did it."""
    CODE = "parser code"
    """Read in the parser's public code; not run."""
    HEADER = "header"
    """A rule of the library's headers, which no run has confirmed."""
    DOCUMENTED = "documented"
    """Stated in NVIDIA's documentation or change log."""
    ARITHMETIC = "arithmetic"
    """Follows from the number format, whatever the version."""


PARSER = "onnx-tensorrt, operator importers and checkers"
OBSERVATIONS = "edgeattn, observations of the parsers of 10.3 and 10.10"
TABLE = "onnx-tensorrt, docs/operators.md"
CHANGES = "onnx-tensorrt, docs/Changelog.md"
HEADERS = "TensorRT, NvInfer.h"


@dataclass(frozen=True)
class Rule:
    """What every rule declares.

    Attributes:
        id: short unique name, which may be quoted in a bug report.
        title: what is wrong, in one line.
        severity: what it means for the node.
        remedy: what to do.
        source: document the rule comes from.
        mark: how well it is known.
        since: first TensorRT version it applies to.
        before: first version it no longer applies to; None for all later ones.
        unverified: which part of the version range nobody has confirmed; empty for none.
    """

    id: str
    title: str
    severity: Severity
    remedy: str
    source: str
    mark: Mark
    since: Version = OLDEST
    before: Version | None = None
    unverified: str = ""

    def covers(self, version: Version) -> bool:
        """Say whether the rule applies to a TensorRT version."""
        return self.since <= version and (self.before is None or version < self.before)

    @property
    def versions(self) -> str:
        """The TensorRT versions it applies to, in words."""
        text = range_text(self.since, self.before)
        return f"{text} ({self.unverified} unverified)" if self.unverified else text


@dataclass(frozen=True)
class NodeRule(Rule):
    """A rule about a node of the graph, of a control-flow body, or of a function body that TensorRT runs.

    Attributes:
        operators: operators it is about; empty for all.
        find: returns what exactly is wrong with a node, or None.
    """

    operators: frozenset[str] = frozenset()
    find: Callable[[NodeContext], str | None] = lambda node: None


@dataclass(frozen=True)
class CallRule(Rule):
    """A rule about a node that is a plugin or calls a local function.

    Attributes:
        find: returns what exactly is wrong with a call, or None.
    """

    find: Callable[[CallContext], str | None] = lambda call: None


@dataclass(frozen=True)
class ModelRule(Rule):
    """A rule about inputs, outputs, constants or the whole model.

    Attributes:
        find: yields the name of each thing that breaks it, and what exactly is wrong.
    """

    find: Callable[[ModelContext], Iterator[tuple[str, str]]] = lambda model: iter(())
