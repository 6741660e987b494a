"""Runs ONNX files in a process of its own, without torch: `python benchmarks/onnx_worker.py REQUEST.json`.

The request names the files, an npz with the inputs, and what to measure; the answer is one line of JSON. One file gives
the peak resident memory of a process that did nothing else; several files give their times in turns, so that a busy
machine is as unfair to one as to the other.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def peak_mib() -> float:
    """Return the peak resident memory of this process, with what it loaded, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Load the files, run them in turns until the time is up, print the best time of each and the peak memory."""
    request = json.loads(Path(sys.argv[1]).read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with np.load(request["inputs"]) as file:
        inputs = dict(file)
    sessions = [
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in request["files"]
    ]
    feeds = [{entry.name: inputs[entry.name] for entry in session.get_inputs()} for session in sessions]
    if request["outputs"]:
        np.savez(request["outputs"], *sessions[0].run(None, feeds[0]))
    seconds: list[list[float]] = [[] for _ in sessions]
    started = time.monotonic()
    while len(seconds[0]) < request["rounds"] or time.monotonic() - started < request["seconds"]:
        for session, feed, taken in zip(sessions, feeds, seconds, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    print(json.dumps({"milliseconds": [1000 * min(taken) for taken in seconds], "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
