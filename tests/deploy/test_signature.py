"""Signed bundles: what one side signs the other side checks, and nothing unsigned passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from edgeattn.deploy.bundle.signature import check_signature, sign_bundle
from edgeattn.deploy.device.__main__ import main
from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.signature import require_signature
from edgeattn.deploy.device.system import Finished, System
from edgeattn.foundation import UserError

DEVICE = Path(__file__).parents[2] / "deploy" / "device"
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def write_keys(
    folder: Path, name: str, key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, passphrase: bytes = b""
) -> None:
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase)
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, PKCS8, protection))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some bytes in place of a bundle, the maker's keys and another's."""
    (tmp_path / "b.tar").write_bytes(b"bundle" * 1000)
    write_keys(tmp_path, "maker", ed25519.Ed25519PrivateKey.generate())
    write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    write_keys(tmp_path, "locked", ed25519.Ed25519PrivateKey.generate(), b"open sesame")
    write_keys(tmp_path, "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    return tmp_path


def test_both_sides_accept_what_the_maker_signed(folder: Path) -> None:
    assert sign_bundle(folder / "b.tar", folder / "maker.pem") == folder / "b.tar.sig"
    check_signature(folder / "b.tar", folder / "maker.pub")
    require_signature(folder / "b.tar", folder / "maker.pub")
    sign_bundle(folder / "b.tar", folder / "locked.pem", "open sesame")
    require_signature(folder / "b.tar", folder / "locked.pub")


@pytest.mark.parametrize("change", ["bundle", "longer", "signature", "key"])
def test_both_sides_refuse_anything_else(folder: Path, change: str) -> None:
    bundle, signature, key = folder / "b.tar", sign_bundle(folder / "b.tar", folder / "maker.pem"), folder / "maker.pub"
    data = bundle.read_bytes()
    if change == "bundle":
        bundle.write_bytes(data[:-1] + b"x")
    elif change == "longer":
        bundle.write_bytes(data + b"\0")
    elif change == "signature":
        signature.write_bytes(bytes([signature.read_bytes()[0] ^ 1]) + signature.read_bytes()[1:])
    else:
        key = folder / "other.pub"
    with pytest.raises(UserError, match="was not signed as it is"):
        check_signature(bundle, key)
    with pytest.raises(DeviceError, match="was not signed as it is"):
        require_signature(bundle, key)


def test_what_cannot_be_used_is_named(folder: Path) -> None:
    bundle = folder / "b.tar"
    for key, passphrase, reason in (
        ("missing.pem", None, "cannot read the private key"),
        ("maker.pub", None, "no private key in PEM form"),
        ("rsa.pem", None, "no Ed25519 key"),
        ("locked.pem", None, "EDGEATTN_SIGNING_PASSPHRASE"),
        ("locked.pem", "wrong", "not its passphrase"),
        ("maker.pem", "surplus", "unset EDGEATTN_SIGNING_PASSPHRASE"),
    ):
        with pytest.raises(UserError, match=reason):
            sign_bundle(bundle, folder / key, passphrase)
    assert not (folder / "b.tar.sig").exists()
    with pytest.raises(UserError, match="cannot read the signature"):
        check_signature(bundle, folder / "maker.pub")
    (folder / "b.tar.sig").write_bytes(b"short")
    with pytest.raises(DeviceError, match="64 bytes"):
        require_signature(bundle, folder / "maker.pub")
    sign_bundle(bundle, folder / "maker.pem")
    for key, reason in (("maker.pem", "no public key"), ("rsa.pub", "no Ed25519 key")):
        with pytest.raises(UserError, match=reason):
            check_signature(bundle, folder / key)
    with pytest.raises(DeviceError, match="does not exist"):
        require_signature(bundle, folder / "missing.pub")
    absent = System(run=lambda command: None)
    with pytest.raises(DeviceError, match="Install the package openssl"):
        require_signature(bundle, folder / "maker.pub", system=absent)
    failing = System(run=lambda command: Finished(1, "no"))
    with pytest.raises(DeviceError, match="Do not use it"):
        require_signature(bundle, folder / "maker.pub", system=failing)


def test_nothing_is_unpacked_without_the_signature(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, output = folder / "b.tar", folder / "out"
    arguments = ["unpack", str(bundle), "-o", str(output)]
    assert main([*arguments, "--public-key", str(folder / "maker.pub")]) == 2
    assert "cannot read the signature" in capsys.readouterr().err
    assert main([*arguments, "--signature", str(folder / "b.tar.sig")]) == 2
    assert "--public-key" in capsys.readouterr().err
    sign_bundle(bundle, folder / "maker.pem")
    assert main([*arguments, "--public-key", str(folder / "maker.pub")]) == 2  # signed, but no bundle
    assert "signed" not in capsys.readouterr().err
    assert not output.exists()


def test_the_device_package_installs_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(DEVICE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, capture_output=True)
    shown = subprocess.run(
        [sys.executable, "-m", "edgeattn_device", "--help"], cwd=target, capture_output=True, text=True, check=True
    )
    assert "verify" in shown.stdout
    assert (target / "bin" / "edgeattn-device").is_file()
