"""What people call lines and maps."""

from __future__ import annotations

import math

from seerattn.methods import methods
from seerattn.report.select import PER_HEAD
from seerattn.results.record import Result
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm


def name_of(result: Result) -> str:
    """The name of a line, such as "MInference paper", "oracle by power 2" or "gates: best"."""
    if result.kind == "learned":
        return f"gates: {result.name}"
    form = map_of(result)
    if form is not None and form != PUBLISHED:
        return f"oracle by {map_name(form)}{per_head(result.name)}{result.line.removeprefix(result.name)}"
    # A line begins with the id of its method; of a method that is not known here it is shown as it is.
    known = result.method in methods() and result.line.startswith(result.method)
    return methods()[result.method].title + result.line.removeprefix(result.method) if known else result.line


def per_head(name: str) -> str:
    """What a name says of budgets."""
    return PER_HEAD if name.endswith(PER_HEAD) else ""


def shown_name(name: str) -> str:
    """The name of a line of which no more is known than what records call it."""
    method, _, rest = name.partition(" ")
    if method not in methods():
        return name
    title = methods()[method].title
    try:
        return f"{title} by {map_name(MapForm.parse(rest))}"
    except ValueError:
        return f"{title} {rest}".rstrip()


def map_of(result: Result) -> MapForm | None:
    """The map that an oracle chooses by; None of others."""
    if result.method != "oracle":
        return None
    return MapForm.parse(result.settings["target"]) if "target" in result.settings else PUBLISHED


def map_name(form: MapForm) -> str:
    """What people call a map: "published", "mass", "power 2", "largest row", or as `MapForm` writes it."""
    if form in (PUBLISHED, MASS):
        return "published" if form == PUBLISHED else "mass"
    if form.keys != "sum":
        return str(form)
    return "largest row" if form.power == math.inf else f"power {form.power:g}"
