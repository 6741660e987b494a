"""Judges FP16 forms on activations beyond 65504 and sums over 100,000 positions: the default ones and naive ones.

    python benchmarks/overflow_suite.py

Writes benchmarks/results/overflow_suite.json. FP16 is emulated with rounding after each operation; the limits are
derived from the arithmetic of each form. Exit status 1 when a default form fails, or a naive one passes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edgeattn.export.ranges import OVERFLOW_MARGIN
from edgeattn.foundation import write_text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "validation"))

from overflow_cases import CASES, NAIVE, Case, Outcome, default_form, judge  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "overflow_suite.json"
DEFAULT, POLICY = "default", "declared policy alone"


def outcomes(case: Case) -> dict[str, Outcome]:
    """Return what becomes of each form of a case."""
    forms: dict[str, onnx.ModelProto] = {
        DEFAULT: default_form(case, measured=True),
        POLICY: default_form(case, measured=False),
        **{name: convert(case.model) for name, convert in NAIVE.items()},
    }
    return {name: judge(case, form) for name, form in forms.items()}


def main() -> None:
    """Run every case."""
    torch.set_num_threads(1)
    console = Console()
    table = Table("case", "peak", *(DEFAULT, POLICY, *NAIVE))
    record = []
    for name, make in track(CASES.items(), description="cases", console=console):
        start = time.perf_counter()
        case = make()
        found = outcomes(case)
        cells = [
            f"{'pass' if outcome.passed else 'FAIL'} "
            + ("not finite" if outcome.error is None else f"{outcome.error:.1e} / {outcome.limit:.1e}")
            for outcome in found.values()
        ]
        table.add_row(name, f"{case.peak:.3g}", *cells)
        record.append(
            {
                "case": name,
                "peak": case.peak,
                "tensor": case.tensor,
                "seconds": round(time.perf_counter() - start, 1),
                "forms": {key: {"passed": value.passed, **asdict(value)} for key, value in found.items()},
            }
        )
    console.print(table)
    default = [entry["case"] for entry in record if not entry["forms"][DEFAULT]["passed"]]
    naive = [entry["case"] for entry in record if any(entry["forms"][name]["passed"] for name in NAIVE)]
    result = {
        "measured_on": f"CPU, ONNX Runtime {onnxruntime.__version__}, FP16 emulated with rounding after each operation",
        "range_margin": OVERFLOW_MARGIN,
        "default_failed": default,
        "naive_passed": naive,
        "cases": record,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")
    console.print(f"default forms failed: {default or 'none'}; naive forms passed: {naive or 'none'}")
    console.print(f"written to {RESULT}")
    sys.exit(bool(default or naive))


if __name__ == "__main__":
    main()
