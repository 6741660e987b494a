"""The device side on aarch64, as far as QEMU's user emulation takes it: no Jetson, no GPU, no TensorRT library.

    python benchmarks/aarch64.py [--folder FOLDER] [--tensorrt-headers FOLDER] [--step NAME]...

makes a Debian root for arm64 with Python, ONNX Runtime, g++ and cmake, and in it unpacks, checks, builds, verifies,
times and runs a bundle, refuses hostile ones, compiles the plugin library and runs the tests of both. Writes
benchmarks/results/aarch64.json: what passed, what failed and, with the reason, what was skipped. Exit status 1 when
something failed.

Needs Debian's packages qemu-user-static, mmdebstrap, g++-aarch64-linux-gnu, cmake and openssl, and Linux 6.7: programs
for aarch64 then run in a user namespace of their own, and the machine's settings stay as they are. FOLDER keeps the
root and the run for the next call; the TensorRT headers are `include/` of https://github.com/NVIDIA/TensorRT at a tag.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu.driver_build import cuda_headers
from rich.console import Console

from edgeattn.deploy.device.manifest import WORK
from edgeattn.export.run_directory import versions
from edgeattn.foundation import write_text
from edgeattn.targets import TARGETS

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from tensorrt_stubs import PACKAGES as BINDINGS

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "aarch64.json"
SCOPE = "QEMU user emulation, not a Jetson: times say nothing"
QEMU = "qemu-aarch64-static"
CROSS = "aarch64-linux-gnu-"
TOOLS = (QEMU, "mmdebstrap", "unshare", f"{CROSS}g++", "cmake", "openssl")
PACKAGES = "base-files,bash,binutils,cmake,coreutils,dash,dpkg,g++,libc-bin,make,openssl,python3"
WHEELS = ("numpy<2", "onnx", "onnxruntime", "pillow", "polygraphy", "pytest")
PLATFORMS = ("manylinux_2_35", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17")
TARGET = "jetpack-7.2-orin-nx-16"
"""Its TensorRT takes plugin nodes with bodies, which ONNX Runtime runs too."""

SIZE = "32x40"
PRECISIONS = ("fp32", "fp16", "int8")
ORIN, NEWEST = "neoverse-n1", "max"
"""CPUs of the emulator: the nearest that it has to Orin's Cortex-A78AE (ARMv8.2), and one with all extensions."""

ELF = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
ELF_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
"""How the kernel recognises programs for aarch64; libraries and programs differ in one bit."""

NEVER = {
    "TensorRT's library, CUDA and the GPU": "emulation has none of them; no engine was built and no kernel ran",
    "power rails, thermal zones, clocks, power modes": "imitated files stand for those of the board",
    "JetPack's own Ubuntu, Python 3.10 or 3.12 and NumPy 1.21": "the root is the Debian release of this machine",
    "latency": "an emulated processor has none that means anything",
}

BOARD = {
    "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB",
    "proc/device-tree/model": "NVIDIA Jetson Orin NX\0",
    "proc/cpuinfo": "\n\n".join(
        f"processor\t: {core}\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc "
        "dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\n"
        "CPU revision\t: 1"
        for core in range(8)
    ),
    "sys/devices/system/cpu/possible": "0-7",
    "sys/devices/system/cpu/present": "0-7",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1984000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "918000000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48500",
    "sys/class/hwmon/hwmon0/name": "ina3221",
    "sys/class/hwmon/hwmon0/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon0/in1_input": "5000",
    "sys/class/hwmon/hwmon0/curr1_input": "1800",
    "etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64",
    "bin/nvpmodel": "#!/bin/bash\necho 'NV Power Mode: MAXN'",
}
"""An imitated Orin NX as `doctor` and `bench` look at it."""

WATTS = 9.0
"""What the imitated rail carries."""

DRIVER = """
int cuInit(unsigned flags) {{ return 0; }}
int cuDeviceGet(int *device, int index) {{ *device = 0; return index; }}
int cuDeviceGetName(char *name, int size, int device) {{ name[0] = 'O'; name[1] = 0; return size < 2 || device; }}
int cuDriverGetVersion(int *version) {{ *version = {cuda}; return 0; }}
int cuDeviceGetAttribute(int *value, int attribute, int device)
{{ *value = attribute == 75 ? {major} : {minor}; return device; }}
"""
"""A CUDA driver that only answers what `doctor` asks."""

