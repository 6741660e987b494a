"""`edgeattn split`: the files of two graphs, and the proof that both together are the original network."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from edgeattn.cli.main import app, main
from edgeattn.deploy import two_graphs
from edgeattn.deploy.few_shot import FewShotGraphs
from edgeattn.deploy.split import SplitRequest, schemes, split_network
from edgeattn.deploy.video import VideoGraphs, graphs
from edgeattn.foundation import UserError, sha256_of
from edgeattn.models import MODELS, ModelSpec
from edgeattn.models.can import CAN, episode_membership
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.plugins_trt import DOMAIN
from edgeattn.validation.randomise import randomise
from edgeattn.validation.tolerance import FP32_RELATIVE_L2

SIZE = (48, 32)
FRAMES = "64x80"


def small() -> ModelSpec:
    spec = MODELS.get("can-resnet12")
    return dataclasses.replace(spec, name="can-small", arguments=spec.small, size=SIZE)


def network() -> CAN:
    """Return a few-shot network with the statistics of its images, so that features depend on these and fit FP16."""
    model = randomise(small().build(), seed=11)
    assert isinstance(model, CAN)
    for module in model.base.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.base.train()(torch.randn(16, 3, *SIZE, generator=torch.Generator().manual_seed(1)))
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODELS, "_members", {**MODELS._members, "can-small": small()})
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(network(), tmp_path_factory.mktemp("weights") / "can.safetensors", {})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of a colour and grain each, five episodes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for index in range(10):
        grain = rng.integers(0, 200, (SIZE[0] // 8, SIZE[1] // 8, 3)) + rng.integers(0, 56, 3)
        Image.fromarray(grain.astype(np.uint8)).resize(SIZE[::-1]).save(folder / f"{index}.png")
    return folder


def split(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["split", *map(str, arguments)])


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "split.json").read_text())
    return record


@pytest.fixture(scope="module")
def few_shot(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder and what the command printed."""
    folder = tmp_path_factory.mktemp("few_shot")
    result = split(weights, "--model", "can-small", "-o", folder, "--images", images, "--fp16")
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    options = ("--model", "cosnet-digits", "--size", FRAMES, "--samples", 4, "--fp16", "--int8")
    result = split("bundled", *options, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_a_few_shot_network_is_two_files_and_a_record(few_shot: tuple[Path, str]) -> None:
    folder, printed = few_shot
    record = read(folder)
    files = {entry["file"]: entry for entry in record["graphs"]}
    assert set(files) == {"embed.onnx", "compare.onnx", "embed.fp16.onnx", "compare.fp16.onnx"}
    assert {path.name for path in folder.iterdir()} == {*files, "split.json"}
    for name, entry in files.items():
        assert entry["sha256"] == sha256_of(folder / name)
        assert entry["verdict"] == "PASS"
        assert entry["does"].endswith(".")
        assert entry["run"].startswith("Once for each")
        assert name in printed
    assert files["compare.fp16.onnx"]["inputs"] == [
        {"name": "support_features", "type": "float32", "shape": ["episodes", "supports", 32, 3, 2]},
        {"name": "membership", "type": "float32", "shape": ["episodes", "supports", "classes"]},
        {"name": "query_features", "type": "float32", "shape": ["episodes", "queries", 32, 3, 2]},
    ]
    assert files["compare.fp16.onnx"]["outputs"] == [
        {"name": "scores", "type": "float32", "shape": ["episodes", "queries", "classes"]}
    ]
    assert (record["verdict"], record["model"], record["size"], record["choices"]) == (
        "PASS",
        "can-small",
        [48, 32],
        {},
    )
    assert record["preprocessing"]["colour_order"] == "RGB"
    assert "nothing here ran on TensorRT" in record["measured_on"]
    assert "only declared policies" in record["notes"][0]
    assert "--calibration" in printed
    assert {"edgeattn", "onnxruntime"} <= set(record["versions"])


def test_both_few_shot_graphs_are_judged_as_one(few_shot: tuple[Path, str]) -> None:
    parity = read(few_shot[0])["parity"]
    assert list(parity) == ["5-way 1-shot, 1 query", "2-way, 3 shots and 1 shot, 2 queries"]
    for record in parity.values():
        assert record["samples"] == 5
        full, half = record["forms"]
        assert [full["form"]["path"], half["form"]["path"]] == [
            "embed+compare.onnx",
            "embed.fp16+compare.fp16.onnx",
        ]
        assert full["outputs"]["scores"]["worst_relative_l2"] <= FP32_RELATIVE_L2
        error = half["outputs"]["scores"]["worst_relative_l2"]
        assert FP32_RELATIVE_L2 < error <= half["tolerance"]["relative_l2"]  # it did round
        assert "FP16 emulated" in half["measured"]
        # The limit of FP16 counts the operations of both graphs.
        assert int(half["tolerance"]["derivation"].split()[0]) > 12 + 10


@pytest.mark.parametrize(("labels", "queries"), [([2, 0, 1, 0, 0, 2, 1], 4), ([0], 1)], ids=["uneven", "one"])
def test_files_take_other_episodes(few_shot: tuple[Path, str], labels: list[int], queries: int) -> None:
    embed, compare = (
        onnxruntime.InferenceSession(few_shot[0] / name, providers=["CPUExecutionProvider"])
        for name in ("embed.onnx", "compare.onnx")
    )
    generator = torch.Generator().manual_seed(8)
    support, query = (torch.randn(count, 3, *SIZE, generator=generator) for count in (len(labels), queries))
    membership = episode_membership(labels, max(labels) + 1)
    model = network()
    with torch.no_grad():
        features = [model.embed(batch)[None] for batch in (support, query)]
        expected = model.compare(features[0], membership, features[1]).numpy()
    found = compare.run(
        None,
        {
            "support_features": embed.run(None, {"images": support.numpy()})[0][None],
            "membership": membership.numpy(),
            "query_features": embed.run(None, {"images": query.numpy()})[0][None],
        },
    )[0]
    assert found.shape == expected.shape == (1, queries, max(labels) + 1)
    assert np.linalg.norm(found - expected) <= FP32_RELATIVE_L2 * np.linalg.norm(expected)


def test_a_video_network_has_plugin_forms_too(video: Path) -> None:
    record = read(video)
    names = ("encoder", "attention", "attention.plugin")
    assert [entry["file"] for entry in record["graphs"]] == [
        *(f"{name}.onnx" for name in names),
        *(f"{name}.fp16.onnx" for name in names),
        *(f"{name}.int8.onnx" for name in names),
    ]
    for entry in record["graphs"]:
        domains = {node.domain for node in onnx.load(video / entry["file"]).graph.node}
        assert (DOMAIN in domains) == entry["plugin"] == ("plugin" in entry["file"])
    assert record["choices"] == {"references": None, "combination": "mean"}
    assert record["graphs"][1]["inputs"][1]["shape"][:3] == ["batch", "references", 48]
    assert list(record["parity"]) == ["1 reference", "3 references"]
    for parity in record["parity"].values():
        assert [entry["form"]["name"] for entry in parity["forms"]] == [
            *("fp32", "fp32 plugin", "fp16", "fp16 plugin", "int8", "int8 plugin")
        ]
        assert parity["original"]["value"] > 0.5  # it finds digits: background alone reaches less
        for entry in parity["forms"]:
            assert entry["verdict"] == "PASS"
            assert entry["facts"]["plugin_nodes"] == ("plugin" in entry["form"]["name"])
    # A frame pair without a common object has an almost empty mask, which is judged by its logits.
    assert "Output mask comes from a Sigmoid" in record["parity"]["1 reference"]["forms"][0]["tolerance"]["derivation"]
    # The encoder is part of both chains of its precision.
    assert record["graphs"][0]["chains"] == ["fp32", "fp32 plugin"]
    assert record["graphs"][2]["chains"] == ["fp32 plugin"]


def test_a_fixed_number_of_references_in_one_softmax(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, export = onnx.load(video / "encoder.onnx"), graphs.to_onnx

    def spared(*given: Any, method: str = "forward", **options: Any) -> onnx.ModelProto:
        return encoder if method == "encode" else export(*given, method=method, **options)

    monkeypatch.setattr(graphs, "to_onnx", spared)
    options = {"references": 2, "combination": "group", "sample_count": 2, "size": (64, 80)}
    record = split_network(SplitRequest("cosnet-digits", **options), tmp_path)  # type: ignore[arg-type]
    assert record["verdict"] == "PASS", record["parity"]
    assert list(record["parity"]) == ["2 references"]
    assert record["graphs"][1]["inputs"][1]["shape"] == ["batch", 2, 48, 9, 11]
    assert record == read(tmp_path)


def test_graphs_of_another_combination_fail(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = VideoGraphs(onnx.load(video / "encoder.onnx"), onnx.load(video / "attention.plugin.onnx"))
    monkeypatch.setattr(schemes, "video_graphs", lambda *_, **__: mean)
    options = ("--model", "cosnet-digits", "--combination", "group", "--size", FRAMES, "--samples", 2)
    result = split("bundled", *options, "-o", tmp_path)
    assert result.exit_code == 1
    assert "FAIL cosnet-digits, 3 references, fp32: output mask: relative L2" in " ".join(result.output.split())
    record = read(tmp_path)
    # With one reference both are the same, so it takes the several to tell them apart.
    assert [parity["verdict"] for parity in record["parity"].values()] == ["PASS", "FAIL"]
    assert [record["verdict"], *(entry["verdict"] for entry in record["graphs"])] == ["FAIL"] * 4


@pytest.mark.parametrize("graph", ["embed", "compare"])
def test_a_changed_weight_fails(
    few_shot: tuple[Path, str],
    weights: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
) -> None:
    both = {name: onnx.load(few_shot[0] / f"{name}.onnx") for name in ("embed", "compare")}
    largest = max(both[graph].graph.initializer, key=lambda tensor: tensor.ByteSize())
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(1.1), largest.name))
    monkeypatch.setattr(schemes, "few_shot_graphs", lambda *_, **__: FewShotGraphs(**both))
    result = split(weights, "--model", "can-small", "-o", tmp_path, "--images", images, "--samples", 1)
    assert result.exit_code == 1
    record = read(tmp_path)
    assert record["verdict"] == "FAIL"
    assert all(parity["forms"][0]["verdict"] == "FAIL" for parity in record["parity"].values())


def test_ranges_are_measured_on_the_images_of_the_user(
    few_shot: tuple[Path, str], weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {name: onnx.load(few_shot[0] / f"{name}.onnx") for name in ("embed", "compare")}
    monkeypatch.setattr(schemes, "few_shot_graphs", lambda *_, **__: FewShotGraphs(**both))
    typical = tmp_path / "typical"
    typical.mkdir()
    for index in range(48):
        (typical / f"{index:02}.png").write_bytes((images / f"{index % 10}.png").read_bytes())
    fed: list[dict[str, tuple[int, ...]]] = []
    measure = two_graphs.measure_ranges

    def measured(graph: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]], *rest: Any) -> Any:
        kept = [dict(batch) for batch in batches]
        fed.extend({name: array.shape for name, array in batch.items()} for batch in kept)
        return measure(graph, kept, *rest)

    monkeypatch.setattr(two_graphs, "measure_ranges", measured)
    request = SplitRequest("can-small", str(weights), images=images, fp16=True, calibration=typical, sample_count=2)
    record = split_network(request, tmp_path / "out")
    assert record["verdict"] == "PASS"
    assert not any("only declared policies" in note for note in record["notes"])
    assert fed[:48] == [{"images": (1, 3, *SIZE)}] * 48
    # Features of eight groups of images, in both episodes that are judged.
    episodes = (((1, 5, 32, 3, 2), (1, 5, 5), (1, 1, 32, 3, 2)), ((1, 4, 32, 3, 2), (1, 4, 2), (1, 2, 32, 3, 2)))
    names = ("support_features", "membership", "query_features")
    assert fed[48:] == [dict(zip(names, shapes, strict=True)) for shapes in episodes] * 8


