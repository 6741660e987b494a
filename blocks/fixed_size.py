"""The clear error of a block whose mathematics fixes a size."""

from __future__ import annotations

from edgeattn.foundation import UserError


def require_static(block: str, axis: str, size: object, reason: str) -> None:
    """Refuse a size that is a symbol, as in an export with dynamic axes.

    Args:
        block: what the block is called, for the message.
        axis: the axis, such as "height".
        size: `x.shape[2]` or the like.
        reason: why the axis cannot vary.

    Raises:
        UserError: the size is not a plain integer.
    """
    if not isinstance(size, int):
        raise UserError(f"the {axis} of {block} cannot be dynamic: {reason}. Export it with a fixed {axis}.")
