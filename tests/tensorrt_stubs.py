"""The real Python bindings of four TensorRT versions, over stub libraries, for tests on machines without TensorRT.

The bindings wheels install without the TensorRT libraries. What they need of them at load time (nine C functions) is
compiled here as functions that return null: every class, enum, flag and signature of a version is then there to be
looked up, `trt.Builder(...)` raises the TypeError that a machine without a usable driver raises, and nothing computes.

Use in a test, one case for each version:

    def test_something(bindings):                          # fixture of tests/conftest.py, parametrised over VERSIONS
        assert bindings.evaluate("import tensorrt as trt; result = trt.__version__") == bindings.version
        assert bindings.at_least(10, 13)

or with one version: `tensorrt_bindings("10.13.3.9")`, a fixture too, returns the same `Bindings`. Both skip the test,
with the reason, where wheel or compiler cannot be had.

- `Bindings.evaluate(code, **names)` runs code in a subprocess where `import tensorrt` and `import tensorrt.plugin` work
  as users write them, with `names` (JSON values) as variables, and returns the value of `result` (a JSON value).
- `Bindings.run(arguments, ...)` runs `python *arguments` in the same surroundings: a script, `-m`, `-c`.
- Both take `python_path` (folders in front of `sys.path`: another NumPy, fakes) and `library_path` (folders in front of
  the stubs: a better imitation of libnvinfer).

Known traps: bindings 10.3 to 10.13 corrupt arrays and strings of plugin fields with NumPy >= 2; plugin attributes of
type int and float fail on 10.13 and 10.16 with NumPy >= 2.4; `tensorrt.plugin` exists from 10.6 on.

Wheels are kept in `<venv>/tensorrt/<version>`, compiled stubs in `<venv>/tensorrt/stubs/<hash of their content>`.
`python tests/tensorrt_stubs.py` fetches and compiles all of it, as `make .venv/ready` does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES: Mapping[str, str] = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
"""Package that holds the bindings, by version."""

VERSIONS = tuple(PACKAGES)
"""The versions, oldest first."""

CACHE = Path(sys.prefix) / "tensorrt"

_HARNESS = """
import json, sys
names = json.load(sys.stdin)
code = names.pop(" code")
names["__name__"] = "__main__"
exec(compile(code, "<evaluated>", "exec"), names)
print(json.dumps(names["result"]))
"""


class UnavailableError(Exception):
    """A wheel or a compiler cannot be had; the message says which and why."""


@dataclass(frozen=True)
class Bindings:
    """The bindings of one version, ready to be loaded by a subprocess.

    Attributes:
        version: of TensorRT, such as "10.3.0".
        folder: where `tensorrt_bindings` is.
        support: folder with `lib/`, the stub libraries, and `python/`, the package `tensorrt`.
    """

    version: str
    folder: Path
    support: Path

    def at_least(self, major: int, minor: int) -> bool:
        """Return whether this is TensorRT `major.minor` or later."""
        return tuple(int(part) for part in self.version.split(".")[:2]) >= (major, minor)

    def run(
        self,
        arguments: Sequence[str],
        *,
        stdin: str = "",
        python_path: Sequence[Path] = (),
        library_path: Sequence[Path] = (),
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python *arguments` with these bindings; its exit status is the caller's to judge."""
        python = [*python_path, self.support / "python", self.folder]
        libraries = [*library_path, self.support / "lib"]
        environment = {
            **os.environ,
            "PYTHONPATH": _joined(python, os.environ.get("PYTHONPATH")),
            "LD_LIBRARY_PATH": _joined(libraries, os.environ.get("LD_LIBRARY_PATH")),
        }
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def evaluate(
        self,
        code: str,
        *,
        python_path: Sequence[Path] = (),
        library_path: Sequence[Path] = (),
        timeout: float = 120,
        **names: Any,
    ) -> Any:
        """Run code in a subprocess and return the value that it gave the variable `result`.

        Raises:
            AssertionError: the code raised; with its traceback.
        """
        done = self.run(
            ["-c", _HARNESS],
            stdin=json.dumps({**names, " code": code}),
            python_path=python_path,
            library_path=library_path,
            timeout=timeout,
        )
        assert done.returncode == 0, f"TensorRT {self.version} bindings: {done.stderr or done.stdout}"
        return json.loads(done.stdout.splitlines()[-1])


