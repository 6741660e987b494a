"""What a model takes on a target, estimated from its graph: operations, traffic, time, memory; no GPU, no TensorRT."""

from edgeattn.export.estimate.estimation import estimate
from edgeattn.export.estimate.result import Band, BlockShare, Estimate, Gain, LayerEstimate, Roof
from edgeattn.export.estimate.sized_graph import image_sizes

__all__ = ["Band", "BlockShare", "Estimate", "Gain", "LayerEstimate", "Roof", "estimate", "image_sizes"]
