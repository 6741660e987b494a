"""Generates the kernel table of the C++ host (`cpp/kernel_table.h`) from the declarations and a kernel library."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from edgeattn.foundation import UserError, sha256_of, write_text
from edgeattn.plugins_trt.expressions import FUNCTIONS, tokens
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import (
    DOMAIN,
    ELEMENT_BYTES,
    LAYOUTS,
    PLUGIN_VERSION,
    Launch,
    PluginSpec,
    TensorSpec,
    Workspace,
)

TABLE = "kernel_table.cpp"
CODE = "kernels.S"
SOURCES = Path(__file__).parent / "cpp"
"""The C++ host, with its CMakeLists.txt."""

_HOST = 1
"""Part of the table's hash, which engines carry; goes up when the host lays out workspaces in another way."""

_ELEMENTS = dict(zip(ELEMENT_BYTES, ("kFloat16", "kBfloat16", "kFloat32"), strict=True))
_LAYOUTS = dict(zip(LAYOUTS, ("kLinear", "kChannelsLast"), strict=True))
_STEPS = {
    "+": "kAdd",
    "-": "kSubtract",
    "*": "kMultiply",
    "//": "kFloorDivide",
    "cdiv": "kCeilDivide",
    "max": "kMaximum",
    "min": "kMinimum",
}
_FOLD: Mapping[str, Callable[..., int]] = {
    **FUNCTIONS,
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "//": lambda left, right: left // right,
}
_PTX_TARGET = re.compile(r"^\.target\s+sm_(\d+)([a-z]?)", re.MULTILINE)
_REBUILD = "Build it again with `edgeattn plugins build`."

_Group = tuple[str, str, tuple[tuple[str, int], ...], int]
"""What the launches of one row share: data type, layout, static sizes and architecture."""


def write_table(library: KernelLibrary) -> None:
    """Write `kernel_table.cpp` and `kernels.S` into the folder of a kernel library, for `cmake` to compile.

    Operations without launches are left out, and so are those that the library holds nothing of. The same library
    always gives the same text.

    Args:
        library: the compiled kernels.

    Raises:
        UserError: the library holds nothing, an operation lacks a launch, or kernels come from other declarations.
    """
    kernels: dict[str, dict[_Group, dict[str, CompiledKernel]]] = defaultdict(lambda: defaultdict(dict))
    for kernel in library.kernels:
        group = (kernel.element, kernel.layout, tuple(sorted(kernel.static.items())), kernel.sm)
        kernels[kernel.operation][group][kernel.launch] = kernel
    runnable = [spec for spec in PLUGINS if spec.launches]
    if unknown := kernels.keys() - {spec.name for spec in runnable}:
        raise UserError(
            f"the kernel library {library.folder} has kernels of {', '.join(sorted(unknown))}, which this release "
            f"does not declare. {_REBUILD}"
        )
    if not kernels:
        raise UserError(f"the kernel library {library.folder} holds no kernels. {_REBUILD}")
    writer = _Writer(library.folder)
    built = {spec.op_type for spec in runnable if spec.name in kernels}
    operations = writer.span(
        "Operation",
        [
            writer.operation([spec for spec in runnable if spec.op_type == op_type], kernels)
            for op_type in dict.fromkeys(spec.op_type for spec in runnable)
            if op_type in built
        ],
    )
    content = "\n".join([str(_HOST), DOMAIN, PLUGIN_VERSION, *writer.declarations, *writer.code])
    digest = hashlib.sha256(content.encode()).hexdigest()
    write_text(library.folder / CODE, writer.assembly())
    write_text(
        library.folder / TABLE,
        writer.source(f'Table const kTable{{"{digest}", "{DOMAIN}", "{PLUGIN_VERSION}", {operations}}};'),
    )


