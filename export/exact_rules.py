"""Makes the exporter's optimiser exact: as shipped, it takes x + 1e-9 for x + 0 and x * 1.000001 for x * 1.

torch's ONNX exporter runs onnxscript's rewrite rules, whose patterns compare constants with a relative tolerance of
1e-5 and an absolute one of 1e-8. The rules that remove operations would so drop an epsilon under a division (0 / 0
instead of 0) or a scale near one, without a word.
"""

from __future__ import annotations

from onnxscript.rewriter._pattern_ir import Constant
from onnxscript.rewriter.rules.common import _no_op


def make_no_op_rules_exact() -> None:
    """Let the rules that remove additions of 0 and products with 1 match these numbers only; idempotent."""
    for rule in _no_op.rules.rules:
        for node in rule._target_pattern._nodes:
            for value in node.inputs:
                if isinstance(value, Constant):
                    value._rel_tol = value._abs_tol = 0.0
