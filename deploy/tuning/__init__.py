"""Precisions module by module: what each costs in accuracy, and the cheapest mix within a budget."""

from edgeattn.deploy.tuning.budget import MEASURES, Budget, parse_budget
from edgeattn.deploy.tuning.records import Sensitivity
from edgeattn.deploy.tuning.sensitivity import SensitivityRequest, analyse
from edgeattn.deploy.tuning.tune import TuneRequest, Tuning, tune

__all__ = [
    "MEASURES",
    "Budget",
    "Sensitivity",
    "SensitivityRequest",
    "TuneRequest",
    "Tuning",
    "analyse",
    "parse_budget",
    "tune",
]
