"""`python3 -m edgeattn_device`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .archive import check_folder, unpack
from .errors import DeviceError
from .files import sha256_of
from .signature import require_signature

if TYPE_CHECKING:
    from .system import System
    from .workspace import Workspace

# numpy and the engines are imported by the command that needs them, so that checking works without them.


def main(arguments: Sequence[str] | None = None, system: System | None = None) -> int:
    """Run one command; returns 0 when all is well, 1 when a check failed, 2 for what cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options, system))
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m edgeattn_device", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    unpacking = commands.add_parser("unpack", help="check a bundle and unpack it; nothing is written unless all fits")
    unpacking.add_argument("file", type=Path, help="the bundle")
    unpacking.add_argument("-o", "--output", type=Path, required=True, help="folder, which must not exist")
    unpacking.add_argument("--sha256", help="SHA-256 of the bundle, as its maker published it")
    unpacking.add_argument("--public-key", type=Path, help="key in PEM form that the bundle must be signed with")
    unpacking.add_argument("--signature", type=Path, help="signature (the bundle's name with .sig)")
    unpacking.set_defaults(command=_unpack)
    checking = commands.add_parser("check", help="check every file of the unpacked bundle")
    _common(checking, _check)
    _common(commands.add_parser("doctor", help="compare the device with what the bundle is for"), _doctor)
    for name, command, text in (
        ("build", _build, "build the plugin library and the engine, unless they are there"),
        ("verify", _verify, "compare the engine with the PyTorch original"),
        ("bench", _bench, "time the engine; power and temperature where the board has sensors"),
        ("run", _run, "images or videos in, masks out"),
    ):
        sub = commands.add_parser(name, help=text)
        _common(sub, command)
        sub.add_argument("--precision", help="which model; needed when the bundle holds several")
        sub.add_argument("--engine", default="tensorrt", help="tensorrt, or onnxruntime for tests without a GPU")
        if name == "bench":
            sub.add_argument("--runs", type=int, default=2000, help="timed runs at most (2000)")
            sub.add_argument("--warm-up", type=float, default=2.0, help="seconds before (2)")
            sub.add_argument("--seconds", type=float, default=120.0, help="seconds at most (120)")
        if name == "run":
            sub.add_argument("images", type=Path, nargs="+", help="image files, videos or folders")
            sub.add_argument("-o", "--output", type=Path, required=True, help="folder of the masks")
            sub.add_argument("--format", default="pgm", help="pgm, npy or png (with Pillow)")
    return parser


def _common(parser: argparse.ArgumentParser, command: Any) -> None:
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--bundle", type=Path, default=here, help="folder of the unpacked bundle (this one)")
    parser.add_argument("--work", type=Path, help="folder for what is made (work, in the bundle)")
    parser.set_defaults(command=command)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _open(options: argparse.Namespace, system: System | None) -> Workspace:
    from .workspace import Workspace

    return Workspace.open(options.bundle, options.work, system)


def _unpack(options: argparse.Namespace, system: System | None) -> int:
    if not options.file.is_file():
        raise DeviceError(f"the bundle {options.file} does not exist. Check the path.")
    if options.public_key is not None:
        require_signature(options.file, options.public_key, options.signature, system)
    elif options.signature is not None:
        raise DeviceError("a signature is checked with its maker's key. Give it with --public-key.")
    with options.file.open("rb") as stream:
        if options.sha256 is not None and sha256_of(options.file) != options.sha256.lower():
            raise DeviceError(
                f"{options.file} is not the bundle that was published: its SHA-256 differs. Copy it again."
            )
        manifest = unpack(stream, options.output)
    print(f"{len(manifest.members) + 1} files, all as bundled: {options.output}")
    return 0


def _check(options: argparse.Namespace, system: System | None) -> int:
    manifest = check_folder(options.bundle)
    print(f"{len(manifest.members) + 1} files, all as bundled: {options.bundle}")
    return 0


def _doctor(options: argparse.Namespace, system: System | None) -> int:
    from .doctor import doctor

    workspace = _open(options, system)
    record = doctor(workspace)
    for finding in record["findings"]:
        found = finding["found"] or "not known"
        print(f"{finding['status']:8}{finding['name']:14}{found} (wanted: {finding['wanted']})  {finding['advice']}")
    for name in ("board", "l4t", "power_mode", "clocks_mhz", "temperatures_c", "power_rails"):
        print(f"        {name:14}{record[name]}")
    return _conclude(workspace, "doctor", None, record)


def _build(options: argparse.Namespace, system: System | None) -> int:
    from .build import build
    from .engines import backend_named

    workspace = _open(options, system)
    record = build(workspace, options.precision, backend_named(options.engine), _tell)
    for note in record["notes"]:
        print(f"note: {note}")
    return _conclude(workspace, "build", options.precision, {**record, "verdict": "PASS"})


def _verify(options: argparse.Namespace, system: System | None) -> int:
    from .engines import backend_named
    from .verify import verify

    workspace = _open(options, system)
    record = verify(workspace, options.precision, backend_named(options.engine), _tell)
    for name, error in record["outputs"].items():
        print(f"{name}: relative L2 {error['worst_relative_l2']:.2e}, largest difference {error['max_abs']:.2e}")
    print(f"labels as the original's: {record['label_agreement']:.4%}")
    print(f"{record['metric']} {record['score']:.4f}, the original's {record['original_score']:.4f}")
    for reason in record["reasons"]:
        print(f"FAIL: {reason}")
    return _conclude(workspace, "verify", options.precision, record)


def _bench(options: argparse.Namespace, system: System | None) -> int:
    from .bench import bench
    from .engines import backend_named

    workspace = _open(options, system)
    record = bench(
        workspace,
        options.precision,
        backend_named(options.engine),
        _tell,
        runs=options.runs,
        warm_up=options.warm_up,
        seconds=options.seconds,
    )
    for name, value in record["latency_ms"].items():
        print(f"{name:6}{'too few runs' if value is None else f'{value:.3f} ms'}")
    print(f"{record['frames_per_second']:.1f} frames per second")
    power = record["power"]
    if power["energy_per_frame_j"] is not None:
        print(f"{power['mean_w']:.2f} W, {1e3 * power['energy_per_frame_j']:.2f} mJ per frame: {power['scope']}")
    else:
        print(power["scope"])
    return _conclude(workspace, "bench", options.precision, {**record, "verdict": "PASS"})


def _run(options: argparse.Namespace, system: System | None) -> int:
    from .engines import backend_named
    from .segment import segment

    workspace = _open(options, system)
    backend = backend_named(options.engine)
    record = segment(
        workspace,
        options.precision,
        backend,
        _tell,
        images=options.images,
        output=options.output,
        form=options.format,
    )
    return _conclude(workspace, "run", options.precision, {**record, "verdict": "PASS"})


def _conclude(workspace: Workspace, command: str, precision: str | None, record: dict[str, Any]) -> int:
    """Write the record of a command, say where and what, and return the exit status."""
    name = None if command == "doctor" else workspace.manifest.precision(precision)[0]
    path = workspace.write(command, name, record)
    print(f"{record['verdict']}  ({record['measured']})  {path}")
    return 0 if record["verdict"] == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
