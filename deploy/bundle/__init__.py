"""Bundles: one archive with a model, its plugins, golden samples and the programs that build and check it."""

from edgeattn.deploy.bundle.make import (
    GOLDEN_COUNT,
    NOT_STATED,
    Bundle,
    BundleRequest,
    check_bundle,
    make_bundle,
)

__all__ = ["GOLDEN_COUNT", "NOT_STATED", "Bundle", "BundleRequest", "check_bundle", "make_bundle"]
