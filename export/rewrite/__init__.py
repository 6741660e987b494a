"""Recognition of attention cores in ONNX graphs that other tools wrote.

`structure` proposes, by following tensors through the graph (`trace`, `sizes`); `verify` decides, by running the core
(`region`) beside its replacement (`candidates`); `diagnose` explains a refusal; `apply` edits the graph.
"""

from edgeattn.export.rewrite.rewriter import Refusal, Replacement, RewriteResult, rewrite

__all__ = ["Refusal", "Replacement", "RewriteResult", "rewrite"]
