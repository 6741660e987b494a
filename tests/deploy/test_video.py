"""Videos: two graphs are the whole original network, and a stream encodes every frame once."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from edgeattn.deploy.evidence import load_original
from edgeattn.deploy.video import GROUP, VideoGraphs, VideoRequest, reference_indices, segment_video, segmenter, stream
from edgeattn.deploy.video.graphs import video_graphs
from edgeattn.deploy.video.source import Video
from edgeattn.export.emulation import emulate_fp16
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, digits
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.cosnet import COSNet
from edgeattn.models.published import load_published
from edgeattn.plugins_trt import DOMAIN
from edgeattn.validation.originals import cosnet as original
from edgeattn.validation.originals.co_attention import affinity_matrix, attend, gated
from edgeattn.validation.tolerance import FP16_LABEL_AGREEMENT, FP32_RELATIVE_L2

SPEC = MODELS.get("cosnet-digits")
SIZE = (127, 159)
"""Of the network: its features have the size of those of 128x160, at which it was trained."""


def trained() -> COSNet:
    network = SPEC.build()
    assert SPEC.checkpoint is not None
    load_published(SPEC, network, read_checkpoint(SPEC.checkpoint))
    assert isinstance(network, COSNet)
    return network


@pytest.fixture(scope="module")
def whole() -> original.COSNet:
    assert SPEC.checkpoint is not None
    network = load_original(SPEC, SPEC.checkpoint)
    assert isinstance(network, original.COSNet)
    return network


@pytest.fixture(scope="module")
def graphs() -> VideoGraphs:
    return video_graphs(trained(), SIZE)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Frames in which digits are, the first two of them and the next two with one in common."""
    return [image for sample in digits.held_out("pair", 3) for image in sample.images]


@pytest.fixture(scope="module")
def frames(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([segmenter.network_input(SPEC, image, SIZE) for image in images]))


def run(encoder: onnx.ModelProto, attention: onnx.ModelProto, targets: torch.Tensor, references: torch.Tensor) -> Any:
    """Return masks of targets (batch, ...) with references (batch, N, ...), by way of the features."""
    sessions = [
        onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        for graph in (encoder, attention)
    ]
    features = sessions[0].run(None, {"frames": torch.cat([targets, references.flatten(0, 1)]).numpy()})[0]
    batch, count = references.shape[:2]
    kept = features[batch:].reshape(batch, count, *features.shape[1:])
    return sessions[1].run(None, {"target_features": features[:batch], "reference_features": kept})[0]


def mean_of_pairs(whole: original.COSNet, targets: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """What the published evaluation computes: `output_sum / sample_range` over runs of the pairwise network."""
    with torch.no_grad():
        masks = [whole(targets, references[:, index])[0] for index in range(references.shape[1])]
    return torch.stack(masks).mean(dim=0).numpy()


def group(whole: original.COSNet, target: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """The original with the references side by side in one softmax, from the original's parts."""
    with torch.no_grad():
        exemplar, _ = whole.encoder(target)
        q = torch.cat([whole.encoder(reference[None])[0].flatten(2) for reference in references[0]], dim=2)
        affinity = affinity_matrix(whole.linear_e.weight.T, exemplar.flatten(2), q)
        attended = gated(attend(affinity, q).reshape(exemplar.shape), whole.gate)
        hidden = torch.relu(whole.bn1(whole.conv1(torch.cat([attended, exemplar], dim=1))))
        logits = F.interpolate(whole.main_classifier1(hidden), SIZE, mode="bilinear", align_corners=False)
    return torch.sigmoid(logits).numpy()


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 5), (2, 2)])
def test_both_graphs_are_the_mean_of_pairs(
    graphs: VideoGraphs, whole: original.COSNet, frames: torch.Tensor, batch: int, count: int
) -> None:
    targets = frames[:batch]
    references = torch.stack([frames[torch.arange(count) + 1 + first] for first in range(batch)])
    expected = mean_of_pairs(whole, targets, references)
    assert (expected > 0.5).any()
    assert relative_l2(run(graphs.encoder, graphs.attention, targets, references), expected) <= FP32_RELATIVE_L2


def test_both_graphs_are_the_group_form(whole: original.COSNet, frames: torch.Tensor) -> None:
    fixed = video_graphs(trained(), SIZE, references=3, combination=GROUP)
    target, references = frames[:1], frames[None, 1:4]
    expected = group(whole, target, references)
    assert relative_l2(run(fixed.encoder, fixed.attention, target, references), expected) <= FP32_RELATIVE_L2
    # The two published evaluations differ: a graph of one does not pass for the other.
    assert relative_l2(mean_of_pairs(whole, target, references), expected) > 100 * FP32_RELATIVE_L2


def test_fp16_labels_as_the_original(graphs: VideoGraphs, whole: original.COSNet, frames: torch.Tensor) -> None:
    half = graphs.reduced("fp16", [frame[None].numpy() for frame in frames[:3]], network=trained())
    assert half.precision == "fp16"
    targets, references = frames[:2], torch.stack([frames[2:5], frames[3:6]])
    found = run(emulate_fp16(half.encoder), emulate_fp16(half.attention), targets, references)
    expected = mean_of_pairs(whole, targets, references)
    assert ((found > 0.5) == (expected > 0.5)).mean() >= FP16_LABEL_AGREEMENT
    assert relative_l2(found, expected) > FP32_RELATIVE_L2  # it did round
    for graph in (half.encoder, half.attention):
        assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer)


