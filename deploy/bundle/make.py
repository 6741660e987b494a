"""`make_bundle`: from a finished run to one archive that builds, verifies and times itself on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from edgeattn.deploy.bundle.golden import GoldenSample, checkpoint_of, deployment_of, golden_samples
from edgeattn.deploy.bundle.plugin_sources import plugin_members
from edgeattn.deploy.bundle.run_forms import BundledForm, Run, bundled_forms, read_run
from edgeattn.deploy.bundle.signature import check_signature, read_private_key, sign_bundle
from edgeattn.deploy.device import archive
from edgeattn.deploy.device import manifest as manifests
from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.signature import signature_of
from edgeattn.deploy.evidence import model_of_run
from edgeattn.deploy.pipeline import Progress
from edgeattn.export.run_directory import versions
from edgeattn.foundation import UserError, atomic_path, sha256_of
from edgeattn.models import ModelSpec
from edgeattn.targets import TARGETS, Target

GOLDEN_COUNT = 4
DEVICE_PACKAGE = "edgeattn_device"
"""Import name of `edgeattn.deploy.device` on the device."""

NOT_STATED = "not stated"


@dataclass(frozen=True)
class BundleRequest:
    """What to bundle.

    Attributes:
        run: folder that `edgeattn export` wrote.
        target: name of the deployment target.
        output: the archive.
        kernels: folder of compiled kernels; compiled now when None and the run has plugin nodes.
        checkpoint: weights of the run; those bundled with the model when None.
        images: folder that the run was judged on; the model's held-out samples when None.
        golden: golden samples at most.
        axes: ranges of dynamic axes, such as "batch=1:1:4".
        timing_cache: TensorRT timing cache of such a device.
        wheels: wheels to carry, such as Polygraphy's.
        weights_licence: licence of the trained weights, as an SPDX expression or in words.
        private_key: Ed25519 key in PEM form that signs the bundle; not signed when None.
        passphrase: of an encrypted key.
    """

    run: Path
    target: str
    output: Path
    kernels: Path | None = None
    checkpoint: Path | None = None
    images: Path | None = None
    golden: int = GOLDEN_COUNT
    axes: tuple[str, ...] = ()
    timing_cache: Path | None = None
    wheels: tuple[Path, ...] = ()
    weights_licence: str = NOT_STATED
    private_key: Path | None = None
    passphrase: str | None = None


@dataclass(frozen=True)
class Bundle:
    """An archive that was written or checked.

    Attributes:
        path: the archive.
        sha256: hexadecimal digest of all of it, to be published beside it.
        size: in bytes.
        manifest: content of its manifest.
    """

    path: Path
    sha256: str
    size: int
    manifest: Mapping[str, Any]


def make_bundle(request: BundleRequest, progress: Progress | None = None) -> Bundle:
    """Write a bundle; the same request gives the same bytes.

    Args:
        request: what to bundle.
        progress: told about the stages.

    Raises:
        UserError: something given cannot be used; nothing was written.
    """
    tell = progress or (lambda stage, done, total: None)
    _refuse_output(request.output)
    if request.private_key is not None:
        read_private_key(request.private_key, request.passphrase)  # an unusable key is refused before the work
    target, run = TARGETS.get(request.target), read_run(request.run)
    base = model_of_run(run.facts)
    spec = deployment_of(run).spec(base)
    checkpoint = checkpoint_of(run, spec, request.checkpoint)
    forms = bundled_forms(run, target, request.axes)
    members = {f"model/{form.precision}.onnx": form.data for form in forms}
    sources = [form.source for form in forms if form.plugin_nodes]
    plugins = None
    if sources:
        files, kernels = plugin_members(sources, target, request.kernels, tell)
        members |= files
        plugins = {"kernels": kernels}
    elif request.kernels is not None:
        raise UserError(f"kernels are given ({request.kernels}), but the run has no plugin form. Drop --kernels.")
    tell("golden", 0, request.golden)
    samples: list[GoldenSample] = []
    for sample in golden_samples(run, base, checkpoint, request.images, request.golden):
        members[sample.name] = sample.data
        samples.append(sample)
        tell("golden", len(samples), request.golden)
    members |= _device_package()
    if request.timing_cache is not None:
        members["timing.cache"] = _read(request.timing_cache)
    for wheel in request.wheels:
        members[f"wheels/{wheel.name}"] = _read(wheel)
    content = _content(request, run, spec, target, forms, samples, plugins)
    members["README.md"] = _readme(content, request).encode()
    bundle = _write(request.output, content, members)
    # A signature of other bytes must not stay beside them.
    signature_of(bundle.path).unlink(missing_ok=True)
    if request.private_key is not None:
        sign_bundle(bundle.path, request.private_key, request.passphrase)
    return bundle


def check_bundle(
    path: Path, sha256: str | None = None, *, public_key: Path | None = None, signature: Path | None = None
) -> Bundle:
    """Check every byte of a bundle; nothing is written and nothing in it is executed.

    Args:
        path: the archive.
        sha256: digest that its maker published.
        public_key: of the maker; the signature is checked before the archive is looked at.
        signature: beside the archive when None; only with a public key.

    Raises:
        UserError: it is not exactly what its manifest says, or another one than was published.
    """
    if not path.is_file():
        raise UserError(f"the bundle {path} does not exist. Check the path.")
    if public_key is not None:
        check_signature(path, public_key, signature)
    elif signature is not None:
        raise UserError(
            f"the signature {signature} is given without the key that it is checked with. Add --public-key."
        )
    digest = sha256_of(path)
    if sha256 is not None and digest != sha256.strip().lower():
        raise UserError(f"{path} has the SHA-256 {digest}, not {sha256}: it is another bundle. Copy it again.")
    with _device_errors(), path.open("rb") as stream:
        manifest = archive.check_archive(stream)
    return Bundle(path, digest, path.stat().st_size, manifest.content)


@contextmanager
def _device_errors() -> Iterator[None]:
    """Raise what the device's code refuses as the host's error."""
    try:
        yield
    except DeviceError as error:
        raise UserError(str(error)) from error


def _refuse_output(output: Path) -> None:
    if output.suffix != ".tar":
        raise UserError(f"a bundle is an uncompressed tar archive, but the output is {output}. Give a name in .tar.")
    if output.is_dir():
        raise UserError(f"the output {output} is a folder. Give a file name with -o.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error


def _device_package() -> dict[str, bytes]:
    folder = resources.files("edgeattn.deploy.device")
    return {
        f"{DEVICE_PACKAGE}/{source.name}": source.read_bytes()
        for source in folder.iterdir()
        if source.name.endswith(".py")
    }


def _content(
    request: BundleRequest,
    run: Run,
    spec: ModelSpec,
    target: Target,
    forms: Sequence[BundledForm],
    samples: Sequence[GoldenSample],
    plugins: Mapping[str, object] | None,
) -> dict[str, Any]:
    """Return the manifest but for the files."""
    figures = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    return {
        "kind": manifests.KIND,
        "format": manifests.FORMAT,
        "created_with": versions(),
        "licence": {"edgeattn": _own_licence(), "weights": request.weights_licence},
        "model": {
            "name": spec.name,
            "inputs": list(spec.inputs),
            "outputs": [
                {"name": output.name, "meaning": output.meaning, "align_corners": spec.align_corners}
                for output in spec.outputs
                if not output.auxiliary
            ],
            "classes": list(spec.classes),
            "metric": spec.metric,
            "preprocessing": dataclasses.asdict(spec.preprocessing),
            "size": list(run.facts["size"]),
        },
        "target": figures | {"unverified": sorted(target.unverified), "sources": dict(target.sources)},
        "precisions": {
            form.precision: {
                "model": f"model/{form.precision}.onnx",
                "form": form.representation,
                "plugin_nodes": form.plugin_nodes,
                "profiles": form.profiles,
                "tolerance": dict(form.tolerance),
                "allowed_error": form.allowed_errors([sample.outputs for sample in samples]),
                "support": dict(form.support),
            }
            for form in forms
        },
        "golden": {
            "samples": [{"file": sample.name, "index": index} for index, sample in enumerate(samples)],
            "origin": run.facts["evaluation"],
            "reference": f"PyTorch original {spec.original} on the CPU, FP32",
        },
        "plugins": plugins,
        "timing_cache": "timing.cache" if request.timing_cache is not None else None,
        "provenance": dict(run.manifest),
    }


def _own_licence() -> str:
    return str(importlib.metadata.metadata("edgeattn")["License-Expression"])


def _readme(content: Mapping[str, Any], request: BundleRequest) -> str:
    source = resources.files("edgeattn.deploy.bundle").joinpath("templates/README.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(content, wheels=[wheel.name for wheel in request.wheels])


def _write(path: Path, content: Mapping[str, Any], members: Mapping[str, bytes]) -> Bundle:
    """Write manifest and members in canonical order, after the reader's own check of the manifest."""
    files = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(members.items())
    }
    with _device_errors():
        data = manifests.sealed({**content, "files": files})
        manifest = manifests.parse(data)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for name, part in ((manifests.MANIFEST, data), *sorted(members.items())):
            stream.write(archive.header(name, len(part)))
            stream.write(part)
            stream.write(bytes(archive.padding(len(part))))
        stream.write(archive.END)
    return Bundle(path, sha256_of(path), path.stat().st_size, manifest.content)
