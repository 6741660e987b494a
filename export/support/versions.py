"""TensorRT versions as pairs of numbers."""

from __future__ import annotations

import re

from edgeattn.foundation import UserError

Version = tuple[int, int]
"""TensorRT version (major, minor)."""

OLDEST: Version = (10, 0)
"""Oldest version that the rules cover."""

UNVERIFIED_SINCE: Version = (11, 2)
"""First version whose parser nobody has read or run; it is taken to be as the one before."""


def parse_version(text: str) -> Version:
    """Return the version that a text such as "10.3" or "10.13.3.9" begins with.

    Raises:
        UserError: the text is no version.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", text.strip())
    if not match:
        raise UserError(f"the TensorRT version {text!r} is not MAJOR.MINOR. Write for example 10.3.")
    return int(match[1]), int(match[2])


def check_covered(version: Version) -> Version:
    """Return a version that the rules cover.

    Raises:
        UserError: it is older than the rules.
    """
    if version < OLDEST:
        raise UserError(
            f"TensorRT {version_text(version)} is not covered: the rules begin with {version_text(OLDEST)}. "
            "Use TensorRT 10.0 or later."
        )
    return version


def version_text(version: Version) -> str:
    """Return a version as it is written."""
    return f"{version[0]}.{version[1]}"


def range_text(since: Version, before: Version | None) -> str:
    """Describe the versions from `since` up to, not including, `before`."""
    if before is None:
        return "every version" if since <= OLDEST else f"{version_text(since)} and later"
    return (
        f"before {version_text(before)}"
        if since <= OLDEST
        else f"{version_text(since)} to before {version_text(before)}"
    )
