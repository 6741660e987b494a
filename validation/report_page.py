"""What every page shares: the template environment, how numbers are written, and the sections a page is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

NOTHING = "–"
"""Stands where there is no number."""


@dataclass(frozen=True)
class Section:
    """One part of a page, rendered.

    Attributes:
        anchor: id of its heading, for links within the page.
        title: its heading.
        body: its content.
    """

    anchor: str
    title: str
    body: Markup


def template_environment(package: str = "edgeattn.validation") -> jinja2.Environment:
    """Return the environment of a package's templates, which may use the base page and the charts.

    Args:
        package: the package whose folder `templates` comes first.
    """
    packages = dict.fromkeys((package, "edgeattn.validation"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimal": decimal,
        "megabytes": megabytes,
        "percent": percent,
        "points": points,
        "scientific": scientific,
        "worst": worst,
    }
    return environment


def section(
    template: str, anchor: str, title: str, package: str = "edgeattn.validation", /, **context: object
) -> Section:
    """Render one section from a template."""
    body = template_environment(package).get_template(template).render(**context)
    return Section(anchor, title, Markup(body))


def number(value: object) -> float | None:
    """Return a number as a record holds it: infinities and NaN may be strings, what is unknown null."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    found = float(value)
    return None if math.isnan(found) else found


def decimal(value: object, digits: int = 2, unit: str = "") -> str:
    """Return a number with a fixed number of digits and its unit."""
    found = number(value)
    return NOTHING if found is None else f"{_rounded(found, digits):,.{digits}f}{unit and ' ' + unit}"


def scientific(value: object) -> str:
    """Return a number as 1.2e-03."""
    found = number(value)
    return NOTHING if found is None else f"{found:.1e}"


def percent(value: object) -> str:
    """Return a fraction 0..1 in percent."""
    found = number(value)
    return NOTHING if found is None else f"{found:.3%}"


def points(value: object) -> str:
    """Return a fraction 0..1 in points of 100."""
    found = number(value)
    return NOTHING if found is None else f"{_rounded(100 * found, 2):.2f}"


def _rounded(value: float, digits: int) -> float:
    """Round a number, without the sign that a small negative one would leave on zero."""
    return round(value, digits) + 0.0


def megabytes(size: object) -> str:
    """Return a number of bytes in MB."""
    found = number(size)
    return NOTHING if found is None else f"{found / 1e6:,.2f} MB"


def worst(outputs: Mapping[str, Mapping[str, Any]], figure: str, *, smallest: bool = False) -> float | None:
    """Return the largest (or smallest) figure of any output; None where there is none, or one is not a number."""
    found = [number(error[figure]) for error in outputs.values()]
    known = [value for value in found if value is not None]
    if not found or len(known) < len(found):
        return None
    return min(known) if smallest else max(known)


def magnitudes(values: Iterable[object]) -> list[float]:
    """Return the positive finite numbers among some values, which a logarithmic axis can show."""
    found = (number(value) for value in values)
    return [value for value in found if value is not None and 0 < value < math.inf]
