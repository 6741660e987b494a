"""`Catalogue`: everything that targets files declare, and the look-up of targets by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeattn.foundation import Registry, UserError
from edgeattn.targets.spec import Hardware, Sm, Software, Target, Unsupported


@dataclass(frozen=True)
class Catalogue:
    """What targets files declare.

    Attributes:
        sms: CUDA architectures by number.
        software: software stacks, in the order of the files.
        hardware: modules and families, in the order of the files.
        targets: every combination of software and hardware that exists, and the targets declared whole.
        own: the targets declared whole, which are the user's own.
        aliases: further names of targets.
        unsupported: software that nothing is exported for.
    """

    sms: Mapping[int, Sm]
    software: Sequence[Software]
    hardware: Sequence[Hardware]
    targets: Registry[Target]
    own: Sequence[Target]
    aliases: Mapping[str, str]
    unsupported: Sequence[Unsupported]

    def get(self, name: str) -> Target:
        """Return the target of a name, an alias, or of a software stack that runs on one family only.

        Raises:
            UserError: the target is not supported, the name fits several targets, or there is no such target.
        """
        name = self.aliases.get(name, name)
        if name in self.targets:
            return self.targets.get(name)
        for entry in self.unsupported:
            if any(_continues(name, beginning) for beginning in entry.names):
                raise UserError(f"the target {name!r} is not supported: {entry.reason} {entry.instead}")
        fitting = [target for target in self.targets if _continues(target.name, name)]
        if fitting:
            families = {hardware.name for hardware in self.hardware if hardware.family is None}
            near = [target.name for target in fitting if target.hardware in families] or [t.name for t in fitting]
            raise UserError(
                f"the target {name!r} is ambiguous: it could be {', '.join(near[:8])}{', ...' if near[8:] else ''}. "
                "Name one of them, or a module of theirs; `edgeattn list targets` shows all."
            )
        known = {_sorted_words(known): known for known in [*self.aliases, *(target.name for target in self.targets)]}
        near = [known[words] for words in difflib.get_close_matches(_sorted_words(name), known, n=3)]
        raise UserError(
            f"unknown target {name!r}. "
            + (f"Did you mean {' or '.join(near)}? " if near else "A name is SOFTWARE-HARDWARE: jetpack-6.2-orin. ")
            + "`edgeattn list targets` shows all."
        )


def _sorted_words(name: str) -> str:
    """Return the words of a name in an order that does not depend on how they were put together."""
    return " ".join(sorted(name.split("-")))


def _continues(name: str, beginning: str) -> bool:
    """Return whether a name is `beginning`, or continues it after a dot or dash."""
    return name == beginning or name.startswith((f"{beginning}.", f"{beginning}-"))
