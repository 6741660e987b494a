"""Runners compute what they say they compute."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeattn.export.model_file import load_model
from edgeattn.foundation import UserError
from edgeattn.validation import runners
from edgeattn.validation.runners import FormFacts, TorchRunner


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, first, second):
        return self.norm(first) + second, self.frozen(second)


def test_torch_runner_evaluates_and_gives_the_mode_back():
    module = Branches()
    first, second = (np.random.default_rng(seed).standard_normal((1, 3, 4, 5)).astype(np.float32) for seed in (0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with TorchRunner(module, ["first", "second"], ["sum", "copy"]) as runner:
        assert not module.training
        assert torch.get_num_threads() == 1
        outputs = runner.infer({"second": second, "first": first})
        assert runner.last_inference_time() > 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert list(outputs) == ["sum", "copy"]
    # An untrained norm in evaluation mode divides by sqrt(1 + eps); in training mode it would normalise the batch.
    np.testing.assert_allclose(outputs["sum"], first / np.sqrt(1 + 1e-5) + second, rtol=1e-6, atol=1e-6)
    assert [module.training, module.norm.training, module.frozen.training] == [True, True, False]
    assert int(module.norm.num_batches_tracked) == 0


def test_torch_runner_refuses_unnamed_outputs():
    image = np.zeros((1, 3, 2, 2), np.float32)
    with TorchRunner(Branches(), ["first", "second"], ["sum"]) as runner, pytest.raises(ValueError, match="2 tensors"):
        runner.infer({"first": image, "second": image})


def test_torch_runner_accepts_one_tensor():
    with TorchRunner(nn.ReLU(), ["image"], ["output"]) as runner:
        output = runner.infer({"image": -np.ones((1, 3, 2, 2), np.float32)})["output"]
    assert not output.any()


def save(path, nodes, initializers, type_=TensorProto.FLOAT, shape=(1, 3, "h", "w")):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", type_, shape)],
        [helper.make_tensor_value_info("output", type_, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def squares(tmp_path):
    """output = 0.5 image^2, all in FP16."""
    nodes = [
        helper.make_node("Mul", ["image", "image"], ["square"]),
        helper.make_node("Mul", ["square", "half"], ["output"]),
    ]
    return save(tmp_path / "squares.onnx", nodes, {"half": np.float16(0.5)}, TensorProto.FLOAT16)


def facts(path):
    return runners.facts_of(load_model(path), path)


def test_facts(tmp_path, squares):
    found = facts(squares)
    assert found == FormFacts(
        nodes=2, plugin_nodes=0, bytes=squares.stat().st_size, fp16=True, qdq=False, half_inputs=("image",)
    )
    assert found.measured == f"{runners.MEASURED_ON}, FP16 emulated with rounding after each operation"
    quantised = facts(_quantised(tmp_path / "q.onnx"))
    assert (quantised.fp16, quantised.qdq) == (False, True)
    assert quantised.measured == f"{runners.MEASURED_ON}, Q/DQ computed as written"


def _quantised(path):
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["output"]),
    ]
    return save(path, nodes, {"scale": np.float32(0.25), "zero": np.int8(0)})


def test_qdq_is_computed_as_written(tmp_path):
    path = _quantised(tmp_path / "q.onnx")
    image = np.linspace(-40, 40, 12, dtype=np.float32).reshape(1, 3, 2, 2)
    with runners.onnx_runner(path, facts(path)) as runner:
        output = runner.infer({"image": image})["output"]
    np.testing.assert_array_equal(output, 0.25 * np.clip(np.rint(image / 0.25), -128, 127))


def test_fp16_goes_through_the_emulation(monkeypatch, squares):
    seen = []

    def emulate(model):
        seen.append(model)
        widened = helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT)
        minus = helper.make_node("Neg", ["wide"], ["output"])
        graph = helper.make_graph(
            [widened, minus],
            "g",
            list(model.graph.input),
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)

    monkeypatch.setattr(runners, "emulate_fp16", emulate)
    image = np.full((1, 3, 1, 1), 2.0, np.float32)
    with runners.onnx_runner(squares, facts(squares)) as runner:
        output = runner.infer(runners.feed_for(runner, facts(squares), {"image": image, "unused": image}))["output"]
    assert len(seen) == 1
    np.testing.assert_array_equal(output, -image)


def test_fp16_overflow_is_seen(squares):
    """300^2 does not fit into FP16, though half of it would: run natively, ONNX Runtime hides the overflow."""
    image = np.full((1, 3, 1, 1), 300.0, np.float32)
    with runners.onnx_runner(squares, facts(squares)) as runner:
        output = runner.infer(runners.feed_for(runner, facts(squares), {"image": image}))["output"]
    assert np.isinf(output).all()


def test_fp16_inputs_are_rounded(squares):
    image = np.full((1, 3, 1, 1), 1 + 2.0**-12, np.float32)
    with runners.onnx_runner(squares, facts(squares)) as runner:
        feed = runners.feed_for(runner, facts(squares), {"image": image})
        assert runner.infer(feed)["output"].astype(np.float32).item(0) == 0.5
    assert feed["image"].item(0) == 1.0


def test_accepts_reads_the_declared_sizes(tmp_path):
    node = [helper.make_node("Relu", ["image"], ["output"])]
    fixed = save(tmp_path / "fixed.onnx", node, {}, shape=(1, 3, 4, "w"))
    small, large = ({"image": np.zeros((1, 3, height, 7), np.float32)} for height in (4, 5))
    with runners.onnx_runner(fixed, facts(fixed)) as runner:
        assert runners.accepts(runner, small)
        assert not runners.accepts(runner, large)


def test_native_latency(squares):
    latency = runners.native_latency(squares, {"image": np.ones((1, 3, 2, 2), np.float32)}, runs=3, threads=1)
    assert 0 < latency.median_ms < 1000
    assert (latency.runs, latency.threads) == (3, 1)


def test_unreadable_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the model"):
        load_model(tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(UserError, match="is not an ONNX model"):
        load_model(broken)
