"""What became of every key of a checkpoint, and the paragraph that says so when it does not fit."""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterable

from edgeattn.foundation import UserError

_SUGGESTION_LIMIT = 10


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every key. "Published" names are the checkpoint's, the others are the model's.

    Attributes:
        used: names that were filled from the checkpoint.
        renamed: name by published name, where the key map changed it.
        reshaped: shape in the checkpoint and in the model, where one is () and the other (1,).
        converted: number type in the checkpoint and in the model, where they differ.
        ignored: reason, by published name for keys that the key map leaves out, and by name for absent counters.
        missing: description of the tensors that the model has and the checkpoint lacks.
        unexpected: description of the tensors that the checkpoint has (after renaming) and the model lacks.
        mismatched: descriptions in the checkpoint and in the model, where the shape or the kind of number differs.
    """

    used: list[str] = dataclasses.field(default_factory=list)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    reshaped: dict[str, tuple[list[int], list[int]]] = dataclasses.field(default_factory=dict)
    converted: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    unexpected: dict[str, str] = dataclasses.field(default_factory=dict)
    mismatched: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def as_dict(self) -> dict[str, object]:
        """Return the fields as plain lists and dictionaries, for JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Return one line with the number of keys in each non-empty field, such as "7 used, 1 renamed"."""
        counts = ((len(getattr(self, field.name)), field.name) for field in dataclasses.fields(self))
        return ", ".join(f"{count} {name}" for count, name in counts if count) or "no tensors"


class CheckpointMismatchError(UserError):
    """A checkpoint does not fit a model; `report` says where."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def explain(model: str, expected: int, report: LoadReport) -> str:
    """Return the paragraph that lists every key that does not fit.

    Args:
        model: name of the model, for the message.
        expected: number of tensors in its state_dict.
        report: the report.
    """
    sentences = [f"the checkpoint does not fit {model}: {len(report.used)} of its {expected} tensors were found."]
    if report.missing:
        sentences.append(f"Missing ({len(report.missing)}): {_compact(report.missing)}.")
    if report.unexpected:
        sentences.append(f"Unexpected ({len(report.unexpected)}): {_compact(report.unexpected)}.")
    if report.mismatched:
        pairs = (f"{shown(key)} is {got}, but {want} here" for key, (got, want) in report.mismatched.items())
        sentences.append(f"Mis-shaped ({len(report.mismatched)}): {'; '.join(pairs)}.")
    sentences.append(_suggest(report))
    sentences.append(
        "Nothing was loaded. Choose the model, its size and the variant that the checkpoint was made with."
    )
    return " ".join(filter(None, sentences))


def _compact(keys: Iterable[str]) -> str:
    """List all keys, with siblings and modules of equal content in braces: `{bn1, bn2}.{weight, bias}`."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        parent, _, leaf = shown(key).rpartition(".")
        leaves[parent].append(leaf)
    top_level = leaves.pop("", [])
    parents: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for parent, names in leaves.items():
        parents[tuple(names)].append(parent)
    return ", ".join([*top_level, *(f"{_braced(owners)}.{_braced(names)}" for names, owners in parents.items())])


def _braced(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{{{', '.join(listed)}}}"


def shown(key: str) -> str:
    """Return a key without control characters; it comes from a file that may be hostile to terminals."""
    return key.encode("unicode_escape").decode()


def _suggest(report: LoadReport) -> str:
    """Return a sentence that pairs missing keys with the nearest unexpected keys, or says which prefix to strip."""
    unexpected = list(report.unexpected)
    first = next(iter(report.missing), "")
    for prefix in {key.removesuffix(first) for key in unexpected if first and key.endswith(f".{first}")}:
        if all(f"{prefix}{key}" in report.unexpected for key in report.missing):
            return f"All missing keys are there with the prefix {shown(prefix)}: remove it with a key map."
    pairs = []
    for key, description in report.missing.items():
        alike = [other for other in unexpected if report.unexpected[other] == description]
        pairs += [(key, other) for other in difflib.get_close_matches(key, alike or unexpected, n=1)]
        if len(pairs) == _SUGGESTION_LIMIT:
            break
    nearest = (f"{shown(other)} for {shown(key)}" for key, other in pairs)
    return f"Nearest names in the checkpoint: {', '.join(nearest)}." if pairs else ""
