"""The demonstration: both bundled models, static and dynamic, in every form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeattn.deploy.pipeline import ExportRequest
from edgeattn.models import MODELS


def _demo_request(model: str, dynamic: bool) -> Callable[[int], ExportRequest]:
    height, width = MODELS.get(model).size
    return lambda samples: ExportRequest(
        model=model,
        dynamic=dynamic,
        fp16=True,
        int8=True,
        plugins=True,
        sample_count=samples,
        # One size of the model's own ratio and two odd ones.
        extra_sizes=((height * 3 // 2, width * 3 // 2), (97, 113), (129, 161)) if dynamic else (),
    )


DEMO_REQUESTS: Mapping[str, Callable[[int], ExportRequest]] = {
    f"{model}-{'dynamic' if dynamic else 'static'}": _demo_request(model, dynamic)
    for model in ("ccnet-digits", "cosnet-digits")
    for dynamic in (False, True)
}
"""Runs of the demonstration by name; each takes the number of samples to judge on."""