class _Writer:
    """Collects the constant arrays of the table, each once, and the files that it embeds.

    Attributes:
        declarations: C++ definitions of the arrays, in order.
        code: name of a file for every content, by SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.declarations: list[str] = []
        self.code: dict[str, str] = {}
        self._spans: dict[tuple[str, tuple[str, ...]], str] = {}

    def span(self, kind: str, items: Iterable[str]) -> str:
        """Return a `Span<kind>` over a constant array of C++ initialisers."""
        content = tuple(items)
        if not content:
            return "{nullptr, 0}"
        if (kind, content) not in self._spans:
            name = f"array{len(self._spans)}"
            self.declarations.append(f"constexpr {kind} {name}[] = {{{', '.join(content)}}};")
            self._spans[kind, content] = f"{{{name}, {len(content)}}}"
        return self._spans[kind, content]

    def embedded(self, name: str) -> str:
        """Return the symbol of the content of a file in the library."""
        digest = sha256_of(self.folder / name)
        self.code.setdefault(digest, name)
        return _symbol(digest)

    def source(self, table: str) -> str:
        """Return the text of the C++ file."""
        symbols = [f'extern "C" EDGEATTN_HIDDEN unsigned char const {_symbol(digest)}[];' for digest in self.code]
        return "\n".join(
            [
                "// Generated by edgeattn from its plugin declarations and a kernel library; not for editing.",
                '#include "kernel_table.h"',
                "",
                '#define EDGEATTN_HIDDEN __attribute__((visibility("hidden")))',
                "",
                *symbols,
                "",
                "namespace edgeattn",
                "{",
                "namespace",
                "{",
                *self.declarations,
                "} // namespace",
                "",
                table,
                "",
                "} // namespace edgeattn",
                "",
            ]
        )

    def assembly(self) -> str:
        """Return the text of the assembler file; the zero after each content ends a PTX text."""
        lines = [
            "/* Generated by edgeattn from a kernel library; not for editing. The library's folder has to be on the "
            "include path. */",
            '.section .rodata, "a", %progbits',
        ]
        for digest, name in self.code.items():
            symbol = _symbol(digest)
            lines += [
                ".balign 64",
                f".globl {symbol}",
                f".hidden {symbol}",
                f".type {symbol}, %object",
                f"{symbol}:",
                f'.incbin "{name}"',
                ".byte 0",
                f".size {symbol}, . - {symbol}",
            ]
        return "\n".join([*lines, '.section .note.GNU-stack, "", %progbits', ""])

    def operation(
        self, specs: Sequence[PluginSpec], kernels: Mapping[str, Mapping[_Group, Mapping[str, CompiledKernel]]]
    ) -> str:
        """Return an `Operation` from the declarations that share an operator name."""
        counts = [len(spec.inputs) for spec in specs]
        if len(set(counts)) != len(counts) or len({len(spec.outputs) for spec in specs}) != 1:
            raise ValueError(f"declarations of {specs[0].op_type} must differ in inputs and agree in outputs")
        signatures = [self._signature(spec, kernels.get(spec.name, {})) for spec in specs]
        return f'{{"{specs[0].op_type}", {self.span("Signature", signatures)}}}'

    def _signature(self, spec: PluginSpec, rows: Mapping[_Group, Mapping[str, CompiledKernel]]) -> str:
        symbols = list(dict.fromkeys(symbol for tensor in spec.inputs for symbol in tensor.shape if symbol != "1"))
        numbers = {symbol: number for number, symbol in enumerate(symbols)}

        def tensors(items: Sequence[TensorSpec]) -> str:
            return self.span("Tensor", [self._tensor(tensor, numbers) for tensor in items])

        elements = tuple(ELEMENT_BYTES)
        groups = sorted(rows, key=lambda group: (elements.index(group[0]), LAYOUTS.index(group[1]), *group[2:]))
        fields = (
            f'"{spec.name}"',
            self.span("char const*", _quoted(symbols)),
            self.span("int32_t", [str(numbers[symbol]) for symbol in spec.static]),
            tensors(spec.inputs),
            tensors(spec.outputs),
            self.span("char const*", _quoted(buffer.name for buffer in spec.workspaces)),
            self.span("Launch", [self._launch(spec, launch) for launch in spec.launches]),
            self.span("Row", [self._row(spec, group, rows[group], numbers) for group in groups]),
        )
        return f"{{{', '.join(fields)}}}"

    def _tensor(self, tensor: TensorSpec, numbers: Mapping[str, int]) -> str:
        axes = ["kAxisOfOne" if symbol == "1" else str(numbers[symbol]) for symbol in tensor.shape]
        return f'{{"{tensor.name}", {self.span("int32_t", axes)}}}'

    def _launch(self, spec: PluginSpec, launch: Launch) -> str:
        names = {
            "kInput": [tensor.name for tensor in spec.inputs],
            "kOutput": [tensor.name for tensor in spec.outputs],
            "kWorkspace": [buffer.name for buffer in spec.workspaces],
        }
        places = {
            name: f"{{Source::{source}, {index}}}" for source in names for index, name in enumerate(names[source])
        }
        arguments = [
            *(places[name] for name in launch.reads),
            *(f"{{Source::kScalar, {index}}}" for index in range(len(launch.scalars))),
            *(places[name] for name in launch.writes),
        ]
        return f'{{"{launch.name}", {self.span("Argument", arguments)}}}'

    def _row(
        self, spec: PluginSpec, group: _Group, kernels: Mapping[str, CompiledKernel], numbers: Mapping[str, int]
    ) -> str:
        element, layout, static, sm = group
        row = f"{spec.name} ({element}, {layout}, {', '.join(f'{name}={size}' for name, size in static)}, sm_{sm})"
        if missing := [launch.name for launch in spec.launches if launch.name not in kernels]:
            raise UserError(f"the kernel library {self.folder} lacks the launch {missing[0]} of {row}. {_REBUILD}")
        sizes = dict(static)
        ordered = [kernels[launch.name] for launch in spec.launches]
        pairs = list(zip(ordered, spec.launches, strict=True))
        try:
            if sizes.keys() != {*spec.static} or not all(_is_of(kernel, launch) for kernel, launch in pairs):
                raise KeyError(row)
            buffers = [self._buffer(buffer, element, ordered[0].scope, numbers) for buffer in spec.workspaces]
            code = [self._kernel(kernel, launch, numbers) for kernel, launch in pairs]
        except KeyError as error:  # a name that an expression reads is neither a size nor known to the kernel
            raise UserError(
                f"the kernels of {row} in {self.folder} were compiled from another declaration than this release has. "
                f"{_REBUILD}"
            ) from error
        fields = (
            f"Element::{_ELEMENTS[element]}",
            f"Layout::{_LAYOUTS[layout]}",
            str(sm),
            str(max(kernel.ptx_isa for kernel in ordered)),
            str(all(self._is_portable(kernel) for kernel in ordered)).lower(),
            self.span("int64_t", [str(sizes[name]) for name in spec.static]),
            self.span("Expression", buffers),
            self.span("Kernel", code),
        )
        return f"{{{', '.join(fields)}}}"

    def _buffer(self, buffer: Workspace, element: str, scope: Mapping[str, int], numbers: Mapping[str, int]) -> str:
        item = ELEMENT_BYTES[element if buffer.element == "data" else buffer.element]
        return self._expression(" * ".join([*(f"({extent})" for extent in buffer.shape), str(item)]), scope, numbers)

    def _kernel(self, kernel: CompiledKernel, launch: Launch, numbers: Mapping[str, int]) -> str:
        grid = [self._expression(text, kernel.scope, numbers) for text in launch.grid]
        scalars = [self._expression(text, kernel.scope, numbers) for text in launch.scalars]
        fields = (
            f'"{kernel.entry}"',
            f"{{{', '.join(grid)}}}",
            self.span("Expression", scalars),
            str(32 * kernel.warps),
            str(kernel.shared),
            self.embedded(kernel.cubin),
            self.embedded(kernel.ptx),
        )
        return f"{{{', '.join(fields)}}}"

    def _expression(self, text: str, scope: Mapping[str, int], numbers: Mapping[str, int]) -> str:
        return self.span("Token", _steps(text, scope, numbers))

    def _is_portable(self, kernel: CompiledKernel) -> bool:
        """Whether newer architectures may run a kernel's PTX: not when its target has a suffix, as sm_90a does."""
        text = (self.folder / kernel.ptx).read_text(encoding="utf-8", errors="replace")
        target = _PTX_TARGET.search(text)
        if target is None or int(target[1]) != kernel.sm:
            raise UserError(f"{self.folder / kernel.ptx} is not PTX for sm_{kernel.sm}. {_REBUILD}")
        return not target[2]


