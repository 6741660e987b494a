"""Compiles kernel variants ahead of time, on any machine: Triton needs no GPU for it.

Every kernel is compiled in a process of its own (`compile_worker`), because LLVM ends the process on what it cannot
compile for an architecture. Results are cached by the hash of all that they depend on.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError, atomic_path
from edgeattn.plugins_trt.kernel_library import CompiledKernel
from edgeattn.plugins_trt.variants import KernelVariant
from edgeattn.targets import SMS

CACHE_VARIABLE = "EDGEATTN_CACHE"
"""Environment variable that names the cache folder."""

DEFAULT_CACHE = Path("~/.cache/edgeattn")
"""The cache folder where the variable is not set."""

_RECIPE = 1
"""Part of every hash; goes up when this module or the worker compiles in another way."""

_WORKER = "edgeattn.plugins_trt.compile_worker"

_KEPT_ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR", "VIRTUAL_ENV"),
    *("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH"),
)
"""What workers inherit. Triton's other variables change what it compiles, or make it interpret."""

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and the steps in all."""


@dataclass(frozen=True)
class Code:
    """What compiling one kernel gives.

    Attributes:
        entry, warps, shared, registers, stack, spill_stores, spill_loads: see `CompiledKernel`.
        cubin: machine code.
        ptx: PTX that the machine code was assembled from.
    """

    entry: str
    warps: int
    shared: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    cubin: bytes
    ptx: bytes


@dataclass(frozen=True)
class Compiled:
    """A compiled variant.

    Attributes:
        kernel: its entry in the manifest.
        cubin: content of the file `kernel.cubin`.
        ptx: content of the file `kernel.ptx`.
    """

    kernel: CompiledKernel
    cubin: bytes
    ptx: bytes


@dataclass(frozen=True)
class Toolchain:
    """The installed compiler and the kernels' sources, as far as compiled code depends on them.

    Attributes:
        triton: version of Triton.
        code: for each Triton kernel, a hash of its source and of all that it calls.
        assemblers: for each CUDA architecture, `version` of its assembler and the newest `ptx_isa` that this takes.
    """

    triton: str
    code: Mapping[str, str]
    assemblers: Mapping[int, Mapping[str, Any]]


def cache_folder() -> Path:
    """Return the folder that compiled kernels are cached in."""
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named) if named else Path(os.path.expanduser(DEFAULT_CACHE))  # noqa: PTH111  (works without a home)
    return root / "kernels"


def compile_variants(
    variants: Sequence[KernelVariant],
    ptx_isas: Mapping[int, int],
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Compiled], Toolchain]:
    """Compile kernel variants.

    Args:
        variants: what to compile.
        ptx_isas: newest PTX ISA that may be used, for every CUDA architecture of the variants. The assembler's own
            limit is used where that is lower.
        jobs: processes at a time; one for each CPU when None.
        cache: folder of earlier results; `cache_folder()` for the user's own, None for no cache.
        progress: told about every compiled kernel.

    Returns:
        The results in the order of `variants`, and what compiled them.

    Raises:
        UserError: Triton is missing, an architecture or PTX ISA cannot be compiled for, or the hosts cannot launch a
            kernel; the message names the kernel.
    """
    with _Workers(jobs or os.cpu_count() or 1) as workers:
        tools = _toolchain(variants, workers)
        isas = {sm: _ptx_isa(sm, ptx_isas[sm], tools) for sm in sorted({variant.sm for variant in variants})}
        requests = [_request(variant, isas[variant.sm], tools) for variant in variants]
        hashes = [_source_hash(request, tools) for request in requests]
        names = [_title(variant) for variant in variants]
        codes: dict[str, Code] = {}
        missing: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for key, name, request in zip(hashes, names, requests, strict=True):
            if (code := _read_cached(cache, key)) is not None:
                codes[key] = code
            else:
                missing.setdefault(key, (name, request))
        report = progress or (lambda stage, done, total: None)
        total = len(codes) + len(missing)
        report("kernels", len(codes), total)
        for key, code in workers.run({key: partial(_compile, *job, workers) for key, job in missing.items()}):
            codes[key] = code
            _write_cached(cache, key, code)
            report("kernels", len(codes), total)
    compiled = []
    for variant, key in zip(variants, hashes, strict=True):
        compiled.append(Compiled(_kernel(variant, isas[variant.sm], key, codes[key]), codes[key].cubin, codes[key].ptx))
    return compiled, tools


def _title(variant: KernelVariant) -> str:
    return f"{variant.spec.name}.{variant.launch.name} ({variant.element}, {variant.layout}) for sm_{variant.sm}"


def _toolchain(variants: Sequence[KernelVariant], workers: _Workers) -> Toolchain:
    for sm in sorted({variant.sm for variant in variants}):
        if sm not in SMS:
            raise UserError(f"no kernel can be built for sm_{sm}. Known architectures: {', '.join(map(str, SMS))}.")
    if importlib.util.find_spec("triton") is None:
        raise UserError("the kernel compiler needs Triton, which is not installed. Run `pip install triton`.")
    request = {
        "request": "describe",
        "kernels": sorted({variant.launch.kernel for variant in variants}),
        "sms": sorted({variant.sm for variant in variants}),
    }
    with workers.serve(request) as (_, result, log):
        if result is None:
            raise RuntimeError(f"Triton cannot be asked for its version:\n{log}")
        assemblers = {int(sm): assembler for sm, assembler in result["assemblers"].items()}
        return Toolchain(result["triton"], result["code"], assemblers)


def _ptx_isa(sm: int, ceiling: int, tools: Toolchain) -> int:
    """Return the PTX ISA to compile for: the ceiling, unless the assembler is older."""
    least, newest = SMS[sm].minimum_ptx_isa, tools.assemblers[sm]["ptx_isa"]
    if ceiling < least:
        raise UserError(
            f"sm_{sm} ({SMS[sm].name}) needs at least PTX ISA {_dotted(least)}, but {_dotted(ceiling)} was asked for. "
            "Choose a target whose CUDA knows the architecture."
        )
    if newest < least:
        raise UserError(
            f"sm_{sm} ({SMS[sm].name}) needs at least PTX ISA {_dotted(least)}, but the assembler of Triton "
            f"{tools.triton} ends at {_dotted(newest)}. Install a newer Triton."
        )
    return int(min(ceiling, newest))


def _dotted(isa: int) -> str:
    return f"{isa // 10}.{isa % 10}"


def _request(variant: KernelVariant, ptx_isa: int, tools: Toolchain) -> dict[str, Any]:
    return {
        "request": "compile",
        "kernel": variant.launch.kernel,
        "code": tools.code[variant.launch.kernel],
        "parameters": [kind for _, kind in variant.parameters],
        "constants": dict(sorted(variant.constants.items())),
        "sm": variant.sm,
        "ptx_isa": ptx_isa,
        "warps": variant.warps,
        "stages": variant.stages,
    }


def _source_hash(request: Mapping[str, Any], tools: Toolchain) -> str:
    inputs = {
        **request,
        "recipe": _RECIPE,
        "triton": tools.triton,
        "assembler": tools.assemblers[request["sm"]]["version"],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _compile(name: str, request: Mapping[str, Any], workers: _Workers) -> Code:
    sm, isa = request["sm"], request["ptx_isa"]
    with workers.serve(request) as (folder, result, log):
        if result is None:
            raise UserError(
                f"the compiler ended while compiling {name} at PTX ISA {_dotted(isa)}; sm_{sm} needs at least "
                f"{_dotted(SMS[sm].minimum_ptx_isa)}. Its last words: {log.strip()[-2000:] or 'none'}"
            )
        if "error" in result:
            raise UserError(f"{name} at PTX ISA {_dotted(isa)} cannot be compiled: {result['error']}.")
        return Code(**result, cubin=(folder / "kernel.cubin").read_bytes(), ptx=(folder / "kernel.ptx").read_bytes())


def _kernel(variant: KernelVariant, ptx_isa: int, source_hash: str, code: Code) -> CompiledKernel:
    static = "_".join(f"{name}{value}" for name, value in variant.static.items())
    parts = (variant.spec.name, variant.launch.name, variant.element, variant.layout, static, f"sm{variant.sm}")
    stem = "-".join(part for part in parts if part)
    resources = {name: value for name, value in asdict(code).items() if name not in ("cubin", "ptx")}
    return CompiledKernel(
        operation=variant.spec.name,
        op_type=variant.spec.op_type,
        launch=variant.launch.name,
        kernel=variant.launch.kernel,
        element=variant.element,
        layout=variant.layout,
        static=dict(variant.static),
        sm=variant.sm,
        ptx_isa=ptx_isa,
        constants=dict(variant.constants),
        scope=dict(variant.scope),
        parameters=variant.parameters,
        cubin=f"{stem}.cubin",
        ptx=f"{stem}.ptx",
        source_hash=source_hash,
        **resources,
    )


def _cached(cache: Path, key: str) -> Path:
    return cache / key[:2] / f"{key}.json"


def _read_cached(cache: Path | None, key: str) -> Code | None:
    """Return a cached result, or None where there is none or it is damaged."""
    if cache is None:
        return None
    try:
        checksum, content = _cached(cache, key).read_text(encoding="utf-8").split("\n", 1)
        if hashlib.sha256(content.encode()).hexdigest() != checksum:
            return None
        entry = json.loads(content)
        return Code(**{**entry, "cubin": base64.b64decode(entry["cubin"]), "ptx": base64.b64decode(entry["ptx"])})
    except (OSError, ValueError):
        return None


def _write_cached(cache: Path | None, key: str, code: Code) -> None:
    if cache is None:
        return
    texts = {name: base64.b64encode(getattr(code, name)).decode() for name in ("cubin", "ptx")}
    content = json.dumps({**asdict(code), **texts})
    with atomic_path(_cached(cache, key)) as temporary:
        temporary.write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}", encoding="utf-8")


class _Workers:
    """Worker processes, as many at a time as there are jobs. Leaving the block ends those that still run.

    Args:
        jobs: how many at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                _end(process)
        self._pool.shutdown(cancel_futures=True)

    def run(self, calls: Mapping[str, Callable[[], Code]]) -> Iterator[tuple[str, Code]]:
        """Make all calls, and yield their results as they come."""
        futures: dict[Future[Code], str] = {self._pool.submit(call): key for key, call in calls.items()}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield futures[future], future.result()

    @contextlib.contextmanager
    def serve(self, request: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
        """Have a worker serve a request.

        Yields:
            The folder with the worker's files, which goes when the block ends; its result, None when it failed; what
            it printed.
        """
        with tempfile.TemporaryDirectory(prefix="edgeattn-compile-") as name:
            folder = Path(name)
            environment = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
            environment |= {
                "TRITON_HOME": name,
                "TRITON_ALWAYS_COMPILE": "1",
                "TRITON_DISABLE_LINE_INFO": "1",  # line information holds paths
                "TRITON_DUMP_PTXAS_LOG": "1",
                "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),  # noqa: PTH100
                "OMP_NUM_THREADS": "1",
            }
            with self._lock:
                if self._closed:
                    raise RuntimeError("the workers are closed")
                # A session of its own, so that one signal ends the worker together with the assembler it runs, and
                # Ctrl-C reaches only us.
                process = subprocess.Popen(
                    [sys.executable, "-m", _WORKER],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                output, _ = process.communicate(json.dumps(request).encode())
            finally:
                _end(process)
                with self._lock:
                    self._running.discard(process)
            path = folder / "result.json"
            result = json.loads(path.read_text(encoding="utf-8")) if process.returncode == 0 else None
            yield folder, result, output.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker and the assembler it may be running, unless it has ended itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
