"""The CUDA driver through ctypes, as the C++ host uses it: load a module, find the kernel, launch it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

SHARED_WITHOUT_OPT_IN = 48 * 1024
JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6

_KINDS: dict[str, Any] = {"i32": ctypes.c_int32}


class DriverError(RuntimeError):
    """A call of the driver failed; the message names the call and the driver's reason."""


class Driver(Protocol):
    """What loads and launches kernels."""

    def load(self, code: bytes) -> int:
        """Load a cubin or a PTX text and return its module."""
        ...

    def function(self, module: int, entry: str, shared: int) -> int:
        """Return a kernel of a module, with the right to that much dynamic shared memory."""
        ...

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[tuple[str, int]],
    ) -> None:
        """Launch a kernel; every argument is a Triton type ("*fp16", "i32") and an address or a number."""
        ...


class Arguments:
    """The parameters of a launch in the form that cuLaunchKernel takes.

    Args:
        arguments: Triton type and value of every parameter.

    Attributes:
        values: one C value for each parameter, 8 bytes for a pointer and 4 for an i32.
        pointers: the array of their addresses.
    """

    def __init__(self, arguments: Sequence[tuple[str, int]]) -> None:
        self.values = [(ctypes.c_uint64 if kind.startswith("*") else _KINDS[kind])(value) for kind, value in arguments]
        self.pointers = (ctypes.c_void_p * len(self.values))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in self.values)
        )


class CudaDriver:
    """The driver's library with the context that torch made current on this thread.

    Args:
        library: name or path of the library.

    Raises:
        DriverError: no driver, or no context.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"{library} cannot be loaded: {error}") from error
        pointer, integer, unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
        signatures: dict[str, list[Any]] = {
            "cuInit": [unsigned],
            "cuGetErrorString": [integer, ctypes.POINTER(ctypes.c_char_p)],
            "cuCtxGetCurrent": [ctypes.POINTER(pointer)],
            "cuModuleLoadDataEx": [
                ctypes.POINTER(pointer), ctypes.c_char_p, unsigned, ctypes.POINTER(integer), ctypes.POINTER(pointer),
            ],
            "cuModuleGetFunction": [ctypes.POINTER(pointer), pointer, ctypes.c_char_p],
            "cuFuncSetAttribute": [pointer, integer, integer],
            "cuLaunchKernel": [pointer, *[unsigned] * 7, pointer, ctypes.POINTER(pointer), ctypes.POINTER(pointer)],
        }  # fmt: skip
        for name, types in signatures.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, integer
        self._call("cuInit", 0)
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            raise DriverError("this thread has no CUDA context")

    def load(self, code: bytes) -> int:
        """See `Driver`."""
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(4096)
        options = (ctypes.c_int * 2)(JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log) - 1)
        try:
            # A cubin holds zero bytes; c_char_p passes the address of all of them. PTX ends at its zero byte.
            self._call("cuModuleLoadDataEx", ctypes.byref(module), code, 2, options, values)
        except DriverError as error:
            raise DriverError(f"{error} {log.value.decode(errors='replace')}") from None
        assert module.value is not None
        return module.value

    def function(self, module: int, entry: str, shared: int) -> int:
        """See `Driver`."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        if shared > SHARED_WITHOUT_OPT_IN:
            self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        assert function.value is not None
        return function.value

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[tuple[str, int]],
    ) -> None:
        """See `Driver`."""
        packed = Arguments(arguments)
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, packed.pointers, None)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise DriverError(f"{name} answered {result}: {(text.value or b'unknown').decode()}")


class RecordingDriver:
    """Stands in for the driver in a dry run: records launches, with every parameter read back from its bytes.

    Attributes:
        launches: entry, grid, threads, shared bytes and the values of the parameters of every launch.
    """

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self._code: list[bytes] = []
        self._functions: list[str] = []

    def load(self, code: bytes) -> int:
        """See `Driver`."""
        if not code:
            raise DriverError("no code")
        self._code.append(code)
        return len(self._code)

    def function(self, module: int, entry: str, shared: int) -> int:
        """See `Driver`; refuses an entry that the module does not hold."""
        if entry.encode() not in self._code[module - 1]:
            raise DriverError(f"the module holds no kernel {entry}")
        self._functions.append(entry)
        return len(self._functions)

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[tuple[str, int]],
    ) -> None:
        """See `Driver`."""
        packed = Arguments(arguments)
        read = [
            type(value).from_address(address).value
            for value, address in zip(packed.values, packed.pointers, strict=True)
        ]
        self.launches.append(
            {
                "entry": self._functions[function - 1],
                "grid": list(grid),
                "threads": threads,
                "shared": shared,
                "values": read,
            }
        )
