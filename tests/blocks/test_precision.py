"""A step that its block marks stays in FP32, closed, and nothing else does."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from torch import nn

from edgeattn.blocks import Fp32Step
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.to_onnx import to_onnx


def gram(x: torch.Tensor) -> torch.Tensor:
    """Sum over positions and divide by their number; the sum exceeds FP16's range."""
    return torch.matmul(x, x.transpose(1, 2)) / x.shape[2]


class GramNetwork(nn.Module):
    """The same step twice: marked, and plain."""

    def __init__(self) -> None:
        super().__init__()
        self.marked = Fp32Step(gram)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.marked(x * 2), gram(x * 4)


def test_only_marked_steps_stay_in_fp32() -> None:
    x = torch.full((1, 3, 400), 8.0)
    model = to_onnx(GramNetwork(), [x], input_names=["x"], output_names=["marked", "plain"])
    result = to_fp16(model)
    policy = {name for name, reason in result.fp32_nodes.items() if reason == "the block's policy"}
    operators = {node.op_type for node in result.model.graph.node if node.name in policy}
    assert operators == {"Transpose", "MatMul", "Div"}
    assert sum(node.op_type == "MatMul" for node in result.model.graph.node) == 2
    session = onnxruntime.InferenceSession(
        emulate_fp16(result.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    marked, plain = session.run(None, {"x": x.numpy()})
    assert (marked == 256).all()
    assert not np.isfinite(plain).any()
