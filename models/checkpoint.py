"""Checkpoints: read without running code in them, load strictly with a report of every key, save reproducibly.

A published checkpoint often has other names than the official code. A key map declares the difference: each entry is a
regular expression and a replacement template (`re.sub` syntax). The first entry that is found in a published key
rewrites the part it matches; a key that no entry matches keeps its name; a key that becomes empty is left out, on
purpose and listed. For example, mmcv's criss-cross attention loads with `{r"gamma\\.scale$": "gamma"}`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

from edgeattn.foundation import UserError, atomic_path
from edgeattn.models.load_report import CheckpointMismatchError, LoadReport, explain, shown

__all__ = [
    "CONTAINERS",
    "WRAPPERS",
    "CheckpointMismatchError",
    "LoadReport",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]

# Where training scripts put the state_dict, beside optimiser, epoch and arguments, which are ignored.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
# What wrappers put before every key: DataParallel and its distributed form, torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
# Counters of batch normalisation. Evaluation does not use them, and torch < 0.4.1 did not save them.
COUNTER = "num_batches_tracked"

_NESTING_LIMIT = 8  # containers inside containers; a hostile file can hold one that contains itself
_RESAVE = (
    "Where you trust the file, load it with the code that wrote it and save the tensors alone: "
    "`safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')`"
)
_AGAIN = "Download or save it again"
_EXPECTED = "Give a .safetensors file, or a .pth or .pt file that torch.save wrote"

# What a file that starts like no checkpoint is instead: pattern of its first bytes, description, next step.
_FOREIGN = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Fetch the content with `git lfs pull`"),
    (rb"\s*<", "is a web page or XML, not a checkpoint; the download probably returned an error page", _AGAIN),
    (rb"(?s).{257}ustar", "is a tar archive; torch.save of 2017 and earlier wrote such files", _RESAVE),
    (rb"[\t\n\r\x20-\x7e]+\Z", "is text, not a checkpoint", _EXPECTED),
)
# What torch.load reports about a file that it refuses: pattern of the message, description, next step.
_REFUSED = (
    (r"GLOBAL ([\w.]+)", "holds the Python object `{}`, and reading such objects can run code", _RESAVE),
    (r"TorchScript", "is a TorchScript program, not a state_dict", _RESAVE),
    (r"", "is truncated or damaged, or is a pickle that torch.save did not write", f"{_AGAIN}. {_EXPECTED}"),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file; code in the file never runs.

    Args:
        path: a safetensors file, or a file of torch.save (read with `weights_only=True`); told apart by content. The
            state_dict may lie in (nested) containers under the keys of `CONTAINERS`; what lies beside it is ignored.

    Returns:
        Tensors on the CPU by published name, in the file's order. A prefix of `WRAPPERS` is removed when all keys have
        it, and only then.

    Raises:
        UserError: the file cannot be read, is no checkpoint, is damaged, holds objects other than tensors, or holds
            more than one state_dict.
    """
    file = Path(path)
    loaded = _read_safetensors(file) if _is_safetensors(file) else _read_torch(file)
    return _unwrapped(_dense_tensors(_innermost(loaded, file), file))


def save_checkpoint(
    model_or_state: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]
) -> Path:
    """Write a safetensors file, completely or not at all; equal input gives equal bytes.

    Args:
        model_or_state: a module, whose state_dict is saved, or named tensors.
        path: the file, with the suffix .safetensors.
        metadata: text by name, kept in the file's header.

    Returns:
        The path.

    Raises:
        UserError: the path has another suffix, is a folder or cannot be written, or metadata is not text.
    """
    file = Path(path)
    if file.suffix != ".safetensors" or file.is_dir():
        raise UserError(f"cannot save a checkpoint as {file}. Give a file name that ends in .safetensors.")
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise UserError(
            f"the metadata of {file} must map text to text, but is {metadata!r}. Convert the values to text."
        )
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    # Clones, because safetensors refuses tensors that share memory, such as tied parameters.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    content = safetensors.torch.save(tensors, metadata)
    # The library writes the metadata in random order; the header is JSON, so that sorting it makes files comparable.
    body = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:body])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    with atomic_path(file) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[body:])
    return file


def load_checkpoint(
    model: nn.Module, state: Mapping[str, Tensor], *, key_map: Mapping[str, str] | None = None
) -> LoadReport:
    """Fill a model from a checkpoint, strictly: all of it or, with an error, nothing.

    Tolerated and listed: other widths of the same kind of number (FP16 to FP32), () against (1,) and absent counters.

    Args:
        model: the model; its parameters keep their type and device.
        state: tensors by published name, from `read_checkpoint`.
        key_map: replacement template by pattern, see the module's documentation.

    Returns:
        The report of every key.

    Raises:
        CheckpointMismatchError: keys are missing, unexpected or mismatched; all are listed, and the model is unchanged.
        UserError: the key map is no regular expression or gives two keys the same name.
    """
    expected = model.state_dict()
    report = LoadReport()
    published = _rename(state, key_map or {}, report)
    fitted = _fit(published, expected, report)
    if not report.fits:
        raise CheckpointMismatchError(explain(type(model).__name__, len(expected), report), report)
    model.load_state_dict(expected | fitted)
    return report


