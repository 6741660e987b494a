"""Finds attention cores by structure, starting from each softmax."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from edgeattn.export.rewrite.candidates import Candidate, Mismatch
from edgeattn.export.rewrite.co_attention import read_one_way
from edgeattn.export.rewrite.criss_cross import read_criss_cross
from edgeattn.export.rewrite.trace import Tracer
from edgeattn.export.rewrite.walks import Energy, energies_of


@dataclass
class Findings:
    """What the structure of a graph suggests.

    Attributes:
        criss_cross: candidates for criss-cross attention.
        one_way: candidates for one direction of co-attention, with the product they share.
        refused: softmax nodes of almost-cores with the reason.
    """

    criss_cross: list[Candidate]
    one_way: list[tuple[str, Candidate]]
    refused: list[tuple[gs.Node, str, str]]


def find(tracer: Tracer) -> Findings:
    """Look at every softmax of the graph and sort out what may be a core, what almost is one, and what is not."""
    findings = Findings([], [], [])
    lines: dict[frozenset[str], list[tuple[gs.Node, str]]] = defaultdict(list)
    for softmax in [node for node in tracer.graph.nodes if node.op == "Softmax" and not node.domain]:
        energies = energies_of(tracer, softmax)
        if not energies:
            continue
        directions = [_direction(energy) for energy in energies]
        group = " and ".join(sorted(energies[0].maps))
        try:
            if len(energies) > 1 and all(directions):
                findings.criss_cross.append(read_criss_cross(tracer, softmax, energies, directions))
            elif directions == ["all"]:
                candidate = read_one_way(tracer, softmax, energies[0])
                if candidate is not None:
                    findings.one_way.append((group, candidate))
            elif len(energies) == 1 and directions[0]:
                lines[energies[0].maps].append((softmax, directions[0]))
        except Mismatch as mismatch:
            findings.refused.append((softmax, group, str(mismatch)))
    for members in lines.values():
        if {direction for _, direction in members} == {"column", "row"}:
            findings.refused.append(
                (
                    members[0][0],
                    "",
                    "columns and rows have a softmax each, but criss-cross attention has one softmax over both",
                )
            )
    return findings


def _direction(energy: Energy) -> str:
    left, right = (source.direction for source in energy.sources)
    return left if left == right else ""
