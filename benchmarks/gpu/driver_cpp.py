"""The C functions of the C++ library through ctypes (`plugins_trt/cpp/c_api.h`). Imports nothing but ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shapes = Sequence[Sequence[int]]

_TENSORS: list[Any] = [
    *[ctypes.c_char_p] * 3,
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_int32),
    ctypes.POINTER(ctypes.c_int64),
]


class CppLibraryError(RuntimeError):
    """The library cannot be loaded, or one of its functions failed; the message gives the library's reason."""


@dataclass(frozen=True)
class Content:
    """One set of kernels in the library.

    Attributes:
        op_type: the operation.
        input_count: its number of inputs.
        element: data type.
        layout: layout of 4-D tensors.
        static: sizes that are compiled in.
        sm: CUDA architecture.
    """

    op_type: str
    input_count: int
    element: str
    layout: str
    static: dict[str, int]
    sm: int


class CppLibrary:
    """A library with the C functions: libedgeattn_plugins.so or libedgeattn_kernels.so.

    Args:
        path: the shared object.

    Raises:
        CppLibraryError: it cannot be loaded or lacks a function.
    """

    def __init__(self, path: Path) -> None:
        pointers = ctypes.POINTER(ctypes.c_void_p)
        signatures: dict[str, tuple[list[Any], Any]] = {
            "edgeattn_workspace_bytes": ([*_TENSORS, ctypes.POINTER(ctypes.c_size_t)], ctypes.c_int32),
            "edgeattn_launch": (
                [*_TENSORS, pointers, pointers, ctypes.c_void_p, ctypes.c_void_p],
                ctypes.c_int32,
            ),
            "edgeattn_last_error": ([], ctypes.c_char_p),
            "edgeattn_last_remark": ([], ctypes.c_char_p),
            "edgeattn_contents": ([], ctypes.c_char_p),
        }
        try:
            self._library = ctypes.CDLL(str(path.resolve()))
            for name, (types, result) in signatures.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = types, result
        except (OSError, AttributeError) as error:
            raise CppLibraryError(f"{path} cannot be used: {error}") from error

    def contents(self) -> list[Content]:
        """Return what the library has kernels for."""
        text = self._library.edgeattn_contents()
        if text is None:
            raise self._failure()
        contents = []
        for line in text.decode().splitlines():
            op_type, count, element, layout, *sizes, sm = line.split(", ")
            static = {name: int(size) for name, _, size in (pair.partition("=") for pair in sizes)}
            contents.append(Content(op_type, int(count), element, layout, static, int(sm.removeprefix("sm_"))))
        return contents

    def workspace_bytes(self, op_type: str, element: str, layout: str, shapes: Shapes) -> int:
        """Return the size of the workspace for inputs of these shapes.

        Raises:
            CppLibraryError: see `edgeattn_last_error`; so do the other functions.
        """
        size = ctypes.c_size_t()
        if self._library.edgeattn_workspace_bytes(*_tensors(op_type, element, layout, shapes), ctypes.byref(size)):
            raise self._failure()
        return size.value

    def launch(
        self,
        op_type: str,
        element: str,
        layout: str,
        shapes: Shapes,
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> str:
        """Launch an operation.

        Args:
            op_type: the operation.
            element: data type.
            layout: layout of 4-D tensors.
            shapes: sizes of every input, in the order of the declaration.
            inputs: addresses.
            outputs: addresses.
            workspace: address; 0 where none is needed.
            stream: CUDA stream.

        Returns:
            "" when machine code for this device ran, else what ran.
        """
        tensors = _tensors(op_type, element, layout, shapes)
        places = ((ctypes.c_void_p * len(inputs))(*inputs), (ctypes.c_void_p * len(outputs))(*outputs))
        if self._library.edgeattn_launch(*tensors, *places, workspace, stream):
            raise self._failure()
        return str(self._library.edgeattn_last_remark().decode())

    def _failure(self) -> CppLibraryError:
        return CppLibraryError(self._library.edgeattn_last_error().decode())


def _tensors(op_type: str, element: str, layout: str, shapes: Shapes) -> tuple[Any, ...]:
    dims = [size for shape in shapes for size in shape]
    ranks = (ctypes.c_int32 * len(shapes))(*map(len, shapes))
    return op_type.encode(), element.encode(), layout.encode(), len(shapes), ranks, (ctypes.c_int64 * len(dims))(*dims)