def _joined(folders: Sequence[Path], rest: str | None) -> str:
    return os.pathsep.join([*map(str, folders), *([rest] if rest else [])])


@functools.cache
def bindings_of(version: str) -> Bindings:
    """Return the bindings of a version, fetched and compiled when they are not there yet.

    Raises:
        UnavailableError: they cannot be had here.
    """
    try:
        folder = _wheel(version)
        return Bindings(version, folder, _support(folder))
    except OSError as error:
        raise UnavailableError(f"TensorRT {version} bindings: {error}") from error


def _wheel(version: str) -> Path:
    """Install a wheel in the cache, without what it depends on."""
    folder = CACHE / version
    if not folder.exists():
        package = f"{PACKAGES[version]}=={version}"

        def install(target: Path) -> None:
            options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=1", "--timeout=20")
            _run([sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(target), package])

        _create(folder, install)
    return folder


def _support(wheel: Path) -> Path:
    """Compile the stub libraries of a wheel and write the package `tensorrt` around `tensorrt_bindings`."""
    bindings = wheel / "tensorrt_bindings"
    extension = bindings / "tensorrt.so"
    names = re.findall(r"NEEDED\s+(libnv\S+)", _run(["objdump", "-p", str(extension)]))
    defined_first, *others = names
    functions = "\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in _missing_symbols(extension))
    libraries = {defined_first: f"{functions}\n", **dict.fromkeys(others, "")}
    modules = {
        path.relative_to(bindings).as_posix(): _forwarding_module(path.relative_to(bindings))
        for path in sorted(bindings.rglob("*.py"))
    }
    content = hashlib.sha256(json.dumps([libraries, modules]).encode()).hexdigest()

    def build(target: Path) -> None:
        (target / "lib").mkdir()
        for name, source in libraries.items():
            command = [
                "gcc",
                "-shared",
                "-fPIC",
                "-x",
                "c",
                "-",
                f"-Wl,-soname,{name}",
                "-o",
                str(target / "lib" / name),
            ]
            _run(command, stdin=source)
        for relative, source in modules.items():
            path = target / "python" / "tensorrt" / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")

    return _create(CACHE / "stubs" / content[:16], build)


def _missing_symbols(extension: Path) -> list[str]:
    """Return the functions that an extension needs and that neither Python nor the C library has."""
    process = ctypes.CDLL(None)
    undefined = re.findall(r"^\s+U (\w+)$", _run(["nm", "-D", "-u", str(extension)]), re.MULTILINE)
    return [symbol for symbol in undefined if not hasattr(process, symbol)]


def _forwarding_module(relative: Path) -> str:
    """Return the source of the module of `tensorrt` that stands for one of `tensorrt_bindings`, as NVIDIA writes it."""
    parts = ("tensorrt_bindings", *relative.with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    version = f"from {module} import __version__\n" if module == "tensorrt_bindings" else ""
    return f"from {module} import *\n{version}"


def _create(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder and give it its name when it is complete; whoever is first wins."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _run(command: Sequence[str], stdin: str = "") -> str:
    """Run a command and return what it printed.

    Raises:
        UnavailableError: it is not installed or fails.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=180, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"`{' '.join(command)}` failed: {last}")
    return done.stdout


def main() -> None:
    """Fetch and compile what the tests need; exit status 1 when something cannot be had."""
    failures = []
    for version in VERSIONS:
        try:
            bindings_of(version)
        except UnavailableError as error:
            failures.append(str(error))
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
