"""Objects that pass for TensorRT's, made from the classes of real bindings; for code run by `Bindings.evaluate`.

`fake(cls, **answers)` has the attributes of a bindings class and no others, and takes only calls that fit a signature
in the class's docstrings: names, number, and the types that TensorRT declares. What it returns and holds is given as
`answers`: values for properties, functions for methods. Nothing computes.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tensorrt as trt

REAL = SimpleNamespace(**vars(trt))
"""The bindings as they are, whatever a test puts in their place."""


def signatures(function: Any, name: str) -> list[inspect.Signature]:
    """Return the signatures in the docstring that pybind11 writes; annotations are type names."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.fullmatch(rf"(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> .*)?", line.strip())
        if match and "*args" not in match[1]:
            text = re.sub(r"<[^<>]*>", "None", match[1])
            arguments = ast.parse(f"def f({text}): pass").body[0].args  # type: ignore[attr-defined]
            first_default = len(arguments.args) - len(arguments.defaults)
            found.append(
                inspect.Signature(
                    [
                        inspect.Parameter(
                            argument.arg,
                            inspect.Parameter.POSITIONAL_OR_KEYWORD,
                            default=None if index >= first_default else inspect.Parameter.empty,
                            annotation=(
                                ast.unparse(argument.annotation)
                                if argument.annotation and argument.arg != "self"
                                else ""
                            ),
                        )
                        for index, argument in enumerate(arguments.args)
                    ]
                )
            )
    return found


def check_call(where: str, function: Any, arguments: tuple, keywords: dict) -> None:
    """Raise TypeError when a call fits no signature of a function of the bindings."""
    known = signatures(function, where.rpartition(".")[2])
    assert known, f"{where} has no signature in its docstring"
    for signature in known:
        try:
            bound = signature.bind(*arguments, **keywords)
        except TypeError:
            continue
        if all(_fits(value, signature.parameters[name].annotation) for name, value in bound.arguments.items()):
            return
    raise TypeError(f"{where}{arguments}{keywords} fits none of {known}")


def _fits(value: Any, annotation: str) -> bool:
    match = re.fullmatch(r"tensorrt_bindings\.tensorrt\.(\w+)", annotation)
    if match:
        wanted = getattr(REAL, match[1])
        # pybind11 makes Dims of any sequence of numbers.
        return isinstance(value, wanted) or (wanted is REAL.Dims and isinstance(value, (tuple, list)))
    simple = {"str": str, "bool": bool, "int": int, "typing.SupportsInt": int}.get(annotation)
    return simple is None or isinstance(value, simple)


def fake(cls: type, **answers: Any) -> Any:
    """Return an object that passes for an instance of a bindings class.

    Args:
        cls: the class.
        answers: what methods return (functions), and values of properties; `__getitem__` likewise. Without an answer,
            methods return True and properties are None.
    """
    if unknown := [name for name in answers if not hasattr(cls, name)]:
        raise AttributeError(f"{cls.__name__} has no {unknown}")
    special = {name: answers.pop(name) for name in ("__getitem__",) if name in answers}
    members = {name: (lambda self, *rest, answer=answer: answer(*rest)) for name, answer in special.items()}
    kind = type(f"Fake{cls.__name__}", (_Fake,), {**members, "__class__": property(lambda self: cls)})
    made = kind()
    object.__setattr__(made, "_imitated", cls)
    object.__setattr__(made, "_answers", answers)
    return made


class _Fake:
    """Has what the class has that it imitates, no more."""

    def __getattr__(self, name: str) -> Any:
        cls, answers = self._imitated, self._answers
        member = getattr(cls, name)  # an AttributeError where the version lacks it
        if not callable(member):
            return answers.get(name)
        return _checked(f"{cls.__name__}.{name}", member, answers.get(name))

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self._imitated, name)
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{self._imitated.__name__}.{name} cannot be set")
        self._answers[name] = value


def _checked(where: str, member: Any, answer: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        static = "self" not in signatures(member, where.rpartition(".")[2])[0].parameters
        check_call(where, member, arguments if static else (None, *arguments), keywords)
        return answer(*arguments, **keywords) if answer else True

    return call


def constructor(cls: type, make: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands for a bindings class where it is called: checks the arguments and returns an own object."""

    def construct(*arguments: Any, **keywords: Any) -> Any:
        check_call(f"{cls.__name__}.__init__", cls.__init__, (None, *arguments), keywords)
        return make(*arguments, **keywords)

    return construct
