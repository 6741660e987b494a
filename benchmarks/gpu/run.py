"""GPU truth: checks and times the plugin kernels and all blocks on one NVIDIA GPU, and writes one JSON file.

On a bare machine with Python >= 3.10, numpy, torch >= 2.11 (CUDA) and Triton >= 3.6, nothing else installed and no
network, in the root of a checkout:

    python benchmarks/gpu/run.py -o result.json

takes less than ten minutes and prints tables; everything that compilers print goes to result.log. `--dry-run` runs the
same code at tiny sizes on a CPU, in Triton's interpreter; its file says that it measures nothing.

Sections, in the order of importance (`--sections` selects):

    checks   every kernel against FP64 on random data of a new seed: both layouts, all data types, ragged sizes, more
             than 65,504 positions and more than 2^31 elements, poisoned outputs, each twice with equal bits
    speed    ours, torch eager, torch.compile, scaled_dot_product_attention and the roofline of the bandwidth and the
             matrix rates measured in the same run; memory; the bars
    driver   kernels compiled ahead of time, read from a library and launched through the CUDA driver and, where there
             is g++, through the C++ library, against FP64; also all that a given `--cpp-library` holds
    blocks   every block in FP32, FP16 and BF16 against its original in FP64
    tuning   only with `--tune`: checks and times tilings at the published sizes and ranks them; alone with
             `--sections= --tune`, for some operations with `--operations CrissCrossAttention`

Each case runs in a worker process: one that crashes, hangs or breaks the CUDA context costs only itself. The file is
replaced as a whole every few seconds, so an interrupted run keeps what it has.

Exit status: 0 when every check passed and every bar was met, 1 when not, 2 for bad input or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PATHS = [str(ROOT / "typings"), str(ROOT / "benchmarks")]
# This folder is a package of its own, and typings/ gives the package edgeattn without an installation. Compilers that
# are started in other folders need absolute paths too.
sys.path[:] = [*_PATHS, *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
_FOR_CHILDREN = [_PATHS[0], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(_FOR_CHILDREN))

from gpu import tables  # noqa: E402
from gpu.cases import ENVIRONMENT, SECTIONS, SELF_TEST, Section, Settings  # noqa: E402
from gpu.results import Results  # noqa: E402
from gpu.self_test import EXPECTED  # noqa: E402
from gpu.supervisor import Supervisor, WorkerEndedError  # noqa: E402

from edgeattn.foundation import UserError  # noqa: E402

WALL_SECONDS = 570.0
"""Time for everything, so that a run fits in ten minutes."""

DRY_SECONDS = 300.0
"""Time of each section in a dry run, where a machine may be slow but must not cut anything off."""


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    names = [section.name for section in SECTIONS if not section.asked_for]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sections", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--tune", action="store_true", help="check and time tilings too, after the other sections")
    parser.add_argument("--operations", default="", help="operations to tune, comma-separated; all when empty")
    parser.add_argument("--elements", default="float16", help="data types to tune, comma-separated")
    parser.add_argument("--seconds", type=float, help="time for each section, in place of its own")
    parser.add_argument("--wall", type=float, default=WALL_SECONDS, help="time for everything")
    parser.add_argument("--seed", type=int, help="seed of the random data; a new one when not given")
    parser.add_argument("--cpp-library", help="path of libedgeattn_plugins.so or _kernels.so, to run as well")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; no measurement")
    return parser.parse_args()


def chosen_sections(options: argparse.Namespace) -> list[Section]:
    """Return the sections to run.

    Raises:
        UserError: an unknown section.
    """
    wanted = [name for name in options.sections.split(",") if name]
    known = [section.name for section in SECTIONS if not section.asked_for]
    for name in wanted:
        if name not in known:
            raise UserError(f"unknown section {name!r}. Sections: {', '.join(known)}; tilings are tuned with --tune.")
    return [section for section in SECTIONS if (options.tune if section.asked_for else section.name in wanted)]


def run_section(section: Section, supervisor: Supervisor, results: Results, seconds: float) -> None:
    """Run a section and print its table."""
    started = time.monotonic()
    try:
        cases = supervisor.plan(section, results.records())
    except (WorkerEndedError, RuntimeError) as error:
        results.begin(section.name, [])
        results.add(section.name, {"case": "plan", "status": "error", "reason": str(error)})
        cases = []
    else:
        results.begin(section.name, cases)
    print(f"\n== {section.name}: {len(cases)} cases, {seconds:.0f} s ==", flush=True)
    shown = time.monotonic()
    done = 0

    def emit(record: dict[str, object]) -> None:
        nonlocal shown, done
        results.add(section.name, record)
        done += 1
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(f"   {done} results after {shown - started:.0f} s", flush=True)

    supervisor.run(section, cases, seconds - (time.monotonic() - started), emit)
    results.end(section.name)
    records = results.records(section.name)
    if section.name in tables.BY_SECTION:
        print(tables.BY_SECTION[section.name](records))
    print(f"{section.name}: {tables.statuses(records)} in {time.monotonic() - started:.0f} s", flush=True)


def check_environment(results: Results) -> None:
    """Move the environment's record to its place.

    Raises:
        UserError: there is no GPU, or torch cannot be used.
    """
    (record,) = results.document["sections"].pop(ENVIRONMENT.name)["records"]
    if record["status"] != "ok":
        raise UserError(str(record["reason"]))
    results.document["environment"] = record


def verdict(results: Results) -> int:
    """Print what is wrong and return the exit status."""
    bad = 0
    for name, section in results.document["sections"].items():
        records = section["records"]
        if name == SELF_TEST.name:
            bad += {record["case"]: record["status"] for record in records} != EXPECTED
            continue
        wrong = [record for record in records if record["status"] not in ("ok", "skipped")]
        bad += len(wrong)
        if wrong:
            print(tables.troubles(name, records))
    missed = [bar for bar in results.document["bars"] if bar["met"] is False]
    print(f"{bad} results are wrong, {len(missed)} bars are not met.")
    return 1 if bad or missed else 0


def main() -> int:
    """Run what was asked for; return the exit status."""
    options = arguments()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended and the file is written
    with tempfile.TemporaryDirectory(prefix="edgeattn-gpu-") as scratch:
        settings = Settings(
            dry=options.dry_run,
            seed=int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed,
            scratch=scratch,
            cpp_library=options.cpp_library,
            operations=tuple(name for name in options.operations.split(",") if name),
            elements=tuple(name for name in options.elements.split(",") if name),
        )
        if settings.dry:
            os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when kernels are imported
        sections = chosen_sections(options)
        results = Results(options.output, settings)
        log = options.output.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        size = 1 if settings.dry else max((section.workers for section in sections), default=1)
        supervisor = Supervisor(settings, str(log), size)
        with contextlib.ExitStack() as stack:
            stack.callback(supervisor.end)
            if settings.dry:
                print("Dry run on the CPU: nothing here is a measurement.")
                run_section(SELF_TEST, supervisor, results, DRY_SECONDS)
            run_section(ENVIRONMENT, supervisor, results, ENVIRONMENT.seconds)
            check_environment(results)
            stack.callback(results.write)
            for section in sections:
                seconds = DRY_SECONDS if settings.dry else options.seconds or section.seconds
                run_section(section, supervisor, results, min(seconds, options.wall - (time.monotonic() - started)))
            results.finish()
    if results.document["bars"]:
        print(f"\n== bars ==\n{tables.bars(results.document['bars'])}")
    if settings.dry:
        print("Dry run on the CPU: nothing above is a measurement.")
    print(f"{options.output} after {time.monotonic() - started:.0f} s, seed {settings.seed}")
    return verdict(results)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the file keeps what was done", file=sys.stderr)
        sys.exit(130)