def test_saved_graphs(graphs: VideoGraphs, tmp_path: Path) -> None:
    assert [path.name for path in graphs.save(tmp_path)] == ["encoder.onnx", "attention.onnx"]
    half = graphs.reduced("fp16", network=trained())
    assert [path.name for path in half.save(tmp_path)] == ["encoder.fp16.onnx", "attention.fp16.onnx"]
    plugins = {
        path.name: [node.op_type for node in onnx.load(path).graph.node if node.domain == DOMAIN]
        for path in tmp_path.iterdir()
    }
    one_way = ["CoAttentionOneWay"]
    assert plugins == {
        **{"encoder.onnx": [], "attention.onnx": [], "attention.plugin.onnx": one_way},
        **{"encoder.fp16.onnx": [], "attention.fp16.onnx": [], "attention.plugin.fp16.onnx": one_way},
    }
    held = [{tensor.name for tensor in graph.graph.initializer} for graph in (graphs.encoder, graphs.attention)]
    assert all(name.split(".")[0] != "model" or name.startswith("model.encoder") for name in held[0])
    assert not any("encoder" in name for name in held[1])


def test_no_reference_is_refused() -> None:
    with pytest.raises(UserError, match="0 references"):
        video_graphs(trained(), SIZE, references=0)


def test_references_are_spread_or_drawn() -> None:
    assert reference_indices(10, 5) == [1, 3, 5, 7, 9]
    assert reference_indices(3, 3) == [0, 1, 2]
    assert reference_indices(7, 1) == [3]
    drawn = reference_indices(90, 5, seed=4)
    assert drawn == reference_indices(90, 5, seed=4) != reference_indices(90, 5, seed=5)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 5
    for count in (0, 11):
        with pytest.raises(UserError, match=f"{count} references are asked for in a video of 10 frames"):
            reference_indices(10, count)


@pytest.fixture
def encoded(graphs: VideoGraphs, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Spare the stream its export, and return a list that grows by a name for every run of a session."""
    runs: list[str] = []
    compute = segmenter._run

    def counted(form: Any, feed: Any, output: str) -> np.ndarray:
        runs.append(output)
        return compute(form, feed, output)

    monkeypatch.setattr(stream, "video_graphs", lambda *_, **__: graphs)
    monkeypatch.setattr(segmenter, "_run", counted)
    return runs


def write_frames(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05}.png")
    return folder


def test_a_stream_encodes_every_frame_once(
    images: list[np.ndarray], encoded: list[str], whole: original.COSNet, frames: torch.Tensor, tmp_path: Path
) -> None:
    source = write_frames(tmp_path / "frames", images)
    request = VideoRequest(SPEC.name, references=3, size=SIZE, overlay=True, compared=0)
    masks = segment_video(source, tmp_path / "masks", request)
    # The whole network would run the encoder 2 x 3 x 6 times. The references are frames, and not encoded again.
    assert encoded.count("features") == len(images) == masks.record["encoder_runs"]
    assert encoded.count("mask") == len(images)
    assert [entry["frame"] for entry in masks.record["references"]] == [1, 3, 5]
    assert json.loads((tmp_path / "masks" / "video.json").read_text()) == masks.record
    names = {path.name for path in (tmp_path / "masks").iterdir()}
    stems = [f"{index:05}" for index in range(len(images))]
    assert names == {f"{stem}{end}" for stem in stems for end in (".png", ".overlay.png")} | {"video.json", "graphs"}
    expected = mean_of_pairs(whole, frames, frames[[1, 3, 5]].expand(len(images), -1, -1, -1, -1))
    for path, probability in zip(masks.files, expected, strict=True):
        labels = np.asarray(Image.open(path))
        assert labels.shape == images[0].shape[:2]
        wanted = F.interpolate(torch.from_numpy(probability)[None], labels.shape, mode="bilinear") > 0.5
        assert (labels == wanted[0, 0].numpy()).mean() >= 0.9999
    assert 0 < masks.record["object_share"] < 0.5


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_video_file_gives_the_masks_of_its_frames(
    images: list[np.ndarray], encoded: list[str], tmp_path: Path
) -> None:
    source, clip = write_frames(tmp_path / "frames", images[:4]), tmp_path / "clip.mkv"
    lossless = ("-c:v", "ffv1", "-pix_fmt", "bgr0")
    subprocess.run(["ffmpeg", "-v", "error", "-i", f"{source}/%05d.png", *lossless, str(clip)], check=True)
    request = VideoRequest(SPEC.name, references=2, size=SIZE, seed=1, compared=0)
    by_folder = segment_video(source, tmp_path / "a", request)
    by_file = segment_video(clip, tmp_path / "b", request)
    assert [path.name for path in by_file.files] == [f"clip_{number:06}.png" for number in range(1, 5)]
    for one, other in zip(by_folder.files, by_file.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert encoded.count("features") == 2 * 4
    # The references come before the rest is read.
    assert [frame.index for frame in Video(clip).chosen([2, 0])] == [0, 2]


def test_fp16_is_not_timed(images: list[np.ndarray], encoded: list[str], tmp_path: Path) -> None:
    request = VideoRequest(SPEC.name, references=1, size=SIZE, precision="fp16")
    record = segment_video(write_frames(tmp_path / "frames", images[:2]), tmp_path / "masks", request).record
    assert "FP16 emulated" in record["measured_on"]
    assert "not timed" in record["against_whole_network"]
    assert encoded.count("features") == 2


def test_a_killed_run_leaves_whole_files(
    images: list[np.ndarray], encoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(image: Image.Image, path: Path, kind: str) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    source = tmp_path / "frames"
    source.mkdir()
    for index in range(2):
        (source / f"{index}.ppm").write_bytes(b"P6 40 32 255 " + bytes(40 * 32 * 3))
    with pytest.raises(KeyboardInterrupt):
        segment_video(source, tmp_path / "masks", VideoRequest(SPEC.name, references=1, size=SIZE))
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["graphs"]
