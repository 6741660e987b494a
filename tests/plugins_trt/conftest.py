"""Models of one plugin node."""

from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from edgeattn.plugins_trt import DOMAIN, PluginSpec, TensorSpec
from edgeattn.plugins_trt.onnx_form import local_function


def _one_node_model(
    spec: PluginSpec, element_type: int, opset: int, sizes: dict[str, int], *, fp32_island: bool
) -> onnx.ModelProto:
    def info(tensors: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(tensor.name, element_type, spec.shape_of(tensor, sizes)) for tensor in tensors
        ]

    node = helper.make_node(
        spec.op_type, [t.name for t in spec.inputs], [t.name for t in spec.outputs], name="call", domain=DOMAIN
    )
    graph = helper.make_graph([node], "call", info(spec.inputs), info(spec.outputs))
    return helper.make_model(
        graph,
        functions=[local_function(spec, opset, fp32_island=fp32_island)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


@pytest.fixture
def one_node_model() -> Callable[..., onnx.ModelProto]:
    """A function (spec, element type, opset, sizes, fp32_island) that makes a model which only calls the operation."""
    return _one_node_model
