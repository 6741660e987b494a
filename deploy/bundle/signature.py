"""Signing bundles with Ed25519, and checking signatures, by the `cryptography` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.signature import read_signature, signature_of
from edgeattn.foundation import UserError, atomic_path

PASSPHRASE_VARIABLE = "EDGEATTN_SIGNING_PASSPHRASE"
"""Environment variable with the passphrase of an encrypted private key."""


def sign_bundle(bundle: Path, private_key: Path, passphrase: str | None = None) -> Path:
    """Write the signature of a bundle beside it.

    Args:
        bundle: the archive.
        private_key: Ed25519 key in PEM form, as `openssl genpkey -algorithm ed25519` writes it.
        passphrase: of an encrypted key.

    Returns:
        The path of the signature.

    Raises:
        UserError: the key cannot be used.
    """
    key = read_private_key(private_key, passphrase)
    path = signature_of(bundle)
    with atomic_path(path) as temporary:
        temporary.write_bytes(key.sign(_read(bundle, "bundle")))
    return path


def check_signature(bundle: Path, public_key: Path, signature: Path | None = None) -> None:
    """Check that the holder of a key has signed a bundle.

    Args:
        bundle: the archive.
        public_key: Ed25519 key in PEM form, as `openssl pkey -pubout` writes it.
        signature: beside the bundle when None.

    Raises:
        UserError: key or signature cannot be used, or the signature does not belong to bundle and key.
    """
    ed25519, serialization, invalid = _cryptography()
    found = signature or signature_of(bundle)
    try:
        data = read_signature(found)
    except DeviceError as error:
        raise UserError(str(error)) from error
    pem = _read(public_key, "public key")
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise UserError(f"{public_key} is no public key in PEM form. Make one with `openssl pkey -pubout`.") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"{public_key} is no Ed25519 key. Give the maker's public key.")
    try:
        key.verify(data, _read(bundle, "bundle"))
    except invalid as error:
        raise UserError(
            f"{bundle} was not signed as it is by the holder of {public_key}. Do not use it; copy bundle and signature "
            "again."
        ) from error


def read_private_key(path: Path, passphrase: str | None = None) -> Any:
    """Return an Ed25519 private key.

    Raises:
        UserError: it cannot be read, is another kind of key, or needs another passphrase.
    """
    ed25519, serialization, _ = _cryptography()
    pem = _read(path, "private key")
    try:
        key = serialization.load_pem_private_key(pem, passphrase and passphrase.encode())
    except TypeError as error:
        hint = f"set {PASSPHRASE_VARIABLE}" if passphrase is None else f"unset {PASSPHRASE_VARIABLE}"
        raise UserError(f"cannot open the private key {path}: {error}. To go on, {hint}.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is no private key in PEM form, or {PASSPHRASE_VARIABLE} is not its passphrase. Make one with "
            "`openssl genpkey -algorithm ed25519 -out maker.pem`."
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{path} is no Ed25519 key. Make one with `openssl genpkey -algorithm ed25519 -out maker.pem`.")
    return key


def _cryptography() -> tuple[Any, Any, type[Exception]]:
    """Return the modules of an optional dependency: Ed25519, key files, and the error of a wrong signature."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError(
            "signatures need the package cryptography. Install it with `pip install edgeattn[sign]`."
        ) from error
    return ed25519, serialization, InvalidSignature


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}. Check the path.") from error