def test_a_killed_run_leaves_no_record(
    few_shot: tuple[Path, str], weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "split.json").write_text("{}")
    (tmp_path / "embed.fp16.onnx").write_text("of an earlier run")
    both = {name: onnx.load(few_shot[0] / f"{name}.onnx") for name in ("embed", "compare")}
    monkeypatch.setattr(schemes, "few_shot_graphs", lambda *_, **__: FewShotGraphs(**both))
    monkeypatch.setattr("edgeattn.deploy.split.splitting.compare_forms", killed)
    request = SplitRequest("can-small", str(weights), images=images)
    with pytest.raises(KeyboardInterrupt):
        split_network(request, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"embed.onnx", "compare.onnx"}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the command, which has to refuse, and returns what it says."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["edgeattn", "split", *map(str, arguments), "-o", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return call


def test_what_cannot_be_split(refused: Callable[..., str], weights: Path, images: Path, tmp_path: Path) -> None:
    few, pair = (weights, "--model", "can-small"), ("bundled", "--model", "cosnet-digits")
    said = refused("bundled", "--model", "ccnet-digits")
    for part in ("ccnet-digits has no form of two graphs", "can-resnet12,", "cosnet-digits", "edgeattn export"):
        assert part in said
    assert "Choose one with --model" in refused("bundled")
    assert "no evaluation images are bundled with can-small" in refused(*few)
    assert "does not take the size 64x64" in refused(*few, "--images", images, "--size", "64x64")
    assert "--references 2 is given, but the graphs of can-small have no such" in refused(*few, "--references", 2)
    assert "--combination mean is given" in refused(*few, "--combination", "mean")
    assert "greater than or equal to 1" in refused(*pair, "--references", 0)
    with pytest.raises(UserError, match="0 references are asked for"):
        split_network(SplitRequest("cosnet-digits", references=0), tmp_path / "out")
    with pytest.raises(UserError, match=r"0\.png is a file\. Give a folder"):
        split_network(SplitRequest("cosnet-digits"), images / "0.png")
    assert "unknown combination 'median'. Choose mean or group" in refused(*pair, "--combination", "median")
    assert "no FP16 or INT8 form. Add --fp16" in refused(*pair, "--calibration", images)
    assert "opset 9 is not supported" in refused(*pair, "--opset", 9)
    assert "10 images, but the model takes 6 at a time" in refused(
        *few, "--images", images, "--fp16", "--calibration", images
    )
    assert "INT8 needs real images" in refused(*few, "--images", images, "--int8")