LOAD = """
import ctypes, json, platform, sys
library = ctypes.CDLL(sys.argv[1])
text = ctypes.c_char_p
library.edgeattn_contents.restype = library.edgeattn_last_error.restype = text
contents = library.edgeattn_contents().decode().splitlines()
op, count, element, layout, *sizes, sm = contents[0].split(", ")
sizes = {name: int(size) for name, size in (pair.split("=") for pair in sizes)}
key, value = sizes["head_channels"], sizes["channels"]
shapes = [[1, channels, 4, 5] for channels in (key, key, value, value)]
ranks, dims = (ctypes.c_int32 * 4)(4, 4, 4, 4), (ctypes.c_int64 * 16)(*sum(shapes, []))
tensors = op.encode(), element.encode(), layout.encode(), 4, ranks, dims
size = ctypes.c_size_t()
status = library.edgeattn_workspace_bytes(*tensors, ctypes.byref(size))
inputs, outputs = (ctypes.c_void_p * 4)(1, 2, 3, 4), (ctypes.c_void_p * 2)(5, 6)
launch = library.edgeattn_launch(*tensors, inputs, outputs, ctypes.c_void_p(4096), None)
error = library.edgeattn_last_error().decode()
plugins = hasattr(library, "getCreators")
creators = ctypes.c_int32()
if plugins:
    library.getCreators.restype = ctypes.c_void_p
    library.getCreators(ctypes.byref(creators))
print(json.dumps({"machine": platform.machine(), "contents": contents, "status": status, "workspace": size.value,
                  "launch": launch, "error": error, "plugins": plugins, "creators": creators.value}))
"""
"""Loads a library in a Python for aarch64 and calls every function that needs no TensorRT."""

VERSIONS = """
import json, numpy, onnxruntime, platform
print(json.dumps([platform.machine(), platform.python_version(), numpy.__version__, onnxruntime.__version__]))
"""

BUILD_LIBRARY = """
from pathlib import Path
from edgeattn_device.build import plugin_library
from edgeattn_device.workspace import Workspace
print(plugin_library(Workspace.open(Path.cwd()), print))
"""


class SkippedError(Exception):
    """A step cannot run here; the message says why."""


class FailedError(Exception):
    """A step ran, and something is not as it should be."""