def _is_safetensors(file: Path) -> bool:
    """Tell the format by content, and refuse what is neither safetensors nor of torch.save, with the likely reason."""
    try:
        if file.exists() and not file.is_file():
            _refuse(file, "is a folder or a device, not a file", _EXPECTED)
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {file}: {error.strerror or error}. Check the path.") from error
    if not head:
        _refuse(file, "is empty", _AGAIN)
    for pattern, description, step in _FOREIGN:
        if re.match(pattern, head):
            _refuse(file, description, step)
    if file.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size):
        return True
    if not head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive, or a pickle from before torch 1.6
        _refuse(file, f"is not a checkpoint; it starts with the bytes {head[:8]!r}", _EXPECTED)
    return False


def _read_safetensors(file: Path) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(f"{file} is not a complete safetensors file ({error}). {_AGAIN}.") from error


def _read_torch(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hints to developers, about files that are refused anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile files fail anywhere in the unpickler
        for pattern, description, step in _REFUSED:
            if found := re.search(pattern, str(error)):
                _refuse(file, description.format(*found.groups()), step, error)
        raise


def _refuse(file: Path, description: str, step: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(f"{file} {description}. {step}.") from cause


def _innermost(loaded: object, file: Path) -> Mapping[object, object]:
    """Descend through containers to the state_dict."""
    for _ in range(_NESTING_LIMIT):
        if not isinstance(loaded, Mapping):
            _refuse(file, f"holds an object of type {type(loaded).__name__}, not a state_dict", _RESAVE)
        inner = [key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            return loaded
        if len(inner) > 1:
            _refuse(
                file, f"holds several state_dicts: {', '.join(inner)}", "Save the one you mean in a file of its own"
            )
        loaded = loaded[inner[0]]
    _refuse(file, f"nests more than {_NESTING_LIMIT} containers", _RESAVE)


def _dense_tensors(state: Mapping[object, object], file: Path) -> dict[str, Tensor]:
    """Check that every value is an ordinary tensor with a text key."""
    tensors: dict[str, Tensor] = {}
    others = []
    for key, value in state.items():
        plain = (
            isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        )
        if isinstance(key, str) and isinstance(value, Tensor) and plain:
            tensors[key] = value.detach()
        else:
            others.append(f"{shown(str(key))} ({type(value).__name__})")
    if others:
        _refuse(file, f"holds entries that are not dense tensors: {', '.join(others)}", _RESAVE)
    if not tensors:
        _refuse(file, "holds no tensors", _EXPECTED)
    return tensors


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrappers' prefixes that all keys share."""
    for prefix in WRAPPERS:
        if all(key.startswith(prefix) and key != prefix for key in state):
            return _unwrapped({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


def _rename(state: Mapping[str, Tensor], key_map: Mapping[str, str], report: LoadReport) -> dict[str, Tensor]:
    """Return the tensors by the model's names."""
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for published, tensor in state.items():
        name = renamed_key(key_map, published)
        if not name:
            report.ignored[published] = "left out by the key map"
            continue
        if name in renamed:
            raise UserError(
                f"the checkpoint's keys {shown(origin[name])} and {shown(published)} both become {shown(name)} by "
                "the key map. Make its patterns tell them apart, or choose the variant the checkpoint is of."
            )
        if name != published:
            report.renamed[published] = name
        renamed[name], origin[name] = tensor, published
    return renamed


def renamed_key(key_map: Mapping[str, str], key: str) -> str:
    """Return our name of a published one: by the first entry that matches; empty where that leaves it out.

    Raises:
        UserError: an entry is no regular expression.
    """
    for pattern, template in key_map.items():
        try:
            name, changes = re.subn(pattern, template, key, count=1)
        except re.error as error:
            raise UserError(
                f"the key map's entry {pattern!r}: {template!r} is not valid ({error}). Correct the regular expression."
            ) from error
        if changes:
            return name
    return key


def _fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """Return the tensors in the model's shapes and number types, and fill the report."""
    fitted = {}
    for name, wanted in expected.items():
        if name not in given:
            if name.rpartition(".")[2] == COUNTER:
                report.ignored[name] = "counter absent from the checkpoint; evaluation does not use it"
            else:
                report.missing[name] = _described(wanted)
            continue
        tensor = given[name]
        scalar = {tuple(tensor.shape), tuple(wanted.shape)} == {(), (1,)}
        if _kind(tensor) != _kind(wanted) or (tensor.shape != wanted.shape and not scalar):
            report.mismatched[name] = (_described(tensor), _described(wanted))
            continue
        converted = tensor.to(wanted.dtype)
        if converted is not tensor and bool((torch.isfinite(tensor) & ~torch.isfinite(converted)).any()):
            report.mismatched[name] = (f"{_described(tensor)} with values beyond the range", _described(wanted))
            continue
        if scalar:
            report.reshaped[name] = (list(tensor.shape), list(wanted.shape))
        if tensor.dtype != wanted.dtype:
            report.converted[name] = (_type_name(tensor), _type_name(wanted))
        fitted[name] = converted.reshape(wanted.shape)
        report.used.append(name)
    report.unexpected.update({name: _described(tensor) for name, tensor in given.items() if name not in expected})
    return fitted


def _kind(tensor: Tensor) -> str:
    """Return the kind of number; within one kind, the width may be converted."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{_type_name(tensor)} {tuple(tensor.shape)}"
