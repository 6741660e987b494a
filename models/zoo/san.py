"""SAN10, 15 and 19, pairwise and patchwise."""

from __future__ import annotations

from edgeattn.models.san import SAN
from edgeattn.models.spec import Layout
from edgeattn.models.zoo.declare import ORIGINALS, classification

_LAYERS = {"san10": (2, 1, 2, 4, 1), "san15": (3, 2, 3, 5, 2), "san19": (3, 3, 4, 6, 3)}
_SMALL = {"layers": (0, 1, 0, 0, 0), "kernels": (3, 7, 3, 3, 3), "num_classes": 7, "width": 32}

for _form in ("pairwise", "patchwise"):
    for _name, _layers in _LAYERS.items():
        classification(
            f"{_name}-{_form}",
            f"{_name.upper()}, {_form} self-attention, ImageNet (CVPR 2020)",
            {"form": _form, "layers": _layers},
            network=SAN,
            small={"form": _form, **_SMALL},
            original=f"{ORIGINALS}.san_network:SAN",
            layouts=(Layout(listing=f"{_name}-{_form}"),),
        )
