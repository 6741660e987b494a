"""Targets files to a `Catalogue`: references between rows, software times hardware, targets that start from others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeattn.foundation import Registry, UserError
from edgeattn.targets.catalogue import Catalogue
from edgeattn.targets.schema import FIGURES, Row, read, version
from edgeattn.targets.spec import Hardware, Sm, Software, Target, Unsupported

_FOLLOWS = {"cuda": "ptx_isa", "sm": "shared_memory_kib"}
"""Figures that follow from another one, and are worked out anew where a `target` row overrides that one."""


def load(files: Sequence[Path]) -> Catalogue:
    """Read targets files and combine what they declare.

    Args:
        files: targets files; later ones may refer to what earlier ones declare, and may not declare it again.

    Returns:
        The catalogue.

    Raises:
        UserError: a file cannot be read or used; the message names file, row, field, value and next step.
    """
    return _Combination(files).catalogue()


class _Combination:
    """Rows of all files, by table, and what is made of them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.texts: dict[str, str] = {}
        self.rows: dict[str, dict[str, Row]] = {}
        for file in files:
            texts, rows = read(file)
            if again := self.texts.keys() & texts.keys():
                raise UserError(f"{file}: source {min(again)!r} is declared already. Choose another key.")
            self.texts |= texts
            for row in rows:
                table = self.rows.setdefault(row.table, {})
                if row.name in table:
                    raise row.error(f"{table[row.name].file} declares it already. Choose another name.")
                table[row.name] = row
        self.ptx_isas = {version(row.name): row for row in self.table("cuda")}
        self.sms = {int(row.name): self.sm(row) for row in self.table("sm")}
        self.software = {row.name: Software(row.name, **self.part(row)) for row in self.table("software")}
        self.hardware = {row.name: Hardware(row.name, **self.part(row)) for row in self.table("hardware")}
        self.targets: Registry[Target] = Registry("target")
        self.aliases: dict[str, str] = {}
        self.under_way: list[str] = []
        self.finished: set[str] = set()

    def catalogue(self) -> Catalogue:
        self.check_references()
        for software in self.software.values():
            self.combine(software)
        used = {target.hardware for target in self.targets}
        for row in self.table("hardware"):
            if row.name not in used:
                raise row.error("no software runs on it. Give it a family, or software = [...] with what runs on it.")
        own = [self.declared(row) for row in self.table("target")]
        return Catalogue(
            self.sms,
            list(self.software.values()),
            list(self.hardware.values()),
            self.targets,
            own,
            self.aliases,
            [Unsupported(row.name, **{**row.values, "source": self.source(row)}) for row in self.table("unsupported")],
        )

    def table(self, name: str) -> list[Row]:
        return list(self.rows.get(name, {}).values())

    def source(self, row: Row) -> str:
        """Return the text of a row's source; without one it is the file."""
        source = row.values.get("source", f"{row.file}")
        return self.texts.get(source, source)

    def sources(self, row: Row) -> dict[str, str]:
        """Return the source of every figure that a row gives."""
        default = self.source(row)
        given = row.values.get("sources", {})
        named = {figure: self.texts.get(text, text) for figure, text in given.items()}
        return {figure: default for figure in FIGURES if figure in row.values} | named

    def sm(self, row: Row) -> Sm:
        values = {field: value for field, value in row.values.items() if field != "summary"}
        return Sm(int(row.name), row.values["summary"], **{**values, "source": self.source(row)})

    def part(self, row: Row) -> dict[str, Any]:
        """Return the fields of software or hardware."""
        values = {field: value for field, value in row.values.items() if field not in ("source", "sources")}
        return {**values, "sources": self.sources(row)}

    def check_references(self) -> None:
        """Refuse rows that name what no file declares."""
        for row in self.table("software"):
            self.check_names(row, "hardware", self.hardware)
        for row in self.table("hardware"):
            self.check_names(row, "software", self.software)
            families = [name for name, hardware in self.hardware.items() if hardware.family is None]
            if (family := row.values.get("family")) and family not in families:
                raise row.error(f"family = {family!r} is not a family. Choose one of {', '.join(families)}.")

    def check_names(self, row: Row, field: str, known: Mapping[str, object]) -> None:
        for name in row.values.get(field, ()):
            if name not in known:
                raise row.error(f"{field} = {name!r} is not declared. Choose one of {', '.join(known)}.")

    def combine(self, software: Software) -> None:
        """Add the targets of one software stack."""
        row = self.rows["software"][software.name]
        members = [hardware for hardware in self.hardware.values() if self.fits(software, hardware)]
        if not members:
            raise row.error("none of its hardware takes it. Name hardware without a list `software` of its own.")
        for hardware in members:
            target = self.target(row, self.combined(software, hardware))
            self.add(row, target)
            for first in (software.name, *software.aliases):
                for last in (hardware.name, *hardware.aliases):
                    if f"{first}-{last}" != target.name:
                        self.alias(row, f"{first}-{last}", target)
        families = {hardware.family or hardware.name for hardware in members}
        if len(families) == 1 and (only := families.pop()) in {hardware.name for hardware in members}:
            for name in (software.name, *software.aliases):
                self.alias(row, name, self.targets.get(f"{software.name}-{only}"))

    @staticmethod
    def fits(software: Software, hardware: Hardware) -> bool:
        """Return whether hardware is for this software: by its own list if it has one, else by the software's."""
        if hardware.software:
            return software.name in hardware.software
        return hardware.name in software.hardware or hardware.family in software.hardware

    @staticmethod
    def combined(software: Software, hardware: Hardware) -> dict[str, Any]:
        """Return the fields of software on hardware, as a `target` row would give them."""
        figures = {**vars(hardware), **vars(software)}
        given = {figure: figures[figure] for figure in FIGURES if figures.get(figure) is not None}
        return {
            **given,
            "name": f"{software.name}-{hardware.name}",
            "summary": f"{hardware.summary}, {software.summary}",
            "software": software.name,
            "hardware": hardware.name,
            # What a stack leaves in doubt about hardware, such as its DLA, is no question where there is none.
            "sources": {
                **hardware.sources,
                **{name: text for name, text in software.sources.items() if given.get(name)},
            },
            "unverified": hardware.unverified | {name for name in software.unverified if given.get(name)},
        }

    def declared(self, row: Row) -> Target:
        """Return the target of a `target` row, adding it if that has not happened."""
        if row.name in self.finished:
            return self.targets.get(row.name)
        values: dict[str, Any] = {"sources": {}, "unverified": frozenset()}
        if base := row.values.get("base"):
            values = _as_row(self.base(row, base))
        given = {field: value for field, value in row.values.items() if field in FIGURES}
        stale = {_FOLLOWS[figure] for figure in given if figure in _FOLLOWS}
        kept = {field: value for field, value in values.items() if field not in stale}
        fields = {
            **kept,
            **given,
            "name": row.name,
            "summary": row.values.get("summary", values.get("summary")),
            "sources": {**values["sources"], **self.sources(row)},
            "unverified": (values["unverified"] - stale - set(given)) | row.values.get("unverified", frozenset()),
        }
        for field in ("summary", "tensorrt", "cuda", "sm", "opset"):
            if fields.get(field) is None:
                raise row.error(f"the field {field} is missing. Add it, or name a target to start from: base = NAME.")
        target = self.target(row, fields)
        self.add(row, target)
        self.finished.add(row.name)
        return target

    def base(self, row: Row, name: str) -> Target:
        """Return the target that a row starts from."""
        self.under_way.append(row.name)
        if name in self.under_way:
            raise row.error(f"base = {name!r} leads back to itself. Start from another target.")
        if name in self.rows["target"]:
            base = self.declared(self.rows["target"][name])
        elif self.aliases.get(name, name) in self.targets:
            base = self.targets.get(self.aliases.get(name, name))
        else:
            raise row.error(f"base = {name!r} is not a target. `edgeattn list targets` shows all.")
        self.under_way.remove(row.name)
        return base

    def target(self, row: Row, fields: Mapping[str, Any]) -> Target:
        """Return a target, with what follows from its CUDA version and its architecture."""
        fields = dict(fields)
        sources = dict(fields["sources"])
        unverified = set(fields["unverified"])
        name, cuda, sm = fields["name"], fields["cuda"], fields["sm"]
        if sm not in self.sms:
            known = ", ".join(str(number) for number in self.sms)
            raise row.error(f"{name}: sm = {sm} is not declared. Choose one of {known}, or add a row [sm.{sm}].")
        if "ptx_isa" not in fields:
            if cuda not in self.ptx_isas:
                raise row.error(
                    f'{name}: cuda = "{_dotted(cuda)}" has no known PTX ISA. '
                    f'Add a row [cuda."{_dotted(cuda)}"] with the newest PTX ISA that its driver takes.'
                )
            fields["ptx_isa"] = self.ptx_isas[cuda].values["ptx_isa"]
            sources["ptx_isa"] = self.source(self.ptx_isas[cuda])
        if fields["ptx_isa"] < self.sms[sm].minimum_ptx_isa:
            raise row.error(
                f"{name}: sm = {sm} needs PTX ISA {self.sms[sm].minimum_ptx_isa}, and CUDA {_dotted(cuda)} takes "
                f"{fields['ptx_isa']} at most. Choose a newer CUDA version or another architecture."
            )
        if "shared_memory_kib" not in fields:
            fields["shared_memory_kib"] = self.sms[sm].shared_memory_kib
            sources["shared_memory_kib"] = self.sms[sm].source
            unverified |= {"shared_memory_kib"} & self.sms[sm].unverified
        fields["sources"] = {figure: text for figure, text in sources.items() if fields.get(figure) is not None}
        fields["unverified"] = frozenset(figure for figure in unverified if fields.get(figure) is not None)
        fields["tensorrt_full"] = fields["tensorrt"]
        fields["tensorrt"] = version(fields["tensorrt"])
        return Target(**fields)

    def add(self, row: Row, target: Target) -> None:
        if target.name in self.targets or target.name in self.aliases:
            raise row.error(f"{target.name} is the name of a target already. Choose another name.")
        self.targets.add(target)

    def alias(self, row: Row, name: str, target: Target) -> None:
        if name in self.targets or name in self.aliases:
            raise row.error(f"{name}, an alias of {target.name}, is the name of a target already. Change the aliases.")
        self.aliases[name] = target.name


def _as_row(target: Target) -> dict[str, Any]:
    """Return the fields of a target as a `target` row would give them."""
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    fields["tensorrt"] = fields.pop("tensorrt_full")
    return {name: value for name, value in fields.items() if value is not None}


def _dotted(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
