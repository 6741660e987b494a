"""Integer expressions over named sizes, written once as text and evaluated by every host.

Grids, scalar arguments and workspace sizes are declared as text such as `"cdiv(height, QUERY_BLOCK) * width"`. The same
text is evaluated on Python integers, on the symbolic sizes of TensorRT's Python plugins, and, as postfix tokens, by the
C++ host.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//"}

FUNCTIONS: dict[str, Callable[..., int]] = {
    "cdiv": lambda amount, size: -(-amount // size),
    "max": max,
    "min": min,
    "pow2": lambda amount: 1 << max(0, amount - 1).bit_length(),  # the next power of two
}
"""Functions of expressions on Python integers, all non-negative. `pow2` is for compile-time constants only."""

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "//": lambda left, right: left // right,
}


@dataclass(frozen=True)
class Token:
    """One step of an expression in postfix order.

    Attributes:
        kind: "number", "name", or "operation".
        value: the integer, the name of a size, or the operation: `+ - * //` or a function of `FUNCTIONS`.
    """

    kind: str
    value: int | str


@cache
def tokens(text: str) -> tuple[Token, ...]:
    """Return an expression as postfix tokens.

    Args:
        text: Python syntax restricted to integers, names, `+ - * //` and the functions of `FUNCTIONS`.

    Raises:
        ValueError: anything else in the text; the message quotes it.
    """
    return tuple(_postfix(ast.parse(text, mode="eval").body, text))


def _postfix(node: ast.expr, text: str) -> list[Token]:
    match node:
        case ast.Constant(value=int(value)):
            return [Token("number", value)]
        case ast.Name(id=name):
            return [Token("name", name)]
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            return [*_postfix(left, text), *_postfix(right, text), Token("operation", _OPERATORS[type(operator)])]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            inner = [token for argument in arguments for token in _postfix(argument, text)]
            return [*inner, Token("operation", name)]
        case _:
            raise ValueError(f"the expression {text!r} holds {ast.unparse(node)!r}; it may hold sizes, + - * // and "
                             f"{', '.join(FUNCTIONS)}")  # fmt: skip


def names_in(text: str) -> set[str]:
    """Return the names of the sizes that an expression reads."""
    return {str(token.value) for token in tokens(text) if token.kind == "name"}


def evaluate(text: str, sizes: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] = FUNCTIONS) -> Any:
    """Evaluate an expression.

    Args:
        text: see `tokens`.
        sizes: value of every name: integers, or anything with the arithmetic operators.
        functions: the functions for that kind of value.

    Returns:
        The value, of the kind that `sizes` holds. TensorRT's symbolic sizes take plain integers on the right of an
        operator only, so declarations write sizes first.

    Raises:
        KeyError: a name that `sizes` lacks.
    """
    stack: list[Any] = []
    for token in tokens(text):
        if token.kind == "number":
            stack.append(token.value)
        elif token.kind == "name":
            stack.append(sizes[str(token.value)])
        elif token.value == "pow2":
            stack.append(functions["pow2"](stack.pop()))
        else:
            right, left = stack.pop(), stack.pop()
            operation = _ARITHMETIC.get(str(token.value)) or functions[str(token.value)]
            stack.append(operation(left, right))
    return stack.pop()
