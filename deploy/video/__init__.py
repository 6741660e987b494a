"""Segmenting videos with COSNet: two graphs, the features of the references kept, frames as a stream."""

from edgeattn.deploy.video.graphs import COMBINATIONS, GROUP, MEAN, Combination, VideoGraphs, video_graphs
from edgeattn.deploy.video.segmenter import VideoSegmenter
from edgeattn.deploy.video.stream import VideoMasks, VideoRequest, reference_indices, segment_video

__all__ = [
    "COMBINATIONS",
    "GROUP",
    "MEAN",
    "Combination",
    "VideoGraphs",
    "VideoMasks",
    "VideoRequest",
    "VideoSegmenter",
    "reference_indices",
    "segment_video",
    "video_graphs",
]
