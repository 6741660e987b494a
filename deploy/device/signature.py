"""The signature of a bundle: Ed25519 over all its bytes, checked before anything in it is looked at.

The device checks with the `openssl` program, which JetPack has, so that no further Python package is needed.
"""

from __future__ import annotations

from pathlib import Path

from .errors import DeviceError
from .system import System

SIGNATURE_SUFFIX = ".sig"
SIGNATURE_BYTES = 64


def signature_of(bundle: Path) -> Path:
    """Return where the signature of a bundle lies unless it is named: beside it."""
    return bundle.with_name(bundle.name + SIGNATURE_SUFFIX)


def read_signature(path: Path) -> bytes:
    """Return a signature.

    Raises:
        DeviceError: there is none, or it has another length.
    """
    try:
        with path.open("rb") as stream:
            signature = stream.read(SIGNATURE_BYTES + 1)
    except OSError as error:
        raise DeviceError(
            f"cannot read the signature {path}: {error.strerror or error}. Copy it from where the bundle came from."
        ) from error
    if len(signature) != SIGNATURE_BYTES:
        raise DeviceError(f"{path} is no Ed25519 signature, which has {SIGNATURE_BYTES} bytes. Copy it again.")
    return signature


def require_signature(
    bundle: Path, public_key: Path, signature: Path | None = None, system: System | None = None
) -> None:
    """Check that the holder of a key has signed a bundle.

    Args:
        bundle: the archive.
        public_key: of the maker, in PEM form, as `openssl pkey -pubout` writes it.
        signature: beside the bundle when None.
        system: runs `openssl`.

    Raises:
        DeviceError: the signature is missing, does not belong to bundle and key, or cannot be checked here.
    """
    found = signature or signature_of(bundle)
    read_signature(found)
    if not public_key.is_file():
        raise DeviceError(f"the public key {public_key} does not exist. Check the path.")
    key = ("-pubin", "-inkey", str(public_key))
    done = (system or System()).run(
        ("openssl", "pkeyutl", "-verify", *key, "-rawin", "-in", str(bundle), "-sigfile", str(found))
    )
    if done is None:
        raise DeviceError("the program openssl, which checks signatures, is not there. Install the package openssl.")
    if done.status != 0:
        raise DeviceError(
            f"{bundle} was not signed as it is by the holder of {public_key}: {done.output.strip()}. Do not use it; "
            "copy both again."
        )
