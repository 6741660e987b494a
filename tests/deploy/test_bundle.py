"""Bundles: reproducible, complete for the target, refused when anything in them was changed, usable on the device."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from edgeattn.cli.main import app
from edgeattn.deploy.bundle import BundleRequest, check_bundle, make, make_bundle
from edgeattn.deploy.bundle.run_forms import BundledForm, require_golden_fits
from edgeattn.deploy.device import archive
from edgeattn.deploy.device import manifest as manifests
from edgeattn.deploy.device.__main__ import main as device_main
from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.golden import Comparison, Golden, labels_of
from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.export.engine.profiles import InputRange
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.plugins_trt.cpp_table import write_table
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.model_operations import operations_of
from edgeattn.plugins_trt.selection import variants
from edgeattn.validation.saturation import Squashing
from edgeattn.validation.tolerance import Arithmetic, tolerance

FLOAT = onnx.TensorProto.FLOAT
WITH_BODIES, STRIPPED = "jetpack-7.2-orin-nx-16", "jetpack-6.2-orin-nx-16"


def kernel_library(folder: Path, model: Path, *, ptx_isa: int = 80) -> KernelLibrary:
    """Write a library with every kernel that a model needs on sm_87; the code in it is none."""
    kernels = []
    for number, variant in enumerate(variants(operations_of(model), (87,))):
        facts = {"operation": variant.spec.name, "op_type": variant.spec.op_type, "launch": variant.launch.name}
        facts |= {"kernel": variant.launch.kernel, "element": variant.element, "layout": variant.layout}
        facts |= {"static": dict(variant.static), "constants": dict(variant.constants), "scope": dict(variant.scope)}
        figures = dict.fromkeys(("shared", "registers", "stack", "spill_stores", "spill_loads"), 1)
        files = {"cubin": f"k{number}.cubin", "ptx": f"k{number}.ptx", "source_hash": "0", "entry": "k"}
        parameters = variant.parameters
        kernels.append(
            CompiledKernel(**facts, **figures, **files, sm=87, ptx_isa=ptx_isa, warps=4, parameters=parameters)
        )
    library = KernelLibrary(folder, tuple(kernels), "3.9")
    library.write(
        {name: f".target sm_87 // {name}".encode() for kernel in kernels for name in (kernel.cubin, kernel.ptx)}
    )
    write_table(library)
    return library


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the digits CCNet with plugin nodes."""
    folder = tmp_path_factory.mktemp("run") / "ccnet"
    request = ExportRequest("ccnet-digits", size=(32, 40), plugins=True, target=WITH_BODIES, sample_count=2)
    assert ExportRun(request, folder).run()["verdict"] == "PASS"
    return folder


