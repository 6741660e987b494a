"""What TensorRT's ONNX parser takes: rules as data, checked on a CPU without TensorRT."""

from edgeattn.export.support.check import check_support
from edgeattn.export.support.result import ACCEPTED, CheckedNode, Finding, SupportReport
from edgeattn.export.support.rule import Mark, Rule, Severity
from edgeattn.export.support.versions import Version, parse_version, version_text

__all__ = [
    "ACCEPTED",
    "CheckedNode",
    "Finding",
    "Mark",
    "Rule",
    "Severity",
    "SupportReport",
    "Version",
    "check_support",
    "parse_version",
    "version_text",
]
