"""The table of deployment targets. Every stage that depends on a version asks the target."""

from edgeattn.targets import zoo as _zoo  # noqa: F401  (fills the registry)
from edgeattn.targets.spec import TARGETS, Target

__all__ = ["TARGETS", "Target"]
