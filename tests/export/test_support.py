"""The support check: the corpus is judged right on every version, and every rule is met and nearly met."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgeattn.cli.main import main
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.metadata import NAME_SCOPES
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.support import Severity, check_support, parse_version
from edgeattn.export.support.catalogue import NODE_RULES, RULES
from edgeattn.export.support.operators import documented_types, first_version, is_imported, refused_types
from edgeattn.export.surgery import inline_plugins, strip_bodies
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.models import MODELS


def _corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "edgeattn_support_corpus", Path(__file__).with_name("support_corpus.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CORPUS = _corpus()
CASES, LETTERS, VERSIONS = CORPUS.CASES, CORPUS.LETTERS, CORPUS.VERSIONS
BY_NAME = {case.name: case for case in CASES}


def build(name: str) -> onnx.ModelProto:
    return BY_NAME[name].build()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_corpus(case: Any) -> None:
    model = case.build()
    before = model.SerializeToString(deterministic=True)
    for version, letter in zip(VERSIONS, case.verdicts, strict=True):
        report = check_support(model, version, own_plugins=case.own_plugins, plugins=case.plugins)
        found = {finding.rule for finding in report.problems}
        assert report.verdict == LETTERS[letter], (version, report.problems)
        if case.rule or letter == ".":
            assert found == ({case.rule} if letter != "." else set()), version
    assert model.SerializeToString(deterministic=True) == before


def test_corpus_models_are_what_they_seem() -> None:
    """Models that ONNX itself would refuse are marked, so that the corpus proves something about the others."""
    for case in CASES:
        if case.checked:
            model = case.build()
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.SetInParent()
            onnx.checker.check_model(model)


def test_the_corpus_is_large_and_every_rule_is_in_it() -> None:
    assert len(CASES) >= 80
    met: set[str] = set()
    for case in CASES:
        model = case.build()
        for version in ((10, 3), (10, 10), (10, 16)):
            report = check_support(model, version, own_plugins=case.own_plugins, plugins=case.plugins, dla_cores=1)
            met |= {finding.rule for finding in report.findings}
    # These need a version before 10.3, a file, or a model that ONNX gives up on: they have tests of their own.
    assert {rule.id for rule in RULES} - met == {"slice-axes", "external-folder", "inference"}


def test_every_rule_about_an_operator_is_nearly_broken() -> None:
    """For each such rule some model of the corpus holds an operator that it is about, and does not break it."""
    operators = {case.name: _operators(case.build().graph) for case in CASES}
    far = {
        rule.id
        for rule in NODE_RULES
        if rule.operators
        and not any(
            operators[case.name] & rule.operators
            for case in CASES
            if (case.rule and case.rule != rule.id) or "." in case.verdicts
        )
    }
    assert far == {"size-from-data"}  # that one is about the operator as such


def _operators(graph: onnx.GraphProto) -> set[str]:
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return {node.op_type for node in graph.node}.union(*(_operators(body) for body in bodies))


def test_rules_are_declared_in_full() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.title, rule.id
        assert rule.source, rule.id
        assert rule.remedy or rule.id == "operator-unsupported"
        assert rule.before is None or rule.before > rule.since, rule.id


def test_rules_before_10_3() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>\nn (float[4] x, int64[1] a) => (float[] y) { y = Slice(x, b, e, a) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.int64([0]), "b"))
    model.graph.initializer.append(numpy_helper.from_array(np.int64([2]), "e"))
    assert [finding.rule for finding in check_support(model, (10, 2)).problems] == ["slice-axes"]
    assert check_support(model, (10, 3)).verdict == "accepted"


def test_operator_table() -> None:
    assert is_imported("Conv", (10, 0))
    assert not is_imported("Attention", (10, 13))
    assert is_imported("Attention", (10, 14))
    assert first_version("Col2Im") is None
    assert onnx.TensorProto.INT64 in {int(kind) for kind in documented_types("Add")}
    assert not refused_types("Relu", (10, 10))
    assert refused_types("Relu", (10, 3))


# --- where a finding comes from -------------------------------------------------------------------------------------


def test_findings_name_the_torch_module() -> None:
    model = build("Det")
    model.graph.node[0].metadata_props.add(key=NAME_SCOPES, value="['', 'head', 'head.cca', 'det']")
    (finding,) = check_support(model, (10, 3)).problems
    assert (finding.rule, finding.module, finding.operator) == ("operator-unsupported", "head.cca", "Det")
    assert finding.remedy
    assert finding.versions == "every version"


def test_body_nodes_are_listed_under_their_call() -> None:
    report = check_support(build("function"), (10, 3))
    names = [(node.name, node.operator, node.runs) for node in report.nodes]
    assert names[0] == ("Difference_0", "other::Difference", "function body")
    assert names[1][0].startswith("Difference_0/")
    assert names[1][1] == "Sub"


def test_refused_body_is_reported_at_its_node() -> None:
    (finding,) = check_support(build("function whose body is refused"), (10, 3)).problems
    assert finding.subject.startswith("Wrap_0/")
    assert finding.operator == "Det"


def test_plugin_node_without_body_types_what_follows() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "edgeattn": 1]>\n'
        "n (float16[1,4,8,8] q, float16[1,4,8,8] k, float16[1,8,8,8] v, float16[1,8,8,8] r, float[1] z)"
        " => (float16[1,8,8,8] y) {\n"
        'a = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn"> (q, k, v, r)  y = Mul (a, z) }'
    )
    assert [finding.rule for finding in check_support(model, (10, 3)).problems] == ["types-mixed"]


def test_dla_gets_advice_only() -> None:
    model = build("einsum")
    report = check_support(model, (10, 3), dla_cores=2)
    assert report.verdict == "accepted"
    assert [(finding.rule, finding.severity) for finding in report.findings] == [("dla", Severity.ADVICE)]
    assert not check_support(model, (10, 3)).findings


def test_circular_functions_are_refused() -> None:
    model = build("function inside a function")
    inner = model.functions[0]
    inner.node[0].op_type, inner.node[0].domain = "Outer", "other"
    inner.opset_import.append(onnx.helper.make_opsetid("other", 1))
    with pytest.raises(UserError, match="Cyclic"):
        check_support(model, (10, 3))


# --- files ----------------------------------------------------------------------------------------------------------


def test_external_data_is_not_read(tmp_path: Path) -> None:
    """Weights of 64 MB in a file of their own are looked at only where a rule needs their numbers."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>\nn (float[1,4096] x) => (float[1,4096] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4096, 4096), np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data")
    (tmp_path / "m.data").unlink()
    assert check_support(path, (10, 3)).verdict == "accepted"


