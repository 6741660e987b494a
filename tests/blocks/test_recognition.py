"""What recognition builds to know shapes: the same with and without memory, and quickly."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgeattn.blocks.zoo  # noqa: F401
from edgeattn.blocks import recognition
from edgeattn.blocks.recognition import layouts, shapes_when_built


def test_shapes_are_those_of_the_module_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in layouts()[::9]:
        arguments = layout.variant.arguments
        expected = recognition.shapes_of(layout.block.build(**arguments).state_dict())
        for declared in (True, False):
            monkeypatch.setattr(recognition, "_BUILT", {})
            assert shapes_when_built(layout.block, arguments, declared=declared) == expected


def test_looking_for_blocks_does_not_import_torchs_compiler() -> None:
    # That import takes longer than everything else.
    program = (
        "import sys, torch\n"
        "import edgeattn.blocks.zoo\n"
        "from edgeattn.models.inspection import find_blocks\n"
        "state = {'a.query_conv.weight': torch.empty(8, 64, 1, 1), 'a.norm.weight': torch.empty(8)}\n"
        "assert find_blocks(state) == ()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
