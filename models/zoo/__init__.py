"""Declarations of the networks; importing this package fills the registry."""

from edgeattn.models.zoo import ccnet, classifiers, cosnet, few_shot, mmseg, recognition, san, segmentation  # noqa: F401