def test_weights_above_the_model_are_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>\nn (float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((64, 64), np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    loaded = onnx.load(path, load_external_data=False)
    for entry in loaded.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../m.data"
    path.write_bytes(loaded.SerializeToString())
    assert [finding.rule for finding in check_support(path, (10, 3)).problems] == ["external-folder"]


def test_a_model_that_inference_cannot_follow() -> None:
    model = build("chain of plain operators")
    model.graph.node[1].output[0] = ""
    model.graph.node[2].input[0] = "c"
    report = check_support(model, (10, 3))
    assert "inference" in {finding.rule for finding in report.problems}


@pytest.mark.parametrize(("text", "message"), [("ten", "is not MAJOR.MINOR"), ("10", "is not MAJOR.MINOR")])
def test_versions_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_version(text)


def test_versions_that_are_not_covered() -> None:
    with pytest.raises(UserError, match="not covered"):
        check_support(build("einsum"), parse_version("8.6.1"))


# --- what this project exports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, onnx.ModelProto]:
    """Return every form of a digits model."""
    spec = MODELS.get("ccnet-digits")
    example = torch.randn(1, 3, *spec.size)
    plugin = to_onnx(
        spec.build().eval(),
        [example],
        input_names=spec.inputs,
        output_names=spec.main_outputs,
        outputs=[0],
        opset=DEFAULT_OPSET,
    )
    half = to_fp16(plugin).model
    forms = {"plugin": plugin, "plugin fp16": half, "plain": inline_plugins(plugin), "plain fp16": inline_plugins(half)}
    return forms | {"stripped": strip_bodies(plugin), "stripped fp16": strip_bodies(half)}


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_exports_raise_no_alarm(digits: dict[str, onnx.ModelProto], version: tuple[int, int]) -> None:
    for name, model in digits.items():
        problems = check_support(model, version).problems
        if name.startswith("plugin") and version < (10, 7):  # that form is for other versions, and the check says so
            assert {finding.rule for finding in problems} == {"plugin-ignored"}
        else:
            assert not problems, (name, problems)


# --- the command ----------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeattn", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(build(name).SerializeToString())
        return path

    return save


def test_command_accepts(run: Run, saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = saved("chain of plain operators")
    out = tmp_path / "check.json"
    status, text, _ = run(path, "--target", "jetpack-6.2-orin", "-o", out)
    assert status == 0
    assert "accepted" in text
    assert "10.3" in text
    record = json.loads(out.read_text())
    assert record["verdict"] == "accepted"
    assert record["target"] == "jetpack-6.2-orin"
    assert record["counts"] == {"accepted": 3, "needs attention": 0, "rejected": 0}
    assert [node["operator"] for node in record["nodes"]] == ["Conv", "Relu", "GlobalAveragePool"]


def test_command_rejects(run: Run, saved: Callable[[str], Path]) -> None:
    status, text, _ = run(saved("Det"), "--tensorrt", "10.10", "--json")
    assert status == 1
    (finding,) = json.loads(text)["findings"]
    assert finding["rule"] == "operator-unsupported"
    assert finding["severity"] == "rejected"
    assert finding["remedy"]
    assert finding["source"]
    assert finding["versions"]


def test_command_and_attention(run: Run, saved: Callable[[str], Path]) -> None:
    path = saved("log-sum-exp over one axis")
    status, text, _ = run(path, "--tensorrt", "10.3")
    assert status == 0
    assert "reduce-log-sum-exp" in text
    assert run(path, "--tensorrt", "10.3", "--strict")[0] == 1


def test_command_lists_every_node(run: Run, saved: Callable[[str], Path]) -> None:
    _, text, _ = run(saved("chain of plain operators"), "--tensorrt", "11.4", "--all")
    assert "GlobalAveragePool" in text
    assert "Nobody has read" in text


def test_command_knows_other_plugins(run: Run, saved: Callable[[str], Path]) -> None:
    path = saved("plugin with its namespace")
    assert run(path, "--tensorrt", "10.3")[0] == 1
    assert run(path, "--tensorrt", "10.3", "--plugin", "other::Mystery")[0] == 0
    assert run(saved("edgeattn's plugin"), "--tensorrt", "10.3", "--no-plugins")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["missing.onnx", "--tensorrt", "10.3"], "missing.onnx"),
        (["{model}"], "--target"),
        (["{model}", "--target", "jetpack-6.2-orin", "--tensorrt", "10.3"], "--target"),
        (["{model}", "--target", "toaster"], "toaster"),
        (["{model}", "--tensorrt", "8.6"], "8.6"),
        (["{broken}", "--tensorrt", "10.3"], "cannot be read"),
    ],
)
def test_command_refuses(
    run: Run, saved: Callable[[str], Path], tmp_path: Path, arguments: list[str], word: str
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    names = {"{model}": saved("einsum"), "{broken}": broken}
    status, out, err = run(*(names.get(argument, argument) for argument in arguments))
    assert status == 2
    assert "Traceback" not in out + err
    assert word in err