@pytest.fixture(scope="module")
def kernels(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    return kernel_library(folder, run / "model.plugin.onnx").folder


@pytest.fixture(scope="module")
def bundle(run: Path, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "ccnet.tar"
    start = time.perf_counter()
    make_bundle(BundleRequest(run, WITH_BODIES, path, kernels=kernels, golden=2))
    assert time.perf_counter() - start <= 10
    return path


def members_of(path: Path) -> dict[str, bytes]:
    """Return the members as Python's own reader of tar archives sees them."""
    with tarfile.open(path) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def packed(members: dict[str, bytes]) -> bytes:
    """Return an archive of members in the order given, as a careful forger writes it."""
    parts = [
        archive.header(name, len(data)) + data + bytes(archive.padding(len(data))) for name, data in members.items()
    ]
    return b"".join(parts) + archive.END


def test_the_same_request_gives_the_same_bytes_under_any_name(
    run: Path, kernels: Path, bundle: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    again = make_bundle(BundleRequest(moved, WITH_BODIES, tmp_path / "again.tar", kernels=kernels, golden=2))
    assert again.path.read_bytes() == bundle.read_bytes()
    assert again.sha256 == hashlib.sha256(bundle.read_bytes()).hexdigest()
    assert check_bundle(bundle, again.sha256.upper()).manifest == again.manifest


def test_manifest_says_what_is_in_it_and_where_it_comes_from(run: Path, bundle: Path) -> None:
    members, manifest = members_of(bundle), check_bundle(bundle).manifest
    assert next(iter(members)) == "manifest.json"
    assert set(members) - {"manifest.json"} == set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert entry == {"size": len(members[name]), "sha256": hashlib.sha256(members[name]).hexdigest()}
    assert manifest["provenance"] == json.loads((run / "manifest.json").read_text())
    parity = json.loads((run / "parity.json").read_text())
    (entry,) = manifest["precisions"].values()
    assert entry["tolerance"] == next(form for form in parity["forms"] if form["form"]["plugin"])["tolerance"]
    assert manifest["target"]["sm"] == 87
    assert manifest["licence"] == {"edgeattn": "Apache-2.0", "weights": "not stated"}
    assert manifest["created_with"]["edgeattn"]
    sources = {name for name in members if name.startswith("plugins/")}
    assert {"plugins/cpp/CMakeLists.txt", "plugins/cpp/plugin.cpp", "plugins/kernels/kernel_table.cpp"} <= sources
    assert sum(name.endswith((".cubin", ".ptx")) for name in sources) == 8  # two launches in two layouts
    readme = members["README.md"].decode()
    for command in ("check", "doctor", "build --precision fp32", "verify --precision fp32", "bench --precision fp32"):
        assert f"\n    python3 -m edgeattn_device {command}\n" in readme


def test_representation_follows_the_target(run: Path, kernels: Path, bundle: Path, tmp_path: Path) -> None:
    make_bundle(BundleRequest(run, STRIPPED, tmp_path / "old.tar", kernels=kernels, golden=1))
    old, new = (onnx.load_from_string(members_of(path)["model/fp32.onnx"]) for path in (tmp_path / "old.tar", bundle))
    assert [node.op_type for node in old.graph.node] == [node.op_type for node in new.graph.node]
    assert not old.functions
    assert new.functions
    assert check_bundle(tmp_path / "old.tar").manifest["precisions"]["fp32"]["form"] == "plugin, stripped"


@pytest.mark.parametrize("model", ["ccnet-digits", "cosnet-digits"])
def test_device_labels_as_the_model_declares(model: str) -> None:
    torch = pytest.importorskip("torch")
    spec, rng = MODELS.get(model), np.random.default_rng(5)
    kept = [output for output in spec.outputs if not output.auxiliary]
    logits = kept[0].meaning == "logits"
    shape = (1, len(spec.classes), 6, 7) if logits else (1, 1, 33, 45)
    outputs = {output.name: rng.random(shape, np.float32) for output in kept}
    expected = spec.labels({name: torch.from_numpy(value) for name, value in outputs.items()}, (33, 45)).numpy()
    meanings = [{"name": output.name, "meaning": output.meaning} for output in kept]
    np.testing.assert_array_equal(labels_of(outputs, meanings, (33, 45)), expected)


def test_kernels_are_compiled_where_none_are_given(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiled(
        folder: str, wanted: list[Any], targets: Any, **_: object
    ) -> tuple[KernelLibrary, dict[str, list[str]]]:
        asked.append((len(wanted), targets))
        return kernel_library(Path(folder), run / "model.plugin.onnx"), problems

    monkeypatch.setattr("edgeattn.deploy.bundle.plugin_sources.build_library", compiled)
    problems: dict[str, list[str]] = {}
    make_bundle(BundleRequest(run, WITH_BODIES, tmp_path / "a.tar", golden=1))
    assert [(count, [*targets]) for count, targets in asked] == [(4, [87])]
    problems["k0.cubin"] = ["It spills."]
    with pytest.raises(UserError, match=r"k0\.cubin does not suit .* It spills"):
        make_bundle(BundleRequest(run, WITH_BODIES, tmp_path / "b.tar", golden=1))
    assert not (tmp_path / "b.tar").exists()


# What a user may get wrong.


def edited_run(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def make_run(run: Path, folder: Path) -> Path:
        copy = shutil.copytree(run, folder / "run")
        change(copy)
        return copy

    return make_run


def _fail_parity(folder: Path) -> None:
    parity = json.loads((folder / "parity.json").read_text())
    (folder / "parity.json").write_text(json.dumps({**parity, "verdict": "FAIL"}))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / "parity.json").read_bytes()).hexdigest()
    manifest["stages"]["compare"]["outputs"]["parity.json"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is no run"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a manifest"),
        (lambda folder: (folder / "parity.json").write_text("{}"), "not the file that the run wrote"),
        (lambda folder: (folder / "model.plugin.onnx").write_bytes(b"x"), "not the file that the run wrote"),
        (_fail_parity, "failed parity"),
    ],
)
def test_runs_that_cannot_be_bundled(
    run: Path, kernels: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = edited_run(change)(run, tmp_path)
    with pytest.raises(UserError, match=message):
        make_bundle(BundleRequest(folder, WITH_BODIES, tmp_path / "out.tar", kernels=kernels))
    assert not (tmp_path / "out.tar").exists()


def test_arguments_that_do_not_fit(run: Path, kernels: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.tar"
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    lacking = KernelLibrary.load(kernels)
    part = KernelLibrary(tmp_path / "part", lacking.kernels[1:], "3.9")
    part.write({name: b"x" for kernel in part.kernels for name in (kernel.cubin, kernel.ptx)})
    new = kernel_library(tmp_path / "new", run / "model.plugin.onnx", ptx_isa=99)
    for changes, message in (
        ({"output": tmp_path / "out.tar.gz"}, "uncompressed tar"),
        ({"target": "jetpack-6.2-orin-nx-61"}, "unknown target"),
        ({"checkpoint": other}, "is not the checkpoint"),
        ({"images": tmp_path}, "was judged on held-out samples"),
        ({"axes": ("batch=1:1:4",)}, "no dynamic axis"),
        ({"timing_cache": tmp_path / "none"}, "cannot read"),
        ({"kernels": part.folder}, "lacks"),
        ({"kernels": new.folder}, "has PTX 9.9"),
    ):
        arguments = {"run": run, "target": WITH_BODIES, "output": output, "kernels": kernels, "golden": 1, **changes}
        with pytest.raises(UserError, match=message):
            make_bundle(BundleRequest(**arguments))  # type: ignore[arg-type]
        assert not output.exists()


@pytest.mark.parametrize(
    ("minimum", "maximum", "fits"),
    [
        ((1, 3, 32, 32), (4, 3, 64, 64), True),
        ((1, 3, 33, 32), (4, 3, 64, 64), False),
        ((2, 3, 8, 8), (4, 3, 64, 64), False),
    ],
)
def test_ranges_take_the_golden_samples(minimum: tuple[int, ...], maximum: tuple[int, ...], fits: bool) -> None:
    profiles = [(InputRange("image", minimum, maximum, maximum),)]
    if fits:
        require_golden_fits(profiles, (32, 40))
        return
    with pytest.raises(UserError, match="golden samples are 1x3x32x40"):
        require_golden_fits(profiles, (32, 40))


def test_killed_while_writing_leaves_the_old_bundle(
    run: Path, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.tar"
    output.write_bytes(b"the old one")

    def killed(_: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(make.archive, "padding", killed)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(BundleRequest(run, WITH_BODIES, output, kernels=kernels, golden=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]
    assert output.read_bytes() == b"the old one"


# Hostile bundles.


def _flips(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Yield archives with one bit changed: in headers, in the manifest, in the zeros between members, anywhere."""
    size = int(data[124:135], 8)
    between = 512 + size + archive.padding(size)
    places = [*range(0, 512, 17), 512 + size, between - 1, between + 510, len(data) - 1, len(data) - 1024]
    places += [512 + rng.randrange(size) for _ in range(30)]
    places += [rng.randrange(len(data)) for _ in range(30)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def _cuts(data: bytes, rng: random.Random) -> Iterator[bytes]:
    yield from (data[:length] for length in (0, 1, 511, 512, 1024, len(data) - 1, len(data) - 512, len(data) - 1024))
    yield from (data[: rng.randrange(len(data))] for _ in range(17))
    yield from (data + extra for extra in (b"\0", bytes(512), bytes(1024), data, b"more"))


def _swaps(members: dict[str, bytes], rng: random.Random) -> Iterator[bytes]:
    names = [name for name in members if name != "manifest.json"]
    for _ in range(15):
        first, second = rng.sample(names, 2)
        yield packed({**members, first: members[second], second: members[first]})
        order = [second if name == first else first if name == second else name for name in members]
        yield packed({name: members[name] for name in order})


def _path_tricks(members: dict[str, bytes]) -> Iterator[bytes]:
    data = packed(members)
    victim = next(name for name in members if name != "manifest.json")
    header, size = archive.header(victim, len(members[victim])), len(members[victim])
    for name in ("../evil", "/tmp/evil", "a/../../evil", "work/evil", "golden/000.npz", "~/evil"):
        yield data.replace(header, archive.header(name, size))
        files = {**members, name: b"evil"} if name not in members else members
        yield resealed(files, lambda content, name=name: content["files"].update({name: entry_of(b"evil")}))
    for kind in b"123456xgLS":
        forged = bytearray(header)
        forged[156] = kind
        forged[157:161] = b"/etc"
        forged[148:156] = b" " * 8
        forged[148:156] = f"{sum(forged):06o}\0 ".encode()
        yield data.replace(header, bytes(forged))
    first = {name: members[name] for name in [*members][:2]}
    yield packed(members)[:-1024] + packed(first)  # members twice
    yield packed({name: content for name, content in members.items() if name != victim})
    yield packed({"manifest.json": members["manifest.json"], "evil": b"x", **members})


def entry_of(data: bytes) -> dict[str, object]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def resealed(members: dict[str, bytes], change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return an archive whose manifest was edited by someone who knows how it is sealed."""
    content = json.loads(members["manifest.json"])
    change(content)
    rest = {name: members[name] for name in sorted(members) if name != "manifest.json"}
    return packed({"manifest.json": manifests.sealed(content), **rest})


def _edits(members: dict[str, bytes]) -> Iterator[bytes]:
    """Yield edited manifests: first careless edits, then edits that keep the manifest's own digest right."""
    text = members["manifest.json"]
    rest = {name: members[name] for name in members if name != "manifest.json"}
    for old, new in (
        (b'"sm": 87', b'"sm": 86'),
        (b'"relative_l2": 1e-05', b'"relative_l2": 1e+05'),
        (b'"weights": "not stated"', b'"weights": "mine, mine!"'),
        (b'"format": 1,', b'"format": 2,'),
        (b'"model":', b'"Model":'),
        (b'{\n "created_with"', b'{\n "format": 1,\n "created_with"'),
        (b"\n", b"\r\n"),
        (b'"target"', b'"t\\u0061rget"'),
    ):
        assert old in text
        yield packed({"manifest.json": text.replace(old, new, 1), **rest})
    for replacement in (b"", b"[]", b"null", b"\xff\xfe", b"{" * 20000, b'{"kind": NaN}', text + b" "):
        yield packed({"manifest.json": replacement, **rest})
    model = "model/fp32.onnx"
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda content: content.update(format=2),
        lambda content: content.update(format=True),
        lambda content: content.update(kind="other"),
        lambda content: content.update(surprise=1),
        lambda content: content.pop("target"),
        lambda content: content["target"].pop("sm"),
        lambda content: content["files"].pop(model),
        lambda content: content["files"].update({model: {"size": -1, "sha256": "0" * 64}}),
        lambda content: content["files"].update({model: {"size": 1 << 60, "sha256": "0" * 64}}),
        lambda content: content["files"].update({model: {"size": 1.5, "sha256": "0" * 64}}),
        lambda content: content["files"].update({model: {"size": 1, "sha256": "0" * 63}}),
        lambda content: content["files"].update({model: {**content["files"][model], "sha256": "0" * 64}}),
        lambda content: content["files"].update({f"bomb{n}": {"size": 4 << 30, "sha256": "0" * 64} for n in range(9)}),
        lambda content: content["files"].update({f"many{n}": entry_of(b"") for n in range(5000)}),
        lambda content: content["files"].update({"MODEL/fp32.onnx": entry_of(b"")}),
        lambda content: content["files"].update({"model": entry_of(b"")}),
        lambda content: content["files"].update({"a" * 101: entry_of(b"")}),
        lambda content: content["files"].update({"manifest.json": entry_of(b"")}),
        lambda content: content["precisions"]["fp32"].update(model="../../etc/passwd"),
        lambda content: content["golden"].update(samples=[]),
        lambda content: content["golden"]["samples"][0].update(file="/etc/passwd"),
        lambda content: content.update(plugins=None),
        lambda content: content.update(timing_cache="timing.cache"),
        lambda content: content.update(precisions={}),
        lambda content: content["precisions"]["fp32"].pop("tolerance"),
        lambda content: content["precisions"]["fp32"]["tolerance"].update(outputs=[{"output": "logits"}]),
        lambda content: content["precisions"]["fp32"].update(allowed_error={"logits": [1.0]}),
        lambda content: content["precisions"]["fp32"].update(allowed_error={"logits": ["1", "1"]}),
    ]
    yield from (resealed(members, change) for change in edits)


def test_every_mutated_bundle_is_refused_and_writes_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, members, rng = bundle.read_bytes(), members_of(bundle), random.Random(11)
    assert packed(members) == data
    assert resealed(members, lambda content: None) == data
    mutants = [
        *_flips(data, rng),
        *_cuts(data, rng),
        *_swaps(members, rng),
        *_path_tricks(members),
        *_edits(members),
    ]
    assert len({hashlib.sha256(mutant).digest() for mutant in mutants}) >= 200
    assert all(mutant != data for mutant in mutants)

    def executed(*_: object, **__: object) -> None:
        raise AssertionError("something was executed")

    for name in ("subprocess.Popen", "os.system", "builtins.exec", "builtins.eval", "pickle.loads"):
        monkeypatch.setattr(name, executed)
    loaded = set(sys.modules)
    folder = tmp_path / "inside" / "bundle"
    folder.parent.mkdir()
    for number, mutant in enumerate(mutants):
        with pytest.raises(DeviceError) as refusal:
            archive.unpack(io.BytesIO(mutant), folder)
        assert len(str(refusal.value)) > 20, number
    assert set(sys.modules) == loaded
    assert [path for path in tmp_path.rglob("*") if path != folder.parent] == []


def test_reasons_are_named(bundle: Path, tmp_path: Path) -> None:
    members = members_of(bundle)
    data = packed(members)
    header = archive.header("README.md", len(members["README.md"]))
    link = bytearray(header)
    link[156:157] = b"2"
    link[148:156] = b" " * 8
    link[148:156] = f"{sum(link):06o}\0 ".encode()
    evil = archive.header("../../evil.md", len(members["README.md"]))
    for mutant, message in (
        (data[:-700], "is cut off: "),
        (data + b"x", "bytes that belong to no file"),
        (data.replace(header, bytes(link)), "holds a link, 'README.md'"),
        (data.replace(header, evil), r"holds '../../evil.md' in place of 'README.md'"),
        (data.replace(b"# ccnet-digits", b"# ccnet-digitz"), "README.md is not the file that was bundled"),
        (resealed(members, lambda content: content.update(format=9)), "format 9; this release reads format 1"),
        (
            resealed(members, lambda content: content["files"].update({"../x": entry_of(b"")})),
            "leads out of the folder",
        ),
        (gzip.compress(data, 1), "uncompressed"),
    ):
        path = tmp_path / "mutant.tar"
        path.write_bytes(mutant)
        with pytest.raises(UserError, match=message):
            check_bundle(path)
    with pytest.raises(UserError, match="it is another bundle"):
        check_bundle(bundle, "0" * 64)


def test_signed_from_the_command_line(run: Path, kernels: Path, tmp_path: Path) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "maker.pem"], check=True)
    public = ["openssl", "pkey", "-in", tmp_path / "maker.pem", "-pubout", "-out", tmp_path / "maker.pub"]
    subprocess.run(public, check=True)
    output = tmp_path / "ccnet.tar"
    made = ["bundle", str(run), "--target", WITH_BODIES, "-o", str(output), "--kernels", str(kernels)]
    shown = CliRunner().invoke(app, [*made, "--sign", str(tmp_path / "maker.pem")])
    assert shown.exit_code == 0, shown.output
    assert "ccnet.tar.sig" in shown.output
    check = ["bundle", "--check", str(output), "--public-key", str(tmp_path / "maker.pub")]
    assert CliRunner().invoke(app, check).exit_code == 0
    folder = tmp_path / "ccnet"
    assert device_main(["unpack", str(output), "-o", str(folder), "--public-key", str(tmp_path / "maker.pub")]) == 0
    assert (folder / "manifest.json").is_file()
    assert CliRunner().invoke(app, made).exit_code == 0  # made again without a key: no signature of other bytes stays
    assert not (tmp_path / "ccnet.tar.sig").exists()
    assert isinstance(CliRunner().invoke(app, check).exception, UserError)


# On the device, as far as a machine without TensorRT shows it.


def test_unpacked_bundle_works_without_edgeattn(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ccnet"
    folder.mkdir()
    subprocess.run(["tar", "-xf", str(bundle), "-C", str(folder)], check=True)
    guard = (
        "import sys, runpy\n"
        "class Guard:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('edgeattn', 'torch', 'onnx'):\n"
        "            raise AssertionError(name + ' was imported')\n"
        "sys.meta_path.insert(0, Guard())\n"
        "sys.argv = ['edgeattn_device', *sys.argv[1:]]\n"
        "runpy.run_module('edgeattn_device', run_name='__main__')\n"
    )

    def device(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", guard, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    for arguments in (["check"], ["build", "--engine", "onnxruntime"], ["verify", "--engine", "onnxruntime"]):
        done = device(*arguments)
        assert done.returncode == 0, done.stderr
    record = json.loads((folder / "work" / "verify.fp32.json").read_text())
    assert record["verdict"] == "PASS"
    assert "not TensorRT" in record["measured"]
    assert record["outputs"]["logits"]["worst_relative_l2"] <= record["limits"]["relative_l2"] == 1e-5
    (folder / "model" / "fp32.onnx").write_bytes(b"another model")
    done = device("verify", "--engine", "onnxruntime")
    assert done.returncode == 2
    assert "model/fp32.onnx is not the file that was bundled" in done.stderr


def test_command_line(run: Path, kernels: Path, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "cli.tar"
    arguments = [
        "bundle",
        str(run),
        "--target",
        WITH_BODIES,
        "-o",
        str(output),
        "--kernels",
        str(kernels),
        "--golden",
        "2",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert output.read_bytes() == bundle.read_bytes()
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    done = CliRunner().invoke(app, ["bundle", "--check", str(output), "--sha256", digest])
    assert done.exit_code == 0
    assert digest in done.output
    for wrong in (["bundle", str(run)], ["bundle", str(run), "--check", str(output)], ["bundle", "--check", str(run)]):
        assert isinstance(CliRunner().invoke(app, wrong).exception, UserError)


def test_almost_empty_masks_raise_no_false_alarm_on_the_device() -> None:
    logits = np.random.default_rng(0).normal(-18, 0.5, (2, 1, 1, 32, 32)).astype(np.float32)
    exact = [(1 / (1 + np.exp(-sample.astype(np.float64)))).astype(np.float32) for sample in logits]
    squashing = Squashing("mask", "Sigmoid")
    derived = tolerance("fp32", Arithmetic(40, 576, 0, (squashing,)), peak=1e-6, rms=1e-8)
    record = json.loads(json.dumps(dataclasses.asdict(derived)))
    form = BundledForm("fp32", Path("model.onnx"), b"", "plain", 0, [], record, (squashing,), {})
    allowed = json.loads(json.dumps(form.allowed_errors([{"mask": mask} for mask in exact])))

    def judged(engine: Callable[[np.ndarray], np.ndarray], allowed: dict[str, list[float]] | None) -> list[str]:
        comparison = Comparison(2, (32, 32), [{"name": "mask", "meaning": "probability"}])
        for sample, mask in zip(logits, exact, strict=True):
            golden = Golden({}, {"mask": mask}, (mask > 0.5).astype(np.int64), None)
            comparison.add(golden, {"mask": engine(sample)})
        reasons: list[str] = comparison.judge(record, allowed)["reasons"]
        return reasons

    def kernel(sample: np.ndarray) -> np.ndarray:
        """An FP32 sigmoid as good as any: half of one, plus half of a tangent."""
        return np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * sample)

    assert judged(kernel, None)  # what the relative error alone says
    assert judged(kernel, allowed) == []
    (reason,) = judged(lambda sample: kernel(sample + 4), allowed)
    assert reason.startswith("output mask: relative L2 5")
    # What the user set counts as it stands.
    limit = {"output": "mask", "relative_l2": None, "max_abs": 1e-9}
    form = dataclasses.replace(form, tolerance={**record, "outputs": [limit]})
    assert form.allowed_errors([{"mask": mask} for mask in exact]) == {}
    record["outputs"] = [limit]
    (reason,) = judged(kernel, {})
    assert "absolute difference" in reason


def test_bf16_is_for_tensorrt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ExportRequest("ccnet-digits", size=(32, 40), bf16=True, target=WITH_BODIES, sample_count=1)
    assert ExportRun(request, tmp_path / "run").run()["verdict"] == "PASS"
    made = make_bundle(BundleRequest(tmp_path / "run", WITH_BODIES, tmp_path / "net.tar", golden=1))
    entry = made.manifest["precisions"]["bf16"]
    assert entry["support"]["verdict"] == "accepted"
    assert entry["tolerance"]["label_agreement"] == pytest.approx(0.96)
    model = onnx.load_from_string(members_of(made.path)["model/bf16.onnx"])
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {FLOAT}
    assert device_main(["unpack", str(made.path), "-o", str(tmp_path / "net")]) == 0
    build = ["build", "--bundle", str(tmp_path / "net"), "--engine", "onnxruntime", "--precision"]
    assert device_main([*build, "fp32"]) == 0
    capsys.readouterr()
    assert device_main([*build, "bf16"]) == 2
    assert "convolutions in BF16, which TensorRT has" in " ".join(capsys.readouterr().err.split())
