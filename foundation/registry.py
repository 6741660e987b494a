"""Named declarations, looked up with helpful errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from edgeattn.foundation.errors import UserError


class Named(Protocol):
    """Anything with a `name`."""

    @property
    def name(self) -> str:
        """Unique name within its registry."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """An ordered collection of declarations of one kind, such as the known blocks.

    Args:
        kind: what the members are, in the singular, for messages ("block", "model", "target").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, T] = {}

    def add(self, member: T) -> T:
        """Register a declaration under its name and return it; a second one of the same name is a defect."""
        if member.name in self._members:
            raise ValueError(f"{self.kind} {member.name!r} is registered twice")
        self._members[member.name] = member
        return member

    def get(self, name: str) -> T:
        """Return the declaration called `name`.

        Raises:
            UserError: there is none; the message lists the nearest names.
        """
        if name in self._members:
            return self._members[name]
        near = difflib.get_close_matches(name, self._members, n=3, cutoff=0.4) or list(self._members)
        raise UserError(
            f"unknown {self.kind} {name!r}. Did you mean {' or '.join(near)}? `edgeattn list {self.kind}s` shows all."
        )

    def __iter__(self) -> Iterator[T]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members
