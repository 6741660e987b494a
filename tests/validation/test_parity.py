"""A right form passes, every wrong one fails with its reason."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgeattn.export.engine import AGREES
from edgeattn.export.model_file import load_model
from edgeattn.foundation import UserError
from edgeattn.models.spec import ModelSpec, OutputSpec, Preprocessing, Sample
from edgeattn.validation import open_form, runners
from edgeattn.validation.engine_runner import EngineDescription
from edgeattn.validation.parity import Form, compare_forms, compare_sizes, write_parity
from edgeattn.validation.tolerance import UserLimits

HEIGHT, WIDTH, COUNT = 24, 32, 5


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()

    def forward(self, image):
        logits = self.head(image)
        return logits, logits.mean(dim=1)


def samples(count=COUNT):
    """Random images; the target is what the network says, but for a corner."""
    network = Segmenter().eval()
    for index in range(count):
        image = np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        with torch.no_grad():
            target = network(torch.from_numpy(PREPROCESSING(image)))[0].argmax(1).numpy()
        target[:, :6, :6] = 0
        yield Sample((image,), target)


PREPROCESSING = Preprocessing("RGB", 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SPEC = ModelSpec(
    name="tiny",
    summary="one convolution",
    network=Segmenter,
    arguments={},
    small={},
    original="unused:unused",
    inputs=("image",),
    outputs=(OutputSpec("logits", "logits"), OutputSpec("extra", "logits", auxiliary=True)),
    preprocessing=PREPROCESSING,
    size=(HEIGHT, WIDTH),
    classes=("background", "a", "b", "c"),
    labels=lambda outputs, size: outputs["logits"].argmax(1, keepdim=True),
    samples=samples,
)


WEIGHT = Segmenter().head.weight.detach().numpy()


def save(path, nodes, arrays, *, output="logits", size=("h", "w")):
    """Write a graph from `image` to `output`."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, *size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "classes", *size])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def conv(source, result):
    return helper.make_node("Conv", [source, "weight"], [result], pads=[1, 1, 1, 1], name="/head")


def write_form(path, *tail, weight=WEIGHT, output="logits", size=("h", "w"), **constants):
    """Write the convolution, followed by the nodes `tail` that lead from `conv` to `logits`."""
    nodes = [conv("image", "conv" if tail else output), *tail]
    return save(path, nodes, {"weight": weight, **constants}, output=output, size=size)


def right(path):
    return Form("right", write_form(path), "fp32", plugin=False)


