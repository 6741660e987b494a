"""The kernel table as a Jetson compiles it: by a compiler for aarch64, evaluated under QEMU's user emulation.

benchmarks/aarch64.py does the same with everything else.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from edgeattn.plugins_trt.cpp_table import CODE, SOURCES, TABLE, write_table

sys.path.append(str(Path(__file__).parent))

from test_cpp_host import HELPERS, compiled, name_of, one_row, run, sizes_of, statics, workspace_bytes, write_library

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_table_holds_the_same_on_aarch64(tmp_path: Path) -> None:
    row = one_row()
    library = write_library(tmp_path, row)
    write_table(library)
    sources = [HELPERS / "dump_table.cpp", SOURCES / "plan.cpp", SOURCES / "expression.cpp"]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-static", f"-I{SOURCES}", f"-I{tmp_path}"]
    program = tmp_path / "dump"
    run([COMPILER, *options, *sources, tmp_path / TABLE, tmp_path / CODE, "-o", program])
    assert program.read_bytes()[18:20] == b"\xb7\0"  # machine: AArch64
    spec = row[0].spec
    sizes = sizes_of(spec, statics(spec)[0])
    lines = "".join(f"{name} {size}\n" for name, size in sizes.items())
    signatures = json.loads(run([EMULATOR, program], input=lines))["signatures"]
    (found,) = [found for signature in signatures for found in signature["rows"]]
    assert found["workspace"] == workspace_bytes(row, sizes)
    assert [(launch["entry"], launch["grid"], launch["scalars"]) for launch in found["launches"]] == [
        (name_of(variant), list(variant.grid(sizes)), list(variant.scalars(sizes))) for variant in row
    ]
    for launch, variant in zip(found["launches"], row, strict=True):
        code = compiled(variant)[1]
        assert launch["cubin"] == code[f"{name_of(variant)}.cubin"].decode().splitlines()[0]
        assert launch["ptx"] == code[f"{name_of(variant)}.ptx"].decode().splitlines()[0]
