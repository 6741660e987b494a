"""Whole networks that carry attention blocks, their declarations and checkpoint readers."""

from edgeattn.models import zoo as _zoo  # noqa: F401  (fills the registry)
from edgeattn.models.spec import ModelSpec, OutputSpec, Preprocessing, Sample
from edgeattn.models.variants import MODELS

__all__ = ["MODELS", "ModelSpec", "OutputSpec", "Preprocessing", "Sample"]
