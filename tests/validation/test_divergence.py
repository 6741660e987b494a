"""The first divergence: where it is, what is left alone, and what a user can get wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeattn.cli.main import main
from edgeattn.export.fp16 import to_bf16, to_fp16
from edgeattn.export.metadata import NAME_SCOPES
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.divergence import OnnxForm, RunnerForm, Search, TorchForm, bisect, write_divergence
from edgeattn.validation.divergence.forms import relative_l2
from edgeattn.validation.divergence.reduction import fails, write_minimal
from edgeattn.validation.divergence.scopes import Place, ScopedGraph
from edgeattn.validation.runners import facts_of, onnx_runner

SHAPE = (1, 3, 12, 10)
FEED = {"image": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}


class Unit(nn.Module):
    """A residual unit whose one ReLU is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(self.conv(x)) + x)


class Net(nn.Module):
    """A stem with a normalisation that is folded, and one unit applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.unit = Unit()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(image))
        for _ in range(3):
            x = self.unit(x)
        return self.head(x).softmax(dim=1)


@pytest.fixture(scope="module")
def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.norm.running_mean, -1, 1)
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def clean(network: Net) -> onnx.ModelProto:
    return to_onnx(network, [torch.zeros(SHAPE)], input_names=["image"], output_names=["out"])


def saved(model: onnx.ModelProto, path: Path) -> OnnxForm:
    onnx.save(model, path)
    return OnnxForm(path)


def torch_side(network: Net) -> TorchForm:
    return TorchForm(network, ["image"], ["out"])


def edited(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    change(copy)
    return copy


def nodes(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


def wrong_bias(model: onnx.ModelProto, call: int) -> None:
    """Give one call of the unit's convolution another bias than the other calls."""
    node = nodes(model, "Conv")[1 + call]
    bias = next(item for item in model.graph.initializer if item.name == node.input[2])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.1, "wrong"))
    node.input[2] = "wrong"


def without_metadata(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        del node.metadata_props[:]


def test_calls_of_one_module_are_told_apart(clean: onnx.ModelProto) -> None:
    places = ScopedGraph(clean).places({})
    outs = [name for node in nodes(clean, "Relu") for name in node.output]
    assert [places[Place("unit.relu", call, "out")] for call in range(6)] == outs
    assert [places[Place("unit", call, "out")] for call in range(3)] == outs[1::2]
    assert [places[Place("unit", call, "in")] for call in range(1, 3)] == outs[1:5:2]


def test_right_forms_do_not_diverge(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    fp32, fp16 = saved(clean, tmp_path / "fp32.onnx"), saved(to_fp16(clean).model, tmp_path / "fp16.onnx")
    for reference, candidate in ((torch_side(network), fp32), (torch_side(network), fp16), (fp32, fp16), (fp16, fp32)):
        found = bisect(reference, candidate, [FEED, {"image": FEED["image"] * 3}])
        assert not found.found, found.verdict
        assert found.samples == 2
        assert found.aligned_by == "module path"
        assert len(found.points) >= 12
        assert found.outputs[0].agrees
        assert "rounding explains every difference" in found.verdict


@pytest.mark.parametrize("call", [0, 1, 2])
def test_the_call_is_named_and_the_error_is_split(
    network: Net, clean: onnx.ModelProto, tmp_path: Path, call: int
) -> None:
    form = saved(edited(clean, lambda model: wrong_bias(model, call)), tmp_path / "bad.onnx")
    found = bisect(torch_side(network), form, [FEED])
    assert found.found
    assert found.first is not None
    assert (found.first.module, found.first.call) == ("unit.conv", call + 1)
    assert found.culprits == (found.first,)  # what follows inherits its error, however large
    assert found.first.inherited < 1e-5 < found.first.local
    assert found.first.total == pytest.approx(found.first.local, rel=1e-3)
    later = found.points[-1]
    assert later.total > 1e-4
    assert later.total == pytest.approx(later.inherited, rel=1e-2)
    assert later.local <= later.limit


def test_a_lost_module_is_named(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    def lose(model: onnx.ModelProto) -> None:
        relu = nodes(model, "Relu")[2]
        for node in model.graph.node:
            node.input[:] = [relu.input[0] if name == relu.output[0] else name for name in node.input]
        model.graph.node.remove(relu)

    found = bisect(torch_side(network), saved(edited(clean, lose), tmp_path / "bad.onnx"), [FEED])
    assert found.first is not None
    assert found.first.module == "unit.relu"
    assert found.first.missing == ("unit.relu",)
    assert "left no node in the graph" in found.verdict


def test_a_lost_step_between_modules_belongs_to_the_module_around(
    network: Net, clean: onnx.ModelProto, tmp_path: Path
) -> None:
    def lose(model: onnx.ModelProto) -> None:
        add = nodes(model, "Add")[1]
        for node in model.graph.node:
            node.input[:] = [add.input[0] if name == add.output[0] else name for name in node.input]
        model.graph.node.remove(add)

    found = bisect(torch_side(network), saved(edited(clean, lose), tmp_path / "bad.onnx"), [FEED])
    assert found.first is not None
    assert found.first.module == "unit"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_sided_infinities_diverge(network: Net, clean: onnx.ModelProto, tmp_path: Path, value: float) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), "spoilt"))
        add = nodes(model, "Add")[2]
        add.input[1] = "spoilt"

    found = bisect(torch_side(network), saved(edited(clean, spoil), tmp_path / "bad.onnx"), [FEED])
    assert found.first is not None
    assert found.first.module == "unit"
    assert found.first.local == np.inf
    record = json.loads(write_divergence(found, tmp_path / "record.json").read_text())
    assert record["points"][[point["diverges"] for point in record["points"]].index(True)]["local"] == "inf"


