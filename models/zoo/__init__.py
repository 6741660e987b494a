"""Declarations of the networks; importing this package fills the registry."""

from edgeattn.models.zoo import ccnet, cosnet  # noqa: F401
