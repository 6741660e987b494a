"""`TARGETS` and `SMS`: the table of this package together with the user's own file."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeattn.foundation.tables import user_file
from edgeattn.targets.catalogue import Catalogue
from edgeattn.targets.combination import load
from edgeattn.targets.spec import Sm, Target

BUILT_IN = Path(__file__).parent / "targets.toml"
"""The table of this package."""

VARIABLE = "EDGEATTN_TARGETS"
"""Environment variable that names the user's own file; empty for none."""

DEFAULT_FILE = Path("~/.config/edgeattn/targets.toml")
"""The user's own file where the variable is not set."""


def catalogue() -> Catalogue:
    """Return everything that the table of this package and the user's own file declare.

    Raises:
        UserError: the user's file cannot be read or used.
    """
    return _load(user_file(VARIABLE, DEFAULT_FILE))


@functools.cache
def _load(own: Path | None) -> Catalogue:
    return load([BUILT_IN, own] if own else [BUILT_IN])


class _Targets:
    """The targets by name, read from their files when first asked for."""

    def get(self, name: str) -> Target:
        """Return the target of a name or alias; the name of a software stack will do where it runs on one family.

        Raises:
            UserError: there is none, it is not supported, several fit, or the user's file is not usable.
        """
        return catalogue().get(name)

    def __iter__(self) -> Iterator[Target]:
        return iter(catalogue().targets)

    def __len__(self) -> int:
        return len(catalogue().targets)

    def __contains__(self, name: object) -> bool:
        return name in catalogue().targets or name in catalogue().aliases


class _Sms(Mapping[int, Sm]):
    """The CUDA architectures by number, read from their files when first asked for."""

    def __getitem__(self, number: int) -> Sm:
        return catalogue().sms[number]

    def __iter__(self) -> Iterator[int]:
        return iter(catalogue().sms)

    def __len__(self) -> int:
        return len(catalogue().sms)


TARGETS = _Targets()
SMS: Mapping[int, Sm] = _Sms()
