"""Compiles the C++ host against the headers of several TensorRT versions and reports what each compiler run says.

    python plugins_trt/cpp/check_headers.py FOLDER [--cuda /usr/local/cuda/include] [--compiler g++]

FOLDER holds one folder of headers (`NvInferRuntime.h` and what it includes) for every version, such as `10.3/`. The
headers are `include/` of https://github.com/NVIDIA/TensorRT at the version's tag. Exit status 1 when a version fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
"""What CMakeLists.txt compiles with."""

_FOREIGN = re.compile(r"^\s*U ((vtable|typeinfo) for )?(nvinfer1::|getPluginRegistry|getInferLib)")
"""An undefined symbol that only TensorRT's library could provide."""


def complaints(headers: Path, cuda: Path, compiler: str) -> list[str]:
    """Compile every source of the host, and return what the compiler or the symbol table objects to.

    Args:
        headers: folder of TensorRT's headers.
        cuda: folder of CUDA's headers.
        compiler: a C++17 compiler.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cpp")):
            output = Path(folder) / f"{source.stem}.o"
            paths = ["-isystem", str(headers), "-isystem", str(cuda), "-I", str(SOURCES)]
            done = _run([compiler, *OPTIONS, *paths, "-c", str(source), "-o", str(output)])
            if done.returncode:
                found.append(f"{source.name}: {done.stderr.strip()}")
                continue
            symbols = _run(["nm", "-u", "-C", str(output)]).stdout.splitlines()
            found += [
                f"{source.name} needs {symbol.split(maxsplit=1)[1]} of TensorRT's library"
                for symbol in symbols
                if _FOREIGN.match(symbol)
            ]
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error}. Install it, or name another with --compiler.")


def main() -> None:
    """Check all versions in the folder; see the module."""
    parser = argparse.ArgumentParser(
        description="Compile the C++ host against the headers of several TensorRT versions."
    )
    parser.add_argument("folder", type=Path, help="folder with one folder of headers for every version")
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda/include"), help="folder of CUDA's headers")
    parser.add_argument("--compiler", default="g++", help="C++17 compiler")
    arguments = parser.parse_args()
    versions = [path.parent for path in arguments.folder.glob("*/NvInferRuntime.h")]
    versions.sort(key=lambda version: [int(number) for number in re.findall(r"\d+", version.name)])
    if not versions:
        sys.exit(f"{arguments.folder} holds no <version>/NvInferRuntime.h. Name a folder of TensorRT's headers.")
    failed = False
    for version in versions:
        found = complaints(version, arguments.cuda, arguments.compiler)
        failed |= bool(found)
        print(f"TensorRT {version.name}: {'failed' if found else 'no warnings'}", flush=True)
        for text in found:
            print(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
