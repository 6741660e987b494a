"""What a recorded verdict depends on beside the files: the rules it was reached by."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeattn.export import accumulation, emulation
from edgeattn.foundation import sha256_of
from edgeattn.validation import metrics, parity, qdq_consistency, runners, saturation, tolerance

_RULES = (accumulation, emulation, metrics, parity, qdq_consistency, runners, saturation, tolerance)


def rules_digest() -> str:
    """Return a digest of what computes and judges forms, so that a verdict by other rules is not taken for theirs.

    It is that of the modules' files: a changed comment repeats a comparison, and no change of a rule is overlooked.
    """
    files = sorted(Path(str(module.__file__)) for module in _RULES)
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
