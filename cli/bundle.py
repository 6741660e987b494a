"""`edgeattn bundle`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgeattn.cli.console import CONSOLE, progress_bars
from edgeattn.deploy.bundle import GOLDEN_COUNT, NOT_STATED, Bundle, BundleRequest, check_bundle, make_bundle
from edgeattn.deploy.bundle.signature import PASSPHRASE_VARIABLE
from edgeattn.deploy.device.signature import signature_of
from edgeattn.foundation import UserError


def bundle(
    run: Annotated[Path | None, typer.Argument(help="Run directory that `edgeattn export` wrote.")] = None,
    target: Annotated[str | None, typer.Option(help="Deployment target; see `edgeattn list targets`.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The archive to write (.tar).")] = None,
    kernels: Annotated[
        Path | None, typer.Option(help="Kernels that `edgeattn plugins build` wrote; compiled now by default.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the run; those bundled with the model by default.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the run was judged on; held-out samples by default.")
    ] = None,
    golden: Annotated[int, typer.Option(min=1, max=999, help="Golden samples, at most.")] = GOLDEN_COUNT,
    axis: Annotated[
        list[str] | None, typer.Option(help="Range NAME=MIN:OPT:MAX of a dynamic axis, for all inputs; repeatable.")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT timing cache of such a device.")] = None,
    wheel: Annotated[list[Path] | None, typer.Option(help="Wheel to carry, such as Polygraphy's; repeatable.")] = None,
    weights_licence: Annotated[str, typer.Option(help="Licence of the trained weights.")] = NOT_STATED,
    sign: Annotated[
        Path | None, typer.Option(help="Ed25519 private key (PEM) that signs the bundle; the signature lies beside it.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Make nothing; check every byte of this bundle.")] = None,
    sha256: Annotated[str | None, typer.Option(help="With --check: SHA-256 that the bundle's maker published.")] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="With --check: Ed25519 key (PEM) that the bundle must be signed with.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="With --public-key: the signature; beside the bundle by default.")
    ] = None,
) -> None:
    """Pack a run into one archive that builds, verifies and times itself on the device; or check such an archive.

    Sign it with --sign, or publish its SHA-256 where its users trust it. The passphrase of an encrypted key is taken
    from EDGEATTN_SIGNING_PASSPHRASE. Exit status 2 when something cannot be used.
    """
    if check is not None:
        if run is not None or output is not None or sign is not None:
            raise UserError(f"--check reads {check} and makes nothing. Drop the run, --output and --sign.")
        _print(check_bundle(check, sha256, public_key=public_key, signature=signature), "checked")
        return
    if run is None or target is None or output is None:
        raise UserError("a bundle is made of a run for a target. Give RUN, --target and --output, or --check FILE.")
    if given := [
        name
        for name, value in (("--sha256", sha256), ("--public-key", public_key), ("--signature", signature))
        if value is not None
    ]:
        raise UserError(f"{' and '.join(given)} belongs to --check. Drop it.")
    request = BundleRequest(
        run=run,
        target=target,
        output=output,
        kernels=kernels,
        checkpoint=checkpoint,
        images=images,
        golden=golden,
        axes=tuple(axis or ()),
        timing_cache=timing_cache,
        wheels=tuple(wheel or ()),
        weights_licence=weights_licence,
        private_key=sign,
        passphrase=os.environ.get(PASSPHRASE_VARIABLE),
    )
    with progress_bars() as progress:
        made = make_bundle(request, progress)
    _print(made, "written")
    if sign is not None:
        CONSOLE.print(f"signature {signature_of(made.path)}", highlight=False, markup=False, soft_wrap=True)


def _print(bundle: Bundle, what: str) -> None:
    """Print what a bundle holds and how it is recognised."""
    content = bundle.manifest
    title = f"{content['model']['name']} for {content['target']['name']}"
    table = Table("precision", "form", "plugin nodes", title=escape(title))
    for name, entry in content["precisions"].items():
        table.add_row(escape(name), escape(entry["form"]), str(entry["plugin_nodes"]))
    CONSOLE.print(table)
    counts = f"{len(content['files']) + 1} files, {len(content['golden']['samples'])} golden samples"
    CONSOLE.print(
        f"{what}: {bundle.path}, {bundle.size / 2**20:.1f} MiB, {counts}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    CONSOLE.print(f"SHA-256 {bundle.sha256}", highlight=False, soft_wrap=True)
