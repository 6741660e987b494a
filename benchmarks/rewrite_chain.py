"""Recognition of attention cores in a long graph: 60 criss-cross blocks in the public code's formulation.

`python benchmarks/rewrite_chain.py` prints a line and writes benchmarks/results/rewrite_chain.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from criss_cross_forms import OfficialCore
from rich.console import Console
from torch import nn

from edgeattn.blocks import CrissCrossAttention
from edgeattn.export.rewrite import rewrite
from edgeattn.export.run_directory import versions
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.validation.randomise import randomise

RESULTS = Path(__file__).parent / "results" / "rewrite_chain.json"
BLOCKS, CHANNELS, HEIGHT, WIDTH = 60, 16, 5, 7


def main() -> None:
    """Export the chain, time its rewriting, and print the result."""
    blocks = []
    for seed in range(BLOCKS):
        block = randomise(CrissCrossAttention(CHANNELS), seed)
        block.core = OfficialCore()
        blocks.append(block)
    example = torch.randn(1, CHANNELS, HEIGHT, WIDTH)
    model = to_onnx(nn.Sequential(*blocks), [example], input_names=["x"], output_names=["y"])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = rewrite(model)
        seconds.append(time.perf_counter() - start)
    nodes = len(model.graph.node)
    Console().print(
        f"{len(result.accepted)} of {BLOCKS} cores in {nodes} nodes recognised in {min(seconds):.2f} s (CPU)"
    )
    record = {
        "measured_on": "CPU",
        "versions": versions(),
        "nodes": nodes,
        "cores": BLOCKS,
        "recognised": len(result.accepted),
        "seconds": seconds,
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