@dataclass
class Record:
    """What was done.

    Attributes:
        console: told about each step.
        only: steps to do; all when empty.
        steps: name, status ("passed", "failed" or "skipped"), seconds and facts, in order.
    """

    console: Console
    only: Sequence[str] = ()
    steps: list[dict[str, Any]] = field(default_factory=list)

    def step(self, name: str, work: Callable[[], Mapping[str, Any]]) -> bool:
        """Do a step, write down how it went, and return whether it passed or was not asked for."""
        if self.only and name not in self.only:
            return True
        start = time.monotonic()
        entry: dict[str, Any] = {"step": name, "status": "passed"}
        with self.console.status(name):
            try:
                entry |= work()
            except SkippedError as reason:
                entry |= {"status": "skipped", "reason": str(reason)}
            except FailedError as reason:
                entry |= {"status": "failed", "reason": str(reason)}
            except Exception as reason:  # a defect of one step leaves the record of the others
                entry |= {"status": "failed", "reason": repr(reason)}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.steps.append(entry)
        reason = f": {entry['reason']}" if "reason" in entry else ""
        self.console.print(
            f"{entry['status']:8}{entry['seconds']:7.1f} s  {name}{reason}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return entry["status"] == "passed"


def run(
    command: Sequence[str | Path], *, status: int = 0, words: str = "", seconds: float = 1800, **options: Any
) -> str:
    """Run a command, require its exit status and that its output holds some words, and return the output.

    Raises:
        FailedError: it is not so; with the end of the output.
    """
    done = subprocess.run(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
        **options,
    )
    if done.returncode != status or words not in done.stdout:
        wanted = f"{status}{f' and {words!r}' if words else ''}"
        raise FailedError(
            f"{shlex.join(map(str, command))[-300:]}: {done.returncode}, not {wanted}: {done.stdout[-1500:]}"
        )
    return done.stdout


@dataclass(frozen=True)
class Emulation:
    """A root file system for arm64 whose programs QEMU runs.

    Attributes:
        folder: holds everything that is made.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The root file system."""
        return self.folder / "root"

    def namespace(self, command: Sequence[str | Path], binds: Mapping[Path, Path] = {}) -> list[str]:
        """Return a command that runs another where the kernel hands programs for aarch64 to QEMU.

        Args:
            command: the other, for this machine or for aarch64.
            binds: folders that are seen read-only at other places, by those places.
        """
        binary = shutil.which(QEMU)
        lines = [
            "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc",
            f"printf '%s' ':qemu-aarch64:M:0:{ELF}:{ELF_MASK}:{binary}:F' > /proc/sys/fs/binfmt_misc/register",
        ]
        for place, source in binds.items():
            place.mkdir(parents=True, exist_ok=True)
            lines.append(f"mount --rbind {shlex.quote(str(source))} {shlex.quote(str(place))}")
            lines.append(f"mount -o remount,bind,ro {shlex.quote(str(place))}")
        script = "; ".join(["set -e", *lines, f"exec {shlex.join(map(str, command))}"])
        return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]

    def inside(
        self,
        *command: str,
        at: str = "/",
        cpu: str = ORIN,
        board: bool = True,
        source: bool = False,
        **environment: str,
    ) -> list[str]:
        """Return a command that runs another in the root.

        Args:
            command: the other.
            at: working folder in the root.
            cpu: emulated processor.
            board: whether the imitated board is there.
            source: whether the repository is seen at /src.
            environment: further variables.
        """
        imitated = self.folder / "board"
        binds = {}
        if board:
            binds = {self.root / "opt/board": imitated, self.root / "proc": imitated / "proc"}
            binds[self.root / "sys"] = imitated / "sys"
        if source:
            binds[self.root / "src"] = REPOSITORY
        variables = {
            "PATH": f"{'/opt/board/bin:' if board else ''}/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "PYTHONPATH": "/opt/site",
            "PYTHONDONTWRITEBYTECODE": "1",
            "QEMU_CPU": cpu,
            **environment,
        }
        pairs = [f"{name}={value}" for name, value in variables.items()]
        there = ["/bin/bash", "-c", f"cd {shlex.quote(at)} && exec {shlex.join(command)}"]
        return self.namespace(["env", "-i", *pairs, "chroot", self.root, *there], binds)

    def python(self, *arguments: str, **options: Any) -> list[str]:
        """Return a command that runs the root's Python; see `inside`."""
        return self.inside("python3", *arguments, **options)


# The root and the bundle.


def make_root(emulation: Emulation) -> dict[str, Any]:
    """Make the root from the packages of this machine's own Debian mirror, unless it is there."""
    root = emulation.root
    if not (root / "opt/site/pytest").exists():
        shutil.rmtree(root, ignore_errors=True)
        which = ("Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main")
        found = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", *which]).split()
        if len(found) < 2:
            raise FailedError("apt on this machine knows no Debian mirror, which the packages for arm64 come from.")
        merged = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
        options = ["--variant=extract", "--architectures=arm64", merged, f"--include={PACKAGES}"]
        run(["mmdebstrap", *options, found[1], root, found[0]])
        for name in ("proc", "sys", "opt/board", "src", "device", "usr/local/cuda/include"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "etc/nv_tegra_release").symlink_to("/opt/board/etc/nv_tegra_release")
        install_wheels(root / "opt/site", WHEELS)
    lines = run(emulation.python("-c", VERSIONS)).splitlines()
    names = ("machine", "python", "numpy", "onnxruntime")
    facts: dict[str, Any] = dict(zip(names, json.loads(lines[-1]), strict=True))
    if facts["machine"] != "aarch64":
        raise FailedError(f"programs in the root run on {facts['machine']}, not aarch64")
    release = re.search(r'PRETTY_NAME="(.*)"', (root / "usr/lib/os-release").read_text())
    facts["system"] = release[1] if release else None
    for name in ("g++", "cmake", "openssl"):
        option = "version" if name == "openssl" else "--version"
        facts[name] = run(emulation.inside(name, option)).splitlines()[0]
    return facts