def test_equal_infinities_are_no_difference() -> None:
    reference = np.array([1.0, np.inf, -np.inf, np.nan])
    assert relative_l2(reference, reference.copy()) == 0
    assert relative_l2(reference, np.array([1.5, np.inf, -np.inf, np.nan])) == pytest.approx(0.5)
    assert relative_l2(reference, np.array([1.0, -np.inf, -np.inf, np.nan])) == np.inf
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0
    assert relative_l2(np.zeros(3), np.ones(3)) == np.inf


def test_fp16_overflow_is_named_where_it_happens(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    half = to_fp16(clean).model
    huge = {"image": FEED["image"] * 1e5}
    found = bisect(torch_side(network), saved(half, tmp_path / "half.onnx"), [huge])
    assert found.first is not None
    assert found.first.local == np.inf
    assert not bisect(torch_side(network), saved(half, tmp_path / "half.onnx"), [FEED]).found


def test_bf16_forms_are_held_to_their_own_rounding(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    form = saved(to_bf16(clean).model, tmp_path / "right.onnx")
    assert form.precision == "bf16"
    right = bisect(torch_side(network), form, [FEED])
    assert not right.found, right.verdict
    assert "BF16 roundings in sequence" in right.points[0].derivation
    assert max(point.local for point in right.points) > 2.0**-11  # FP16's rounding would not explain it
    wrong = saved(to_bf16(edited(clean, lambda model: wrong_bias(model, 1))).model, tmp_path / "wrong.onnx")
    found = bisect(torch_side(network), wrong, [FEED])
    assert found.first is not None
    assert (found.first.module, found.first.call) == ("unit.conv", 2)
    # Of an FP16 and a BF16 form the latter is taken apart, whichever is under test.
    half = saved(to_fp16(clean).model, tmp_path / "half.onnx")
    assert Search(form, half).dissected is form
    assert not bisect(form, half, [FEED]).found


def test_nodes_that_cannot_run_are_named(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    def pad(model: onnx.ModelProto) -> None:
        node = nodes(model, "Conv")[2]
        for attribute in node.attribute:
            if attribute.name == "pads":
                attribute.ints[:] = [0, 0, 0, 0]

    found = bisect(torch_side(network), saved(edited(clean, pad), tmp_path / "bad.onnx"), [FEED])
    assert found.first is not None
    assert (found.first.module, found.first.call) == ("unit.conv", 2)
    assert "shape" in str(found.first.failure)


def test_results_of_one_module_are_assigned_by_their_values(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = x * 2
            return first.softmax(dim=1), first  # not in the order of computation

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            weights, values = self.pair(image)
            return (weights - values).exp()

    model = to_onnx(Wrapped(), [torch.zeros(SHAPE)], input_names=["image"], output_names=["out"])
    form = saved(model, tmp_path / "pair.onnx")
    found = bisect(TorchForm(Wrapped(), ["image"], ["out"]), form, [FEED])
    assert not found.found, found.verdict
    assert [point.module for point in found.points].count("pair") == 2

    def swap(damaged: onnx.ModelProto) -> None:
        node = nodes(damaged, "Sub")[0]
        node.input[0], node.input[1] = node.input[1], node.input[0]

    bad = bisect(TorchForm(Wrapped(), ["image"], ["out"]), saved(edited(model, swap), tmp_path / "bad.onnx"), [FEED])
    assert bad.first is not None
    assert bad.first.tensor == "out"


def test_forms_without_module_paths_are_aligned_by_name(clean: onnx.ModelProto, tmp_path: Path) -> None:
    bare = saved(edited(clean, without_metadata), tmp_path / "bare.onnx")
    bad = edited(edited(clean, lambda model: wrong_bias(model, 1)), without_metadata)
    found = bisect(bare, saved(bad, tmp_path / "bad.onnx"), [FEED])
    assert found.aligned_by == "tensor name"
    assert "aligned by their names" in found.notes[0]
    assert found.first is not None
    assert found.first.tensor == nodes(bad, "Conv")[2].output[0]


def test_a_reference_is_taken_apart_for_a_runner(clean: onnx.ModelProto, tmp_path: Path) -> None:
    bad = edited(clean, lambda model: wrong_bias(model, 2))
    names = [name for node in bad.graph.node for name in node.output]
    bad.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names[:-1])
    onnx.save(bad, tmp_path / "engine.onnx")
    with onnx_runner(tmp_path / "engine.onnx", facts_of(bad, tmp_path / "engine.onnx")) as runner:
        found = bisect(saved(clean, tmp_path / "clean.onnx"), RunnerForm(runner, name="engine"), [FEED])
    assert found.dissected == "clean.onnx"
    assert found.first is not None
    assert (found.first.module, found.first.call) == ("unit.conv", 3)
    assert "cannot be taken apart" in found.notes[0]


def test_memory_is_what_later_parts_still_read(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    search = Search(torch_side(network), saved(clean, tmp_path / "clean.onnx"))
    search.run([FEED])
    largest = 4 * 4 * 12 * 10
    assert search.peak_bytes <= 8 * largest
    assert len(search.segments) * largest > 10 * largest


def test_outputs_as_one_graph_that_differ_are_a_divergence(
    network: Net, clean: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = saved(clean, tmp_path / "clean.onnx")
    whole = form.unmarked
    monkeypatch.setattr(form, "unmarked", lambda feed: {name: array * 1.01 for name, array in whole(feed).items()})
    found = bisect(torch_side(network), form, [FEED])
    assert found.first is None
    assert found.found
    assert not found.outputs[0].agrees
    assert "as one graph gives another out" in found.verdict


def test_a_minimal_model_is_written_with_its_inputs(clean: onnx.ModelProto, tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        """Double what the second unit adds, in a step of its own inside the unit."""
        add = nodes(model, "Add")[1]
        doubled = helper.make_node("Add", [add.input[1], add.input[1]], ["doubled"], name="doubled")
        doubled.metadata_props.extend(add.metadata_props)
        add.input[1] = "doubled"
        model.graph.node.insert(list(model.graph.node).index(add), doubled)

    bad = saved(edited(clean, spoil), tmp_path / "bad.onnx")
    reference = saved(clean, tmp_path / "clean.onnx")
    search = Search(reference, bad)
    search.run([FEED])
    assert search.evidence is not None
    small = write_minimal(search.evidence, search.observed, tmp_path / "out")
    assert small.reduced
    assert small.nodes <= small.segment_nodes == 2
    model = onnx.load(small.model)
    assert all(any(entry.key == NAME_SCOPES for entry in node.metadata_props) for node in model.graph.node)
    known = {**np.load(small.inputs), **np.load(small.expected)}
    assert fails(model, known, search.evidence.allowed)
    right = edited(model, lambda copy: copy.graph.node.remove(copy.graph.node[0]) if len(copy.graph.node) > 1 else None)
    assert len(right.graph.node) >= 1
    torch_reference = write_minimal(search.evidence, object(), tmp_path / "other")
    assert not torch_reference.reduced
    assert torch_reference.nodes == torch_reference.segment_nodes


def test_bad_input_is_refused(network: Net, clean: onnx.ModelProto, tmp_path: Path) -> None:
    form = saved(clean, tmp_path / "clean.onnx")
    bare = saved(edited(clean, without_metadata), tmp_path / "bare.onnx")
    with pytest.raises(UserError, match="there is no sample"):
        bisect(form, form, [])
    with pytest.raises(UserError, match="neither PyTorch nor PyTorch is an ONNX form"):
        Search(torch_side(network), torch_side(network))
    with pytest.raises(UserError, match="does not say which torch module"):
        bisect(torch_side(network), bare, [FEED])
    with pytest.raises(UserError, match="no input 'image'"):
        bisect(form, form, [{"picture": FEED["image"]}])
    with pytest.raises(UserError, match="takes 1x3x12x10 as input image, but the data has 1x3x9x9"):
        bisect(form, form, [{"image": np.zeros((1, 3, 9, 9), np.float32)}])

    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "picture"
        model.graph.node[0].input[0] = "picture"

    other = saved(edited(clean, rename), tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not two forms of one model"):
        bisect(other, form, [FEED])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `edgeattn bisect` in this process: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeattn", "bisect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def test_command(clean: onnx.ModelProto, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    right, wrong, data = tmp_path / "right.onnx", tmp_path / "wrong.onnx", tmp_path / "data.npz"
    onnx.save(clean, right)
    onnx.save(edited(clean, lambda model: wrong_bias(model, 0)), wrong)
    np.savez(data, **FEED)
    status, out, _ = run(right, right, "--data", data)
    assert status == 0
    assert "rounding explains every difference" in " ".join(out.split())
    status, out, _ = run(right, wrong, "--data", data, "-o", tmp_path / "out")
    assert status == 1
    assert "first in unit.conv" in " ".join(out.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("divergence.json", "divergence.svg", "minimal.onnx", "minimal.inputs.npz", "minimal.expected.npz")
    }
    record = json.loads((tmp_path / "out" / "divergence.json").read_text())
    assert (record["found"], record["first"]) == (True, "unit.conv")
    for arguments, word in (
        ((right, wrong), "--data"),
        ((right, wrong, "--data", tmp_path / "absent.npz"), "absent.npz"),
        ((right, tmp_path / "absent.onnx", "--data", data), "absent.onnx"),
        (("bundled", wrong, "--data", data), "--model"),
        (("bundled", "bundled", "--model", "ccnet-digits"), "neither"),
        ((right, wrong, "--layout", "official"), "Drop --layout"),
        (("bundled", wrong, "--model", "ccnet-digits", "--layout", "absent"), "absent"),
    ):
        status, _, err = run(*arguments)
        assert status == 2
        assert word in err
        assert "Traceback" not in err