def quantised(path, scale):
    """Write the form with images quantised to INT8 in front of the convolution."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        conv("dq", "logits"),
    ]
    return save(path, nodes, {"weight": WEIGHT, "scale": np.float32(scale), "zero": np.int8(0)})


def half(path):
    """Write the form with the convolution in FP16 between two casts."""
    nodes = [
        helper.make_node("Cast", ["image"], ["narrow"], to=TensorProto.FLOAT16, name="in"),
        conv("narrow", "conv"),
        helper.make_node("Cast", ["conv"], ["logits"], to=TensorProto.FLOAT, name="out"),
    ]
    return save(path, nodes, {"weight": WEIGHT.astype(np.float16)})


def judge(*forms, count=COUNT, **options):
    return compare_forms(SPEC, Segmenter(), forms, samples(count), latency_runs=0, threads=1, **options)


def test_right_form_passes(tmp_path):
    done = []
    parity = judge(right(tmp_path / "right.onnx"), progress=done.append, pictures=2)
    entry = parity.forms[0]
    assert parity.passed
    assert entry.reasons == ()
    assert done == [1, 2, 3, 4, 5]
    assert list(entry.outputs) == ["logits"]
    assert entry.outputs["logits"].compared == COUNT * 4 * HEIGHT * WIDTH
    assert entry.outputs["logits"].worst_relative_l2 <= entry.tolerance.relative_l2 <= 1e-5
    assert entry.label_agreement == 1.0
    assert entry.score == parity.original
    assert 0.5 < parity.original.value < 1
    assert entry.measured == f"CPU, ONNX Runtime {parity.environment['onnxruntime']}"
    assert [picture.target.shape for picture in parity.pictures] == [(1, HEIGHT, WIDTH)] * 2
    np.testing.assert_array_equal(parity.pictures[1].forms["right"], parity.pictures[1].original)


def test_original_is_left_in_its_mode(tmp_path):
    network = Segmenter()
    compare_forms(SPEC, network, [right(tmp_path / "right.onnx")], samples(1), latency_runs=0)
    assert network.training


def test_slightly_wrong_weight_fails_with_the_number(tmp_path):
    weight = WEIGHT * np.float32(1.0001)
    wrong = Form("wrong", write_form(tmp_path / "wrong.onnx", weight=weight), "fp32", plugin=False)
    parity = judge(right(tmp_path / "right.onnx"), wrong)
    assert [entry.passed for entry in parity.forms] == [True, False]
    assert not parity.passed
    assert parity.forms[1].outputs["logits"].relative_l2 == pytest.approx(1e-4, rel=1e-2)
    assert parity.forms[1].reasons[0].startswith("output logits: relative L2 1.0")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_sided_value_fails(tmp_path, value):
    where = np.zeros((1, 1, HEIGHT, WIDTH), bool)
    where[..., 3, 4] = True
    replace = helper.make_node("Where", ["where", "value", "conv"], ["logits"])
    path = write_form(tmp_path / "nan.onnx", replace, where=where, value=np.float32(value))
    entry = judge(Form("nan", path, "fp32", plugin=False)).forms[0]
    assert entry.outputs["logits"].mismatched == COUNT * 4
    assert entry.reasons == (f"output logits: {COUNT * 4} values are NaN or infinite on one side only",)


def test_all_nan_on_both_sides_is_no_proof(tmp_path):
    network = Segmenter()
    nn.init.constant_(network.head.bias, math.nan)
    path = write_form(tmp_path / "nan.onnx", weight=np.full((4, 3, 3, 3), np.nan, np.float32))
    form = Form("nan", path, "fp32", plugin=False)
    parity = compare_forms(SPEC, network, [form], samples(1), latency_runs=0)
    assert "nothing could be compared" in parity.forms[0].reasons[0]


def test_int8_is_judged_by_the_task(tmp_path):
    fine = Form("fine", quantised(tmp_path / "fine.onnx", 2 / 127), "int8", plugin=False)
    coarse = Form("coarse", quantised(tmp_path / "coarse.onnx", 1.0), "int8", plugin=False)
    good, bad = judge(fine, coarse).forms
    assert good.passed
    assert good.outputs["logits"].relative_l2 > 1e-4
    assert good.measured.endswith("Q/DQ computed as written")
    assert not bad.passed
    assert "mIoU differs by" in bad.reasons[0]
    assert bad.task_drop > 0.01


def test_labels_of_the_original_stand_in_for_missing_targets(tmp_path):
    coarse = Form("coarse", quantised(tmp_path / "coarse.onnx", 1.0), "int8", plugin=False)
    unlabelled = [dataclasses.replace(sample, target=None) for sample in samples(2)]
    parity = compare_forms(SPEC, Segmenter(), [coarse], [*unlabelled, *samples(1)], latency_runs=0)
    only = compare_forms(SPEC, Segmenter(), [coarse], unlabelled, latency_runs=0)
    assert (parity.unlabelled, only.unlabelled) == (2, 2)
    assert parity.original.value < only.original.value == 1.0
    assert "2 samples have no target" in only.forms[0].reasons[0]
    assert only.pictures[0].target is None


def test_fp16_is_judged_by_labels_and_its_own_limit(tmp_path):
    form = Form("half", half(tmp_path / "half.onnx"), "fp16", plugin=False)
    entry = judge(form).forms[0]
    assert entry.passed
    assert entry.label_agreement >= 0.995
    assert 1e-4 < entry.outputs["logits"].relative_l2 <= entry.tolerance.relative_l2 < 1e-2
    assert entry.measured.endswith("FP16 emulated with rounding after each operation")


def test_int8_beyond_its_noise_fails_where_the_task_does_not_notice(tmp_path):
    fine = Form("fine", quantised(tmp_path / "fine.onnx", 2 / 127), "int8", plugin=False)
    rough = Form("rough", quantised(tmp_path / "rough.onnx", 40 / 127), "int8", plugin=False)
    spec = dataclasses.replace(SPEC, labels=lambda outputs, size: (outputs["logits"] > -1e9).long()[:, :1])
    good, bad = compare_forms(spec, Segmenter(), [fine, rough], samples(), latency_runs=0).forms
    assert good.passed
    assert bad.task_drop == 0
    assert bad.reasons[0].startswith("output logits: relative L2")


def test_limits_of_the_user_replace_the_derived_ones(tmp_path):
    form = right(tmp_path / "right.onnx")
    wrong = Form("wrong", write_form(tmp_path / "wrong.onnx", weight=WEIGHT * np.float32(1.0001)), "fp32", plugin=False)
    tight, loose = UserLimits.parse(["1e-9"]), UserLimits.parse(["logits:1e-3"])
    assert not judge(form, limits=tight).passed
    parity = judge(form, wrong, limits=loose)
    assert parity.passed
    assert parity.as_dict()["forms"][1]["tolerance"]["outputs"] == [
        {"output": "logits", "relative_l2": 1e-3, "max_abs": None}
    ]
    assert "Set by the user" in parity.forms[1].tolerance.derivation
    peak = parity.forms[1].outputs["logits"].max_abs
    assert judge(wrong, limits=UserLimits.parse([], [f"logits:{1.01 * peak}"])).passed
    reasons = judge(wrong, limits=UserLimits.parse([], [f"logits:{0.99 * peak}"])).forms[0].reasons
    assert reasons[0].startswith("output logits: absolute difference")
    checks = compare_sizes(SPEC, Segmenter(), [wrong], [(17, 33)], limits=loose)
    assert checks[0].reasons == ()
    with pytest.raises(UserError, match="'extra', but the model has logits"):
        judge(form, limits=UserLimits.parse(["extra:1"]))


def test_declarations_are_checked_against_the_file(tmp_path):
    path = write_form(tmp_path / "right.onnx")
    forms = [Form(name, path, name, plugin=True) for name in ("fp32", "fp16", "int8")]
    reasons = [entry.reasons for entry in judge(*forms).forms]
    assert all("declared with plugin nodes, but holds 0" in found for found in reasons)
    assert ["declared fp16, but the graph holds neither FP16 nor Q/DQ" in found for found in reasons] == [
        False,
        True,
        False,
    ]
    int8_as_fp32 = judge(Form("q", quantised(tmp_path / "q.onnx", 2 / 127), "fp32", plugin=False)).forms[0]
    assert "declared fp32, but the graph holds Q/DQ nodes" in int8_as_fp32.reasons


def test_forms_that_cannot_run_fail_and_leave_the_others_alone(tmp_path):
    no_such = helper.make_node("NoSuchOperation", ["conv"], ["logits"], domain="edgeattn")
    crop = helper.make_node("Slice", ["conv", "one", "end", "axis"], ["logits"])
    unknown = write_form(tmp_path / "unknown.onnx", no_such)
    renamed = write_form(tmp_path / "renamed.onnx", output="scores")
    bounds = {"one": np.array([1]), "end": np.array([99]), "axis": np.array([2])}
    cropped = write_form(tmp_path / "cropped.onnx", crop, **bounds)
    small = write_form(tmp_path / "small.onnx", size=(HEIGHT // 2, WIDTH))
    paths = {"unknown": unknown, "renamed": renamed, "cropped": cropped, "small": small}
    forms = [Form(name, path, "fp32", plugin=name == "unknown") for name, path in paths.items()]
    parity = judge(*forms, right(tmp_path / "right.onnx"))
    reasons = [entry.reasons[0] if entry.reasons else "" for entry in parity.forms]
    assert reasons[0].startswith("ONNX Runtime cannot load it")
    assert reasons[1] == "output logits is missing; the graph has scores"
    assert reasons[2] == f"output logits has shape (1, 4, {HEIGHT - 1}, {WIDTH}), not (1, 4, {HEIGHT}, {WIDTH})"
    assert reasons[3].startswith("ONNX Runtime cannot run it")
    assert reasons[4] == ""
    assert parity.forms[0].outputs == {}


def test_latency_is_recorded(tmp_path):
    parity = compare_forms(SPEC, Segmenter(), [right(tmp_path / "r.onnx")], samples(1), latency_runs=3, threads=1)
    assert parity.original_latency.median_ms > 0
    assert (parity.forms[0].latency.runs, parity.forms[0].latency.threads) == (3, 1)


def test_other_sizes(tmp_path):
    dynamic = right(tmp_path / "right.onnx")
    fixed = Form("fixed", write_form(tmp_path / "fixed.onnx", size=(HEIGHT, WIDTH)), "fp32", plugin=False)
    # Right at the trained size only: a bias that is zero there.
    tail = [
        helper.make_node("Shape", ["conv"], ["height"], start=2, end=3),
        helper.make_node("Sub", ["height", "trained"], ["excess"]),
        helper.make_node("Cast", ["excess"], ["bias"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["conv", "bias"], ["logits"]),
    ]
    path = write_form(tmp_path / "specialised.onnx", *tail, trained=np.array([HEIGHT]))
    specialised = Form("specialised", path, "fp32", plugin=False)
    sizes = [(HEIGHT, WIDTH), (17, 33), (40, 21)]
    checks = compare_sizes(SPEC, Segmenter(), [dynamic, fixed, specialised], sizes, threads=1)
    assert [(check.form, check.size) for check in checks] == [
        (name, size) for name in ("right", "fixed", "specialised") for size in sizes
    ]
    assert all(check.reasons == () and check.relative_l2["logits"] <= 1e-5 for check in checks[:3])
    assert [check.skipped is None for check in checks[3:6]] == [True, False, False]
    assert [bool(check.reasons) for check in checks[6:]] == [False, True, True]
    assert "relative L2" in checks[7].reasons[0]
    parity = judge(dynamic, specialised)
    assert parity.passed
    assert not dataclasses.replace(parity, sizes=checks).passed


def test_json_round_trip(tmp_path):
    nan = np.full((4, 3, 3, 3), np.nan, np.float32)
    forms = [right(tmp_path / "right.onnx"), Form("nan", write_form(tmp_path / "n.onnx", weight=nan), "fp32", False)]
    parity = judge(*forms)
    parity = dataclasses.replace(parity, sizes=compare_sizes(SPEC, Segmenter(), forms, [(17, 33)]))
    path = write_parity(parity, tmp_path / "run" / "parity.json")
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == parity.as_dict()
    assert record["verdict"] == "FAIL"
    assert "nothing here ran on TensorRT" in record["status"]
    assert [form["verdict"] for form in record["forms"]] == ["PASS", "FAIL"]
    assert record["forms"][0]["form"]["path"] == "right.onnx"
    assert record["forms"][0]["tolerance"]["derivation"]
    assert len(record["histogram_log10_edges"]) == len(record["forms"][0]["outputs"]["logits"]["histogram"]) + 1
    assert "pictures" not in record
    assert [item.name for item in path.parent.iterdir()] == ["parity.json"]


def test_bad_requests_are_refused(tmp_path):
    form = right(tmp_path / "right.onnx")
    with pytest.raises(UserError, match="no sample to compare tiny on"):
        compare_forms(SPEC, Segmenter(), [form], [])
    with pytest.raises(UserError, match="no image to check"):
        compare_sizes(dataclasses.replace(SPEC, samples=None), Segmenter(), [form], [(8, 8)])
    with pytest.raises(UserError, match="'int4'"):
        Form("x", tmp_path / "right.onnx", "int4", plugin=False)
    with pytest.raises(ValueError, match="unique names"):
        judge(form, form)
    with pytest.raises(UserError, match="cannot read the model"):
        judge(dataclasses.replace(form, path=tmp_path / "absent.onnx"))


def engine_of(monkeypatch, graph, engine, verdict):
    """Make a file an engine of `graph`, run by ONNX Runtime in TensorRT's place."""
    engine.write_bytes(b"engine")
    description = EngineDescription(engine, "10.3.0", "Orin", False, verdict, graph)
    monkeypatch.setattr(open_form, "local_machine", lambda: None)
    monkeypatch.setattr(open_form, "describe_engine", lambda path, machine: description)

    def runner(path, *, plugins, name):
        assert (path, plugins) == (engine, (Path("plugins.so"),))
        return runners.onnx_runner(graph, runners.facts_of(load_model(graph), graph), name=name)

    monkeypatch.setattr(open_form, "EngineRunner", runner)
    return Form("engine", engine, "fp32", False, (Path("plugins.so"),))


