"""The one error type that means "this cannot be done here, and here is what to do"."""

from __future__ import annotations


class DeviceError(ValueError):
    """The bundle, the device or an argument cannot be used; the message says what, and the next step."""
