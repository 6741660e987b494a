"""Networks of mmsegmentation against what the public code computed from a state with the published names.

`tests/data/mmseg_networks.npz` holds the logits of mmsegmentation 1.2.2 (with mmcv-lite 2.1.0; CrissCrossAttention from
mmcv a8073c7, PSAMask from its C++ in Python), run once on a CPU in FP64 in evaluation mode: the configurations
`*_r50-d8_4xb2-80k_cityscapes-512x1024.py` with base and stem channels 8, 3 classes, the other widths divided by 8, and
the options below. Arrays are called network.HEIGHTxWIDTH.index; the auxiliary head's come last.
"""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeattn.models import MODELS
from edgeattn.models.checkpoint import COUNTER, load_checkpoint

RECORDED = Path(__file__).parents[1] / "data" / "mmseg_networks.npz"
SIZES = ((65, 97), (58, 91))  # features of 9x13, which PSANet resizes with aligned corners, and of 8x12
OPTIONS: dict[str, dict[str, object]] = {
    "ccnet": {},
    "nonlocal": {},
    "gcnet": {},
    "danet": {},
    "emanet": {"num_bases": 6},
    "ann": {},
    "apcnet": {},
    "psanet": {"mask_size": (7, 9)},
}
FP64_RELATIVE_L2 = 1e-10


def parameter(key: str, shape: torch.Size) -> torch.Tensor:
    """Return the value that a published parameter had when the public code ran."""
    key = key.replace("context.stages.0.query_project", "context.stages.0.key_project")  # APNB has one for both
    draw = np.random.RandomState(zlib.crc32(key.encode())).random_sample(tuple(shape))  # a frozen stream
    if not key.endswith("running_var"):
        draw = (2 * draw - 1) * np.sqrt(3 / (np.prod(shape[1:]) if len(shape) > 1 else 3))
    else:
        draw = 0.5 + draw
    return torch.from_numpy(np.asarray(draw).astype(np.float32))


def image(height: int, width: int) -> torch.Tensor:
    """Return the image of this size that the public code was given."""
    draw = np.random.RandomState(height * width).random_sample((1, 3, height, width))
    return torch.from_numpy((4 * draw - 2).astype(np.float32)).double()


@pytest.mark.parametrize("name", OPTIONS)
def test_public_implementation_computes_the_same(name: str) -> None:
    spec = MODELS.get(f"{name}-r50-mmseg")
    arguments = {**spec.arguments, "num_classes": 3, "base_width": 8, "options": OPTIONS[name]}
    network = spec.network(**arguments).eval()
    (layout,) = spec.layouts
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    published = layout.published_shapes()
    assert published
    state = {key: parameter(key, shapes[layout.renamed(key)]) for key in published if not key.endswith(COUNTER)}
    load_checkpoint(network, state, key_map=layout.key_map)
    module, attribute = spec.original.split(":")
    original = getattr(importlib.import_module(module), attribute)(**arguments).eval()
    original.load_state_dict(network.state_dict(), strict=True)
    with np.load(RECORDED) as recorded:
        for size in SIZES:
            for form in (network, original):
                with torch.no_grad():
                    outputs = form.double()(image(*size))
                assert len(outputs) == len(spec.outputs)
                for index, actual in enumerate(outputs):
                    expected = torch.from_numpy(recorded[f"{name}.{size[0]}x{size[1]}.{index}"])
                    assert actual.shape == expected.shape
                    assert float((actual - expected).norm() / expected.norm()) <= FP64_RELATIVE_L2, (size, index)
