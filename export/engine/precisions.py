"""The types of a parsed network and of a built engine, held against those of the graph: nothing changes silently."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto

PRECISIONS: Mapping[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.DOUBLE: "DOUBLE",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
    TensorProto.FLOAT4E2M1: "FP4",
}
"""TensorRT's names of the types that make a precision; index and truth types are left out."""

_WORDS = {
    "HALF": r"half|fp16",
    "BF16": r"bfloat16|bf16",
    "FP8": r"fp8",
    "FP4": r"fp4",
    "INT4": r"int4",
    "INT8": r"int8",
    "UINT8": r"uint8",
    "FLOAT": r"float|fp32|float32",
    "DOUBLE": r"double",
}
_INSPECTED = {name: re.compile(rf"\b({words})\b", re.IGNORECASE) for name, words in _WORDS.items()}
"""How the engine inspector spells a type: "Half", "Float", or within "Row major linear FP16 format"."""

_UNRELATED = re.compile(r"\b(u?int(16|32|64)|bool|n/?a|none)\b", re.IGNORECASE)

AGREES, DIFFERS, UNPROVEN = "agrees", "differs", "unproven"


@dataclass(frozen=True)
class PrecisionCheck:
    """What the comparison of an engine with its graph found.

    Attributes:
        compared: tensors of the graph that were found in network or engine by name.
        differences: tensors of another type, one sentence each.
        unseen: precisions of the graph that no tensor of the engine has.
        unread: tensors of the engine whose type could not be read.
        tensors: how many tensors of the engine's layers have each type.
    """

    compared: int
    differences: tuple[str, ...]
    unseen: tuple[str, ...]
    unread: int
    tensors: Mapping[str, int]

    @property
    def verdict(self) -> str:
        """`AGREES`, `DIFFERS`, or `UNPROVEN` when too little could be read to tell."""
        if self.differences:
            return DIFFERS
        return UNPROVEN if self.unseen or not self.compared else AGREES

    def as_dict(self) -> dict[str, Any]:
        """Return the result in types that JSON has."""
        return {
            "verdict": self.verdict,
            "compared": self.compared,
            "differences": list(self.differences),
            "unseen": list(self.unseen),
            "unread": self.unread,
            "tensors": dict(self.tensors),
        }


def graph_precisions(types: Mapping[str, int]) -> dict[str, str]:
    """Return the precision of every tensor of a graph that has one; see `element_types`."""
    return {name: PRECISIONS[kind] for name, kind in types.items() if kind in PRECISIONS}


def inspected_precision(text: str) -> str | None:
    """Return the precision in the inspector's words, "" for index and truth types, None when it cannot be read."""
    for name, pattern in _INSPECTED.items():
        if pattern.search(text):
            return name
    return "" if _UNRELATED.search(text) else None


def layers_of(information: str) -> list[Mapping[str, Any]]:
    """Return the layers in an inspector's JSON that carry details."""
    layers = json.loads(information).get("Layers", [])
    return [layer for layer in layers if isinstance(layer, dict)]


def check_precisions(
    graph: Mapping[str, str],
    network: Mapping[str, str],
    bindings: Mapping[str, str],
    layers: list[Mapping[str, Any]],
) -> PrecisionCheck:
    """Compare the tensors of network and engine with those of the graph, by name.

    Fused layers keep the names of the tensors between them, so what an engine computes inside them is not seen; it
    follows from the network's types, because the network is strongly typed.

    Args:
        graph: precision of each tensor of the ONNX graph, see `graph_precisions`.
        network: type of each tensor of the parsed network.
        bindings: type of each input and output of the engine.
        layers: see `layers_of`.
    """
    tensors: Counter[str] = Counter()
    unread = 0
    differences: list[str] = []
    compared: set[str] = set()
    inner: dict[str, str] = {}
    for name, text in dict(_layer_tensors(layers)).items():
        precision = inspected_precision(text)
        if precision is None:
            unread += 1
        elif precision:
            tensors[precision] += 1
            inner[name] = precision
    for place, found in (("network", network), ("engine's inputs and outputs", bindings), ("engine's layers", inner)):
        for name, precision in found.items():
            if name in graph:
                compared.add(name)
                if graph[name] != precision:
                    differences.append(f"{name} is {graph[name]} in the graph and {precision} in the {place}.")
    seen = {*tensors, *bindings.values()}
    computed = {precision for name, precision in graph.items() if name in network}
    return PrecisionCheck(len(compared), tuple(differences), tuple(sorted(computed - seen)), unread, dict(tensors))


def _layer_tensors(layers: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for layer in layers:
        for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
            if isinstance(tensor, dict):
                yield str(tensor.get("Name")), str(tensor.get("Format/Datatype"))