def test_an_engine_is_judged_like_the_graph_it_was_built_from(tmp_path, monkeypatch):
    form = right(tmp_path / "right.onnx")
    engine = engine_of(monkeypatch, form.path, tmp_path / "right.engine", AGREES)
    parity = judge(form, engine)
    assert parity.passed
    assert [entry.measured for entry in parity.forms][1] == "TensorRT 10.3.0 on Orin, TF32 off"
    assert parity.forms[1].facts.bytes == len(b"engine")
    assert parity.forms[1].outputs == parity.forms[0].outputs
    assert parity.status.startswith("Engines measured with TensorRT 10.3.0 on Orin")


def test_an_engine_of_unproven_types_fails(tmp_path, monkeypatch):
    form = right(tmp_path / "right.onnx")
    parity = judge(engine_of(monkeypatch, form.path, tmp_path / "right.engine", "differs"))
    assert "not shown to be those of its graph: differs" in parity.forms[0].reasons[0]


def test_a_form_that_cannot_be_emulated_fails_alone(tmp_path, monkeypatch):
    def refuse(model):
        raise UserError("no emulation")

    monkeypatch.setattr(runners, "emulate_fp16", refuse)
    unknown = Form("half", half(tmp_path / "half.onnx"), "fp16", plugin=False)
    parity = judge(right(tmp_path / "right.onnx"), unknown)
    assert [entry.passed for entry in parity.forms] == [True, False]
    assert "cannot load it: no emulation" in parity.forms[1].reasons[-1]