def _is_of(kernel: CompiledKernel, launch: Launch) -> bool:
    """Whether a kernel takes the parameters that its launch passes."""
    expected = (*launch.reads, *(f"scalar_{index}" for index in range(len(launch.scalars))), *launch.writes)
    return kernel.kernel == launch.kernel and tuple(name for name, _ in kernel.parameters) == expected


def _steps(text: str, scope: Mapping[str, int], numbers: Mapping[str, int]) -> list[str]:
    """Return an expression as C++ tokens, with compile-time names replaced by numbers and constants folded."""
    stack: list[int | list[str]] = []
    for token in tokens(text):
        name = str(token.value)
        if token.kind == "number":
            stack.append(int(token.value))
        elif token.kind == "name":
            stack.append(scope[name] if name in scope else [f"{{Step::kSize, {numbers[name]}}}"])
        else:
            arguments = [stack.pop() for _ in range(1 if name == "pow2" else 2)][::-1]
            values = [argument for argument in arguments if isinstance(argument, int)]
            if len(values) == len(arguments):
                stack.append(_FOLD[name](*values))
            else:
                stack.append([*(step for argument in arguments for step in _pushed(argument)), _operation(name, text)])
    return _pushed(stack.pop())


def _pushed(value: int | list[str]) -> list[str]:
    return [f"{{Step::kNumber, {value}}}"] if isinstance(value, int) else value


def _operation(name: str, text: str) -> str:
    if name not in _STEPS:
        raise ValueError(f"the expression {text!r} applies {name} to a size that is not known before run time")
    return f"{{Step::{_STEPS[name]}, 0}}"


def _quoted(names: Iterable[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def _symbol(digest: str) -> str:
    return f"edgeattn_code_{digest[:16]}"
