"""Masks of the object that the frames of a video share, frame by frame."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.deploy.evidence import BUNDLED, checkpoint_path
from edgeattn.deploy.masks import OVERLAY, write_mask, write_overlay
from edgeattn.deploy.pipeline import Progress
from edgeattn.deploy.video.comparison import compare_with_whole
from edgeattn.deploy.video.graphs import MEAN, combination_named, video_graphs
from edgeattn.deploy.video.segmenter import VideoSegmenter, network_input, resized_probability
from edgeattn.deploy.video.source import Video
from edgeattn.export.run_directory import versions
from edgeattn.foundation import UserError, remove_leftovers, sha256_of, write_text
from edgeattn.models import MODELS, ModelSpec
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.cosnet import COSNet
from edgeattn.models.published import load_published
from edgeattn.validation.report import palette

PRECISIONS = ("fp32", "fp16", "int8")
"""What the graphs may compute in."""

CALIBRATION_FRAMES = 16
"""Frames, evenly spaced, that reduced precision is calibrated on."""

REFERENCES = 5
"""References of the published evaluation."""

RECORD = "video.json"
"""Name of the record beside the masks."""


@dataclass(frozen=True)
class VideoRequest:
    """How to segment a video.

    Attributes:
        model: name of the model's declaration, a COSNet.
        checkpoint: path of the trained weights, or "bundled".
        layout: published layout of the weights; the one whose names fit when None.
        references: number of frames that all others are compared with.
        seed: draw the references at random with this seed, as the published evaluation draws them (though anew for each
            frame); the middles of as many equal parts of the video when None.
        combination: how the references make one mask, a name of `COMBINATIONS`.
        size: (height, width) that frames are resized to for the network; the model's own when None.
        overlay: also write the frames with their masks on top.
        precision: "fp32", "fp16", which is emulated on a CPU, or "int8" with FP16 around it, calibrated on frames of
            the video.
        compared: frames on which the whole network is timed too, in FP32; none when 0.
        threads: ONNX Runtime's threads within an operation.
    """

    model: str
    checkpoint: str = BUNDLED
    layout: str | None = None
    references: int = REFERENCES
    seed: int | None = None
    combination: str = MEAN.name
    size: tuple[int, int] | None = None
    overlay: bool = False
    precision: str = PRECISIONS[0]
    compared: int = 2
    threads: int = 1


@dataclass(frozen=True)
class VideoMasks:
    """What was written.

    Attributes:
        files: the masks, in the order of the frames.
        record: content of `video.json`.
    """

    files: tuple[Path, ...]
    record: Mapping[str, Any]


def segment_video(source: Path, output: Path, request: VideoRequest, *, progress: Progress | None = None) -> VideoMasks:
    """Write for each frame a mask at its own size, a PNG with a palette, and a record `video.json`.

    Every frame is encoded once, the references included; besides the features of the references, one frame is held.

    Args:
        source: video file, or folder of frames.
        output: folder of the masks, which are named like the frames; the graphs go into its folder `graphs`.
        request: model and settings.
        progress: told about stages and frames.

    Raises:
        UserError: something given cannot be used.
    """
    started = time.perf_counter()
    move = progress or (lambda stage, done, total: None)
    if request.precision not in PRECISIONS:
        raise UserError(f"unknown precision {request.precision!r}. Choose {' or '.join(PRECISIONS)}.")
    combination = combination_named(request.combination)
    spec, checkpoint, network = _network(request)
    if source.is_dir() and output.resolve() == source.resolve():
        raise UserError(f"the masks would replace the frames in {source}. Choose another folder with -o.")
    video = Video(source)
    chosen = reference_indices(len(video), request.references, request.seed)
    size = request.size or spec.size
    move("export", 0, 1)
    graphs = video_graphs(network, size, references=len(chosen), combination=combination)
    if request.precision != PRECISIONS[0]:
        typical = sorted({*chosen, *reference_indices(len(video), min(CALIBRATION_FRAMES, len(video)))})
        frames = (network_input(spec, frame.pixels, size) for frame in video.chosen(typical))
        graphs = graphs.reduced(request.precision, frames, network=network)
    remove_leftovers(output)
    paths = graphs.save(output / "graphs")
    move("export", 1, 1)
    with VideoSegmenter(spec, *paths, size, threads=request.threads) as segmenter:
        masks = _Masks(video, segmenter, output, spec, overlay=request.overlay)
        files = masks.write(chosen, move)
        runs = segmenter.encoder_runs
        comparison = None
        if request.precision == "fp32" and request.compared:
            comparison = compare_with_whole(
                network, combination, video, segmenter, chosen, request.compared, threads=request.threads, move=move
            )
    record = {
        "source": source.name,
        "model": spec.name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "size": list(size),
        "precision": request.precision,
        "frames": len(video),
        "references": [{"frame": index, "mask": files[index].name} for index in chosen],
        "reference_choice": "middles of equal parts" if request.seed is None else f"random, seed {request.seed}",
        "combination": {"name": combination.name, "meaning": combination.summary},
        "encoder_runs": runs,
        "object_share": round(masks.object_pixels / masks.pixels, 6),
        "seconds": {
            **{stage: round(spent, 3) for stage, spent in masks.seconds.items()},
            "in_all": round(time.perf_counter() - started, 3),
        },
        "frames_per_second": round(len(video) / sum(masks.seconds.values()), 3),
        "against_whole_network": comparison.as_dict() if comparison else _not_compared(request),
        "measured_on": segmenter.measured,
        "threads": request.threads,
        "notes": list(graphs.notes),
        "versions": versions(),
    }
    write_text(output / RECORD, json.dumps(record, indent=1) + "\n")
    return VideoMasks(tuple(files), record)


def reference_indices(count: int, references: int, seed: int | None = None) -> list[int]:
    """Return the frames that serve as references, in order; the same ones every time.

    Args:
        count: frames of the video.
        references: how many to choose.
        seed: draw them at random; the middles of as many equal parts of the video when None.

    Raises:
        UserError: fewer frames than references, or no reference.
    """
    if not 1 <= references <= count:
        raise UserError(
            f"{references} references are asked for in a video of {count} frames. Give --references 1 to {count}."
        )
    if seed is not None:
        return sorted(int(index) for index in np.random.default_rng(seed).choice(count, references, replace=False))
    return [(2 * part + 1) * count // (2 * references) for part in range(references)]


class _Masks:
    """Segments the frames of a video and writes what it finds; counts time by stage, and pixels."""

    def __init__(
        self, video: Video, segmenter: VideoSegmenter, output: Path, spec: ModelSpec, *, overlay: bool
    ) -> None:
        self.video, self.segmenter, self.output, self.overlay = video, segmenter, output, overlay
        self.colours = np.asarray(palette(len(spec.classes)), np.uint8)
        self.seconds = {"encode": 0.0, "attend": 0.0, "read_and_write": 0.0}
        self.pixels = self.object_pixels = 0

    def write(self, chosen: Sequence[int], move: Progress) -> list[Path]:
        """Encode the references, then write all masks and return their files."""
        start = time.perf_counter()
        known = {}
        for done, frame in enumerate(self.video.chosen(chosen), start=1):
            known[frame.index] = self._encoded(frame.pixels)
            move("references", done, len(chosen))
        self.segmenter.refer_to([known[index] for index in chosen])
        files = []
        for frame in self.video:
            features = known.get(frame.index)
            labels = self._labels(self._encoded(frame.pixels) if features is None else features, frame.pixels.shape[:2])
            files.append(self.output / f"{frame.name}.png")
            write_mask(files[-1], labels, self.colours)
            if self.overlay:
                write_overlay(self.output / f"{frame.name}{OVERLAY}", frame.pixels, self.colours[labels])
            move("frames", len(files), len(self.video))
        spent = time.perf_counter() - start
        self.seconds["read_and_write"] = spent - self.seconds["encode"] - self.seconds["attend"]
        return files

    def _encoded(self, pixels: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        features = self.segmenter.encode(pixels)
        self.seconds["encode"] += time.perf_counter() - start
        return features

    def _labels(self, features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return 1 where the object's probability exceeds a half at (height, width) = `size`."""
        start = time.perf_counter()
        probability = self.segmenter.probability(features)
        self.seconds["attend"] += time.perf_counter() - start
        labels = resized_probability(probability, (size[0], size[1])) > 0.5
        self.pixels += labels.size
        self.object_pixels += int(labels.sum())
        return labels.astype(np.uint8)


def _network(request: VideoRequest) -> tuple[ModelSpec, Path, COSNet]:
    """Return declaration, checkpoint and trained network.

    Raises:
        UserError: the model is unknown or no COSNet, or its weights cannot be used.
    """
    spec = MODELS.get(request.model)
    if spec.network is not COSNet:
        able = " or ".join(other.name for other in MODELS if other.network is COSNet)
        raise UserError(f"{spec.name} does not compare the frames of a video. Choose {able}; `segment` takes images.")
    path = checkpoint_path(spec, request.checkpoint)
    network = spec.build()
    load_published(spec, network, read_checkpoint(path), request.layout)
    assert isinstance(network, COSNet)
    return spec, path, network


def _not_compared(request: VideoRequest) -> str:
    if request.compared == 0:
        return "not asked for"
    return "not timed: FP16 is emulated on a CPU, so that times say nothing"
