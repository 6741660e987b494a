"""The table of deployment targets. Every stage that depends on a version asks the target."""

from edgeattn.targets.catalogue import Catalogue
from edgeattn.targets.combination import load
from edgeattn.targets.registry import BUILT_IN, SMS, TARGETS, catalogue
from edgeattn.targets.spec import Hardware, Sm, Software, Target, Unsupported

__all__ = [
    "BUILT_IN",
    "SMS",
    "TARGETS",
    "Catalogue",
    "Hardware",
    "Sm",
    "Software",
    "Target",
    "Unsupported",
    "catalogue",
    "load",
]
