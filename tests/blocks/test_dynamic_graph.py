"""Dynamic graph message passing beyond the common contract."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch.nn import functional as F

from edgeattn.blocks.dynamic_graph import DynamicGraphMessagePassing, neighbours
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.to_onnx import to_onnx
from edgeattn.validation.randomise import randomise


def small() -> DynamicGraphMessagePassing:
    return randomise(DynamicGraphMessagePassing(8, group=4, dilation=(1, 2, 3, 4)))


def change(block: DynamicGraphMessagePassing, branch: str, rows: slice) -> float:
    """Return how far the result moves with the sign of some rows of a branch's kernel."""
    x = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    before = block(x)
    with torch.no_grad():
        getattr(block, f"kernel_conv{branch}").weight[rows].neg_()
    return (block(x) - before).abs().max().item()


def test_last_branch_reads_its_affinity_from_the_last_filters() -> None:
    for branch in "abc":
        assert change(small(), branch, slice(36, 45)) > 1e-3
    assert change(small(), "d", slice(36, 45)) == 0
    block = small()
    x = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    before = block(x)
    with torch.no_grad():
        block.kernel_convd.weight[27:36] *= 2  # the last group's filters
    assert ((block(x) - before)[:, :6].abs() > 1e-4).any(), "the affinity of the other groups did not change"


def test_offsets_are_y_then_x_for_each_tap() -> None:
    still, _ = neighbours(torch.zeros(1, 18, 6, 7), 1)
    for tap in range(9):
        for axis, step in ((0, 7 + 3), (1, 1)):
            offsets = torch.zeros(1, 18, 6, 7)
            offsets[:, 2 * tap + axis] = 1
            moved, _ = neighbours(offsets, 1)
            expected = torch.zeros(9, dtype=torch.int64)
            expected[tap] = step
            centre = 2 * 7 + 3
            assert torch.equal((moved - still)[0, centre], expected)


@pytest.mark.parametrize("grain", [1.0, 0.5, 0.01], ids=["whole", "half", "any"])
def test_reads_are_bilinear_with_zeros_outside_exactly_on_borders_too(grain: float) -> None:
    height, width, dilation = 4, 6, 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    offsets = 4 * torch.randn(2, 18, height, width, generator=generator, dtype=torch.float64)
    offsets = (offsets / grain).round() * grain
    place, share = neighbours(offsets, dilation)
    ringed = F.pad(x, (1, 2, 1, 2)).flatten(2)
    read = torch.zeros(2, 3, height * width, 9, dtype=torch.float64)
    for corner, step in enumerate((0, 1, width + 3, width + 4)):
        index = (place + step).flatten(1)[:, None].expand(-1, 3, -1)
        read += ringed.gather(2, index).unflatten(2, (height * width, 9)) * share[corner][:, None]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for tap in range(9):
        y = rows + dilation * (tap // 3 - 1) + offsets[:, 2 * tap]
        places = columns + dilation * (tap % 3 - 1) + offsets[:, 2 * tap + 1]
        grid = torch.stack([2 * places / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=3)
        expected = F.grid_sample(x, grid, align_corners=True)
        assert torch.allclose(read[..., tap].unflatten(2, (height, width)), expected, atol=1e-12)


def test_places_never_pass_through_fp16() -> None:
    x = torch.randn(1, 8, 5, 6)
    model = to_fp16(to_onnx(small(), (x,), input_names=["x"], output_names=["y"])).model
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    made = {name: node for node in model.graph.node for name in node.output}
    halves, places = 0, 0
    for node in model.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.INT64:
            places += 1
            source = made[node.input[0]]
            while source.op_type != "Cast":  # back to where the offsets leave their convolution
                halves += types[source.output[0]] == onnx.TensorProto.FLOAT16
                source = made[next(name for name in source.input if name in made)]
    assert places == 8
    assert halves == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="group = 3"):
        DynamicGraphMessagePassing(8, group=3)
    with pytest.raises(ValueError, match="3 entries"):
        DynamicGraphMessagePassing(8, dilation=(1, 2, 3))
    with pytest.raises(ValueError, match="'deformable'"):
        DynamicGraphMessagePassing(8, deform="deformable")
