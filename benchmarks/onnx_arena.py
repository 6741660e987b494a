"""Measures ONNX Runtime's CPU memory arena in a process of its own: `python benchmarks/onnx_arena.py REQUEST.json`.

ONNX Runtime has no call that reports its arena to Python, but its arena logs every extension. Here it extends by just
what is asked for, gives everything unused back after each run, and all outputs of earlier runs are kept. The extensions
of the last run are then what one run needs in steady state: the block of the memory plan, the outputs, and the scratch
memory of kernels; inputs and weights are not among them.

The request names the file, whose inputs are FP32 of fixed size, and whether ONNX Runtime may choose order and buffers
by itself (`"defaults": true`) or executes in the order of the file and shares no buffer between results (`false`). The
answer is one line of JSON on stdout: the extensions in bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

RUNS = 3


def main() -> None:
    """Run the model and print the extensions of the last run."""
    request = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            run(request)
        finally:
            os.dup2(kept, 2)
        log.seek(0)
        text = log.read().decode(errors="replace")
    last = text.rpartition("=== run")[2]
    print(json.dumps({"extensions": [int(size) for size in re.findall(r"Extended allocation by (\d+) bytes", last)]}))


def run(request: dict[str, object]) -> None:
    """Run the model a few times, with a mark in the log before each run."""
    ort.set_default_logger_severity(0)
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Higher levels bring layouts and fusions that exist on CPUs only.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if not request["defaults"]:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_reuse = False
    session = ort.InferenceSession(str(request["model"]), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    feeds = {entry.name: generator.standard_normal(entry.shape).astype(np.float32) for entry in session.get_inputs()}
    shrink = ort.RunOptions()
    shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    outputs = []
    for _ in range(RUNS):
        os.write(2, b"=== run\n")
        outputs.append(session.run(None, feeds, shrink))


if __name__ == "__main__":
    main()
