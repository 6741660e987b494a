"""The guides' commands run as they stand, and print what the guides show."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeattn.cli.main import main
from edgeattn.deploy.device.__main__ import main as device_main
from edgeattn.models import MODELS

DOCS = Path(__file__).parent.parent / "docs"
ON_THE_DEVICE = "python3 -m edgeattn_device "
NOT_ZERO = "# exit status "


def steps(guide: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield language, content and the lines that are shown as its output for each block that is run."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for number, (language, content) in enumerate(blocks):
        if language == "text":
            continue
        following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
        yield language, content, following[1].splitlines() if following[0] == "text" else []


def require_shown(lines: list[str], printed: str) -> None:
    """Require each line in the output; "..." stands for anything, and space for any space."""
    flat = " ".join(printed.split())
    for line in lines:
        pattern = ".*?".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        assert re.search(pattern, flat), f"{line!r} is not in the output:\n{printed}"


def run_command(command: str, few: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = int(command.partition(NOT_ZERO)[2] or 0)
    arguments = shlex.split(command, comments=True)
    if arguments[0] != "edgeattn":
        assert subprocess.run(arguments, check=False).returncode == wanted, command
        return
    monkeypatch.setattr(sys, "argv", arguments + few.get(arguments[1], []))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == wanted, command


def test_debug_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    bundled = MODELS.get("ccnet-digits").checkpoint
    assert bundled
    shutil.copy(bundled, tmp_path / "runs/weights.safetensors")
    few = {"bisect": ["--samples", "1"]}
    for language, content, shown in steps("debug-parity.md"):
        capsys.readouterr()
        if language == "python":
            exec(content, {})
        for command in content.splitlines() if language == "bash" else ():
            run_command(command, few, monkeypatch)
        require_shown(shown, capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "runs/found").iterdir()} >= {"divergence.svg", "minimal.onnx"}


def test_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Device commands run with ONNX Runtime, on a bundle whose plugin nodes have the bodies that it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path)
    few = {"export": ["--samples", "4"]}
    engine = ["--engine", "onnxruntime"]
    for language, content, shown in steps("jetson.md"):
        capsys.readouterr()
        if language == "bash":
            for command in content.replace("jetpack-6.2-orin-nx-16", "jetpack-7.2-orin-nx-16").splitlines():
                run_command(command.replace(".stripped", ""), few, monkeypatch)
        else:
            folder = tmp_path / "ccnet"
            if not folder.exists():
                assert device_main(["unpack", "ccnet.tar", "--public-key", "maker.pub", "-o", str(folder)]) == 0
                np.save(tmp_path / "IMAGES.npy", next(MODELS.get("ccnet-digits").samples(1)).images[0])  # type: ignore[misc]
            for command in content.splitlines():
                assert command.startswith(ON_THE_DEVICE)
                name, *rest = shlex.split(
                    command.replace("IMAGES", "IMAGES.npy").replace("--seconds 30", "--seconds 1")
                )[3:]
                extra = engine if name in ("build", "verify", "bench", "run") else []
                status = device_main([name, *rest, *extra, "--bundle", str(folder)])
                assert status == (1 if name == "doctor" else 0), command  # no board here
        require_shown(shown, capsys.readouterr().out)
    assert (tmp_path / "masks").is_dir()