def install_wheels(folder: Path, wheels: Sequence[str], *options: str) -> None:
    """Unpack wheels for aarch64 and this Python's version, which is that of the same Debian release."""
    platforms = [f"--platform={name}_aarch64" for name in PLATFORMS]
    version = f"--python-version={sys.version_info.major}.{sys.version_info.minor}"
    common = ["--quiet", "--no-compile", "--only-binary=:all:", version, *platforms, *options]
    run([sys.executable, "-m", "pip", "install", "--target", folder, *common, *wheels])


def make_board(emulation: Emulation) -> dict[str, Any]:
    """Write the imitated board, with the versions that the target has."""
    folder, target = emulation.folder / "board", TARGETS.get(TARGET)
    for name, content in BOARD.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (folder / "bin/nvpmodel").chmod(0o755)
    installed = {
        "nvidia-jetpack": f"{target.software.removeprefix('jetpack-')}-b1",
        "libnvinfer10": f"{target.tensorrt_full}-1",
    }
    (folder / "dpkg").mkdir(exist_ok=True)
    (folder / "dpkg/status").write_text(
        "".join(
            f"Package: {name}\nStatus: install ok installed\nMaintainer: none\nArchitecture: arm64\n"
            f"Version: {version}\nDescription: imitation\n\n"
            for name, version in installed.items()
        )
    )
    major, minor = target.cuda
    source = DRIVER.format(cuda=1000 * major + 10 * minor, major=target.sm // 10, minor=target.sm % 10)
    (folder / "driver.c").write_text(source)
    (folder / "lib").mkdir(exist_ok=True)
    output = folder / "lib/libcuda.so.1"
    run([f"{CROSS}gcc", "-Wall", "-Werror", "-shared", "-fPIC", folder / "driver.c", "-o", output])
    return {"imitates": "Jetson Orin NX", **installed}


def make_bundle(emulation: Emulation) -> dict[str, Any]:
    """Export and bundle the small network on this machine, sign the bundle, and copy it in."""
    folder = emulation.folder / "host"
    folder.mkdir(exist_ok=True)
    tool = Path(sys.executable).with_name("edgeattn")
    forms = ("--fp16", "--int8", "--plugins")
    model = ("--model", "ccnet-digits", "--size", SIZE)
    run([tool, "export", "bundled", *model, *forms, "--target", TARGET, "-o", folder / "run"])
    if not (folder / "maker.pem").exists():
        run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", folder / "maker.pem"])
        run(["openssl", "pkey", "-in", folder / "maker.pem", "-pubout", "-out", folder / "maker.pub"])
    bundle = folder / "ccnet.tar"
    run([tool, "bundle", folder / "run", "--target", TARGET, "--sign", folder / "maker.pem", "-o", bundle])
    work = emulation.root / "device"
    shutil.rmtree(work)
    shutil.rmtree(folder / "ccnet", ignore_errors=True)
    work.mkdir()
    for name in ("ccnet.tar", "ccnet.tar.sig", "maker.pub"):
        shutil.copy(folder / name, work)
    shutil.copytree(
        REPOSITORY / "deploy/device",
        work / "package/edgeattn_device",
        ignore=lambda _, names: [name for name in names if not name.endswith(".py")],
    )
    height, width = map(int, SIZE.split("x"))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for place in (folder, work):
        (place / "image.ppm").write_bytes(f"P6\n{width} {height}\n255\n".encode() + image.tobytes())
    return {"model": "ccnet-digits", "size": SIZE, "target": TARGET, "bytes": bundle.stat().st_size}


# The device's commands.


def device(emulation: Emulation, command: str, **options: Any) -> list[str]:
    """Return a command of the bundle's own programs, run in the root."""
    return emulation.python("-m", "edgeattn_device", *command.split(), **{"at": "/device/ccnet", **options})


def on_host(emulation: Emulation, command: str) -> str:
    """Run a command of the unpacked bundle on this machine."""
    return run([sys.executable, "-m", "edgeattn_device", *command.split()], cwd=emulation.folder / "host/ccnet")


def unpack(emulation: Emulation) -> dict[str, Any]:
    """Check the signature and unpack, in the root and, for comparison, on this machine."""
    options = {"at": "/device", "PYTHONPATH": "/device/package"}
    run(device(emulation, "unpack ccnet.tar --public-key maker.pub -o ccnet", **options), words="all as bundled")
    run(device(emulation, "check"), words="all as bundled")
    folder = emulation.folder / "host"
    environment = {**os.environ, "PYTHONPATH": str(emulation.root / "device/package")}
    command = [sys.executable, "-m", "edgeattn_device", "unpack", "ccnet.tar", "-o", "ccnet"]
    run(command, cwd=folder, env=environment)
    return {"signature": "checked with the root's openssl"}


def refuse(emulation: Emulation) -> dict[str, Any]:
    """Offer hostile bundles: each is refused with a reason, and nothing is written."""
    work = emulation.root / "device"
    reasons = {}
    for name, data, options in hostile((work / "ccnet.tar").read_bytes()):
        (work / "bad.tar").write_bytes(data)
        shutil.copy(work / "ccnet.tar.sig", work / "bad.tar.sig")
        before = sorted(work.rglob("*"))
        command = f"unpack bad.tar {options} -o bad"
        said = run(device(emulation, command, at="/device", PYTHONPATH="/device/package"), status=2, words="error: ")
        if sorted(work.rglob("*")) != before:
            raise FailedError(f"{name}: something was written")
        reasons[name] = said.strip().splitlines()[-1]
    return {"refused": reasons}


def hostile(data: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Yield what is wrong, the bytes of a bundle, and options of `unpack`."""
    middle, member = len(data) // 2, data.index(b"README.md\0")
    flipped = bytearray(data)
    flipped[middle] ^= 1
    yield "a bit flipped", bytes(flipped), ""
    yield "a bit flipped, signature checked", bytes(flipped), "--public-key maker.pub"
    yield "cut off", data[:middle], ""
    yield "bytes after the end", data + bytes(512), ""
    yield "a path upwards", data[:member] + b"../AD.md\0\0" + data[member + 10 :], ""
    yield "a link", data[: member + 156] + b"2" + data[member + 157 :], ""


def doctor_on_nothing(emulation: Emulation) -> dict[str, Any]:
    """`doctor` where there is no board fails with reasons."""
    run(device(emulation, "doctor", board=False), status=1, words="The NVIDIA driver finds no GPU")
    return findings(emulation)


def doctor_on_board(emulation: Emulation) -> dict[str, Any]:
    """`doctor` on the imitated board passes: real file reads, dpkg-query, cmake and calls of libcuda.so.1."""
    options = {"LD_LIBRARY_PATH": "/opt/board/lib", "DPKG_ADMINDIR": "/opt/board/dpkg"}
    run(device(emulation, "doctor", **options), words="PASS")
    return findings(emulation)


def findings(emulation: Emulation) -> dict[str, Any]:
    """Return how `doctor` judged each thing."""
    return {"findings": {item["name"]: item["status"] for item in written(emulation, "doctor")["findings"]}}


def written(emulation: Emulation, name: str) -> dict[str, Any]:
    """Return what a command wrote in the root."""
    record: dict[str, Any] = json.loads((emulation.root / f"device/ccnet/{WORK}/{name}.json").read_text())
    return record


def verify(emulation: Emulation, precision: str) -> dict[str, Any]:
    """Build and verify one precision with ONNX Runtime, on two emulated processors and on this machine."""
    options = f"--engine onnxruntime --precision {precision}"
    run(device(emulation, f"build {options}"), words="PASS")
    compared = {}
    for cpu in (ORIN, NEWEST):
        run(device(emulation, f"verify {options}", cpu=cpu), words="PASS")
        compared[f"aarch64, {cpu}"] = figures(written(emulation, f"verify.{precision}"))
    on_host(emulation, f"build {options}")
    on_host(emulation, f"verify {options}")
    record = json.loads((emulation.folder / f"host/ccnet/{WORK}/verify.{precision}.json").read_text())
    return {"compared_with_pytorch": {**compared, f"{platform.machine()}, this machine": figures(record)}}


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a verification."""
    worst = max(error["worst_relative_l2"] for error in record["outputs"].values())
    names = ("label_agreement", "score", "original_score", "measured")
    return {"relative_l2": worst, **{name: record[name] for name in names}}


def bench(emulation: Emulation) -> dict[str, Any]:
    """Time a few runs, and read the power of the imitated rail meanwhile."""
    run(
        device(emulation, "bench --engine onnxruntime --precision fp32 --runs 3 --warm-up 0 --seconds 60"), words="PASS"
    )
    record = written(emulation, "bench.fp32")
    watts, frames = record["power"]["mean_w"], record["runs"]
    if abs(watts - WATTS) > 1e-6:
        raise FailedError(f"the imitated rail carries {WATTS} W, and bench recorded {watts}")
    return {"runs": frames, "imitated_mean_w": watts, "times": "not kept: those of an emulator say nothing"}


def masks(emulation: Emulation) -> dict[str, Any]:
    """Label an image in the root and on this machine, and compare."""
    options = "run --engine onnxruntime --precision fp16"
    run(device(emulation, f"{options} -o /device/masks /device/image.ppm"), words="PASS")
    on_host(emulation, f"{options} -o ../masks ../image.ppm")
    names = emulation.root / "device/masks/image.pgm", emulation.folder / "host/masks/image.pgm"
    here, there = (np.frombuffer(path.read_bytes().split(b"\n", 3)[3], np.uint8) for path in names)
    manifest = json.loads((emulation.root / "device/ccnet/manifest.json").read_text())
    limit = manifest["precisions"]["fp16"]["tolerance"]["label_agreement"]
    agreement = float((here == there).mean())
    if here.size == 0 or agreement < limit:
        raise FailedError(f"{agreement:.4%} of the labels are those of this machine, less than {limit:.4%}")
    return {"labels_as_on_this_machine": agreement, "limit": limit, "pixels": here.size}


def device_tests(emulation: Emulation) -> dict[str, Any]:
    """Run tests/deploy/test_device.py in the root, with the real bindings of TensorRT that exist for aarch64."""
    absent = []
    for version, package in BINDINGS.items():
        folder = emulation.root / "usr/tensorrt" / version
        if not folder.exists():
            try:
                install_wheels(folder, [f"{package}=={version}"], "--no-deps", "--retries=1")
            except FailedError:
                shutil.rmtree(folder, ignore_errors=True)
                absent.append(version)
    report = emulation.root / "device/device.xml"
    options = ("-q", "-p", "no:cacheprovider", "--junitxml=/device/device.xml")
    path = {"PYTHONPATH": "/opt/site:/src/typings"}
    run(emulation.python("-m", "pytest", "tests/deploy/test_device.py", *options, at="/src", source=True, **path))
    return {**counts(report), "tensorrt_bindings_without_a_wheel_for_aarch64": absent}


def counts(report: Path) -> dict[str, Any]:
    """Return how many tests passed, and what was skipped and why."""
    cases = ElementTree.parse(report).findall(".//testcase")
    skipped = {case.get("name"): note.get("message") for case in cases if (note := case.find("skipped")) is not None}
    return {"tests_passed": len(cases) - len(skipped), "tests_skipped": skipped}


# The plugin library.


def require_headers(headers: Path | None) -> Path:
    """Return the folder of TensorRT's headers."""
    if headers is None:
        raise SkippedError("no headers of TensorRT are given (--tensorrt-headers FOLDER)")
    return headers


def cross_compiled(emulation: Emulation, headers: Path | None, *, plugins: bool) -> dict[str, Any]:
    """Compile a library on this machine for aarch64, all warnings errors, and load it in the root's Python."""
    settings = [f"-DTensorRT_ROOT={require_headers(headers)}"] if plugins else ["-DEDGEATTN_TENSORRT=OFF"]
    sources, name = emulation.folder / "host/ccnet/plugins", "plugins" if plugins else "kernels"
    build = emulation.root / f"device/cross-{name}"
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    compilers = [f"-DCMAKE_CXX_COMPILER={CROSS}g++", f"-DCMAKE_ASM_COMPILER={CROSS}gcc"]
    paths = [f"-DEDGEATTN_KERNELS={sources / 'kernels'}", f"-DCUDA_INCLUDE_DIR={cuda_headers()}"]
    run(["cmake", "-S", sources / "cpp", "-B", build, *system, *compilers, *paths, *settings])
    run(["cmake", "--build", build])
    facts = loaded(emulation, build / f"libedgeattn_{name}.so", plugins=plugins)
    return {"compiler": run([f"{CROSS}g++", "--version"]).splitlines()[0], **facts}


def compiled_inside(emulation: Emulation, headers: Path | None) -> dict[str, Any]:
    """Let the device's own code compile the library in the root, with the headers where JetPack has them."""
    shutil.copytree(require_headers(headers), emulation.root / "usr/include/aarch64-linux-gnu", dirs_exist_ok=True)
    shutil.copytree(cuda_headers(), emulation.root / "usr/local/cuda/include", dirs_exist_ok=True)
    processes = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    said = run(emulation.python("-c", BUILD_LIBRARY, at="/device/ccnet", **processes), seconds=3600)
    return loaded(emulation, emulation.root / said.splitlines()[-1].lstrip("/"), plugins=True)


def loaded(emulation: Emulation, library: Path, *, plugins: bool) -> dict[str, Any]:
    """Load a library in the root's Python, call its functions, and find the kernels' code in it."""
    place = "/" + library.relative_to(emulation.root).as_posix()
    found = json.loads(run(emulation.python("-c", LOAD, place)).splitlines()[-1])
    wanted = {"machine": "aarch64", "status": 0, "launch": 1, "plugins": plugins, "creators": int(plugins)}
    if wrong := {name: found[name] for name, value in wanted.items() if found[name] != value}:
        raise FailedError(f"{library.name} gave {wrong} in place of {wanted}")
    if "no NVIDIA driver: libcuda.so.1" not in found["error"] or not found["workspace"]:
        raise FailedError(
            f"{library.name} without libcuda.so.1 says {found['error']!r}, workspace {found['workspace']}"
        )
    data = library.read_bytes()
    kernels = emulation.folder / "host/ccnet/plugins/kernels"
    code = [path.read_bytes() for path in kernels.iterdir() if path.suffix in (".cubin", ".ptx")]
    if not code or any(content not in data for content in code):
        raise FailedError(f"{library.name} lacks code of its kernels")
    return {
        "library": library.name,
        "kernel_sets": len(found["contents"]),
        "embedded_files": len(code),
        "plugin_creators": found["creators"],
        "launch_without_a_driver": found["error"],
    }


def host_tests(emulation: Emulation, headers: Path | None) -> dict[str, Any]:
    """Run tests/plugins_trt/test_cpp_host.py with a compiler for aarch64, and what it makes under emulation.

    Programs that the tests compile run on QEMU by themselves; `python` is the root's, so that libraries load in it.
    """
    shims, versions_of = emulation.folder / "shims", emulation.folder / "headers"
    for folder in (shims, versions_of):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name in ("g++", "nm", "objdump"):
        (shims / name).symlink_to(str(shutil.which(f"{CROSS}{name}")))
    if headers is not None:
        (versions_of / headers.resolve().name).symlink_to(headers.resolve())
    report = emulation.folder / "host.xml"
    environment = {
        **os.environ,
        "PATH": f"{shims}:{os.environ['PATH']}",
        "CXX": f"{CROSS}g++",
        "ASM": f"{CROSS}gcc",
        "QEMU_LD_PREFIX": str(emulation.root),
        "QEMU_CPU": ORIN,
        "EDGEATTN_TENSORRT_HEADERS": str(versions_of),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = str(REPOSITORY / "tests/plugins_trt/test_cpp_host.py")
    options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=900", f"--junitxml={report}", tests]
    python = str(emulation.root / "usr/bin/python3")
    code = f"import sys, pytest; sys.executable = {python!r}; sys.exit(pytest.main({options!r}))"
    run(emulation.namespace([sys.executable, "-c", code]), env=environment, cwd=REPOSITORY)
    return counts(report)


def main() -> None:
    """Do all steps; see the module."""
    parser = argparse.ArgumentParser(description="Run the device side on aarch64 under QEMU user emulation.")
    parser.add_argument("--folder", type=Path, help="keeps the root for the next call (a temporary folder)")
    parser.add_argument("--tensorrt-headers", type=Path, help="folder of NvInferRuntime.h")
    parser.add_argument("--step", action="append", default=[], help="renew this step of the record (all)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"the record ({RESULTS.name})")
    arguments = parser.parse_args()
    if lost := [name for name in TOOLS if shutil.which(name) is None]:
        sys.exit(
            f"{', '.join(lost)} cannot be found. Install qemu-user-static, mmdebstrap, g++-aarch64-linux-gnu, cmake."
        )
    headers = arguments.tensorrt_headers
    if headers is not None and not (headers / "NvInferRuntime.h").is_file():
        sys.exit(f"{headers} holds no NvInferRuntime.h. Give the folder of TensorRT's headers, or drop the option.")
    with tempfile.TemporaryDirectory(prefix="edgeattn-aarch64-") as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        if folder.is_relative_to(REPOSITORY):
            sys.exit(f"{folder} lies in the repository. Give a folder outside it with --folder.")
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(Console(), (*BASIS, *arguments.step) if arguments.step else ())
        steps(record, Emulation(folder), headers)
    done = {entry["step"]: entry for entry in record.steps}
    if arguments.step:
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))["steps"]
        done = {entry["step"]: entry for entry in earlier} | done
    failed = [name for name, entry in done.items() if entry["status"] == "failed"]
    content = {
        "measured_on": SCOPE,
        "verdict": "FAIL" if failed else "PASS",
        "emulator": run([QEMU, "--version"]).splitlines()[0],
        "emulated_cpus": {ORIN: "nearest to Orin's Cortex-A78AE: ARMv8.2", NEWEST: "all extensions, SVE among them"},
        "host": {"machine": platform.machine(), "kernel": platform.release().partition("-")[0]},
        "versions": versions(),
        "tensorrt_headers": version_in(headers),
        "steps": list(done.values()),
        "not_run": NEVER,
    }
    write_text(arguments.output, json.dumps(content, indent=1) + "\n")
    sys.exit(1 if failed else 0)


BASIS: Mapping[str, Callable[[Emulation], dict[str, Any]]] = {
    "imitated board": make_board,
    "root for arm64": make_root,
    "bundle, on this machine": make_bundle,
    "unpack, check": unpack,
}
"""What every other step needs."""


def steps(record: Record, emulation: Emulation, headers: Path | None) -> None:
    """Do the steps in order; where root, board or bundle cannot be made, there is nothing to do the others with."""
    for name, work in BASIS.items():
        if not record.step(name, lambda work=work: work(emulation)):
            return
    record.step("plugin library, cross-compiled", lambda: cross_compiled(emulation, headers, plugins=True))
    record.step("kernel library without TensorRT", lambda: cross_compiled(emulation, headers, plugins=False))
    record.step("tests of the plugin library", lambda: host_tests(emulation, headers))
    record.step("plugin library, compiled by the device's code", lambda: compiled_inside(emulation, headers))
    record.step("hostile bundles", lambda: refuse(emulation))
    record.step("doctor, no board", lambda: doctor_on_nothing(emulation))
    record.step("doctor, imitated board", lambda: doctor_on_board(emulation))
    for precision in PRECISIONS:
        record.step(f"build, verify {precision}", lambda precision=precision: verify(emulation, precision))
    record.step("bench", lambda: bench(emulation))
    record.step("run", lambda: masks(emulation))
    record.step("tests of the device package", lambda: device_tests(emulation))


def version_in(headers: Path | None) -> str | None:
    """Return the version of TensorRT's headers."""
    text = (headers / "NvInferVersion.h").read_text() if headers else ""
    return (
        ".".join(re.findall(r"^#define (?:NV_TENSORRT|TRT)_(?:MAJOR|MINOR|PATCH)(?:_ENTERPRISE)? (\d+)", text, re.M))
        or None
    )


if __name__ == "__main__":
    main()
