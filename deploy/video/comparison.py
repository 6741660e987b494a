"""What keeping the features of the references saves, against running the whole network for each frame."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeattn.deploy.pipeline import Progress, save_model
from edgeattn.deploy.video.graphs import Combination, whole_graph
from edgeattn.deploy.video.segmenter import VideoSegmenter, network_input
from edgeattn.deploy.video.source import Video
from edgeattn.models.cosnet import COSNet
from edgeattn.validation.open_form import open_form


@dataclass(frozen=True)
class WholeComparison:
    """Times of both ways on the same frames, which took turns.

    Attributes:
        frames: frames that both ways segmented, besides one that warmed up.
        runs_per_frame: runs of the whole network that one frame takes.
        whole_seconds: median time of a frame by the whole network.
        streamed_seconds: median time of a frame by the two graphs, all references encoded.
        largest_difference: between the probabilities of both ways, in any pixel.
    """

    frames: int
    runs_per_frame: int
    whole_seconds: float
    streamed_seconds: float
    largest_difference: float

    @property
    def time_saved(self) -> float:
        """Share of the whole network's time that the two graphs do not take."""
        return 1 - self.streamed_seconds / self.whole_seconds

    def as_dict(self) -> dict[str, float]:
        """Return the record."""
        return {
            "frames": self.frames,
            "runs_per_frame": self.runs_per_frame,
            "seconds_per_frame_whole": round(self.whole_seconds, 4),
            "seconds_per_frame_streamed": round(self.streamed_seconds, 4),
            "share_of_time_saved": round(self.time_saved, 4),
            "largest_difference": self.largest_difference,
        }


def compare_with_whole(
    network: COSNet,
    combination: Combination,
    video: Video,
    segmenter: VideoSegmenter,
    chosen: Sequence[int],
    count: int,
    *,
    threads: int = 1,
    move: Progress = lambda stage, done, total: None,
) -> WholeComparison:
    """Segment some frames of a video with the whole network, as without the two graphs, and time both ways.

    The whole network is the leanest form of its kind: it computes the target's mask only. All references are in memory
    as images, which streaming does not need.

    Args:
        network: the trained network.
        combination: how the references make one mask.
        video: the frames.
        segmenter: both graphs in FP32, running, with the features of the references.
        chosen: indices of the references.
        count: how many frames to compare on, at most.
        threads: ONNX Runtime's threads within an operation.
        move: told about the frames done.
    """
    spec, size = segmenter.spec, segmenter.size
    images = [network_input(spec, frame.pixels, size) for frame in video.chosen(chosen)]
    taken = combination.whole_takes or len(images)
    groups = [np.stack(images[start : start + taken], axis=1) for start in range(0, len(images), taken)]
    count = min(count, len(video))
    targets = [(2 * part + 1) * len(video) // (2 * count) for part in range(count)]
    times: list[tuple[float, float]] = []
    difference = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(whole_graph(network, size, references=taken), Path(folder) / "whole.onnx")
        form = open_form(path, name="whole network", threads=threads)
        with form.runner:
            target = network_input(spec, next(video.chosen(targets[:1])).pixels, size)
            form.runner.infer({"target": target, "references": groups[0]})
            for frame in video.chosen(targets):
                start = time.perf_counter()
                features = segmenter.encode(frame.pixels)
                streamed = segmenter.probability(features)
                middle = time.perf_counter()
                target = network_input(spec, frame.pixels, size)
                masks = [form.runner.infer({"target": target, "references": group})["mask"] for group in groups]
                times.append((middle - start, time.perf_counter() - middle))
                difference = max(difference, float(np.abs(np.mean(masks, axis=0)[0, 0] - streamed).max()))
                move("compare", len(times), count)
    medians = np.median(times, axis=0)
    return WholeComparison(len(times), len(groups), float(medians[1]), float(medians[0]), difference)
