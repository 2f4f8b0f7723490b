"""Names of ways of choosing blocks as people write them, and the families that they belong to."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from seerattn.report.select import PER_HEAD, kind
from seerattn.results.record import Result
from seerattn.selection.map_form import MASS, MAX_POWER, PUBLISHED, MapForm

ORACLE = "oracle"


class System(NamedTuple):
    """A system of the literature.

    Attributes:
        name: as its authors write it.
        family: variants of one idea; vertical-slash is the pattern that MInference gives to most heads.
    """

    name: str
    family: str


# By how selectors begin; what follows names a variant.
_SYSTEMS = {
    "minference": System("MInference", "MInference"),
    "vertical_slash": System("vertical-slash", "MInference"),
    "xattention": System("XAttention", "XAttention"),
    "flexprefill": System("FlexPrefill", "FlexPrefill"),
    "moa": System("MoA", "MoA"),
    "pooled": System("mean-pooled q.k", "pooled"),
    "a_shape": System("A-shape", "A-shape"),
    "tri_shape": System("tri-shape", "tri-shape"),
}


def name_of(result: Result) -> str:
    """The name of an arm, such as "MInference paper", or "gates: best" for gates of that name."""
    if result.gates is not None:
        return f"gates: {result.gates}"
    form = map_of(result)
    if form is not None and form != PUBLISHED:
        return f"{ORACLE} by {map_name(form)}" + (PER_HEAD if result.selector.endswith(PER_HEAD) else "")
    start = _start(result)
    return result.arm.replace("_", "-") if start is None else _SYSTEMS[start].name + result.arm[len(start) :]


def family_of(result: Result) -> str:
    """What variants of an arm have in common: "gates" for all learned gates, or the name of a system."""
    if kind(result) == "gate":
        return "gates"
    start = _start(result)
    return result.selector if start is None else _SYSTEMS[start].family


def _start(result: Result) -> str | None:
    return next((start for start in _SYSTEMS if result.selector.startswith(start)), None)


def map_of(result: Result) -> MapForm | None:
    """The map that an oracle chooses by, as its name tells; None of others."""
    name, _, form = result.selector.removesuffix(PER_HEAD).partition(" ")
    if result.gates is not None or name != ORACLE:
        return None
    try:
        return MapForm.parse(form) if form else PUBLISHED
    except ValueError:
        return None


def map_name(form: MapForm) -> str:
    """What people call a map: "published", "mass", "power 2", "largest row", or as `MapForm` writes it."""
    if form in (PUBLISHED, MASS):
        return "published" if form == PUBLISHED else "mass"
    if form.keys != "sum":
        return str(form)
    return "largest row" if form.power == math.inf else f"power {form.power:g}"


def teacher_of(result: Result) -> MapForm | None:
    """The map that gates learned, where their name begins with it, as `research/public_gates.py` names forms.

    Records tell the weights of gates and not their target. "largest" is the largest probability of a tile, which is
    the published map; "power-4-fine" learned the power mean of 4.
    """
    if result.gates is None:
        return None
    power = re.match(r"power-(\d+(?:\.\d+)?)(?![\w.])", result.gates)
    if power:
        return MapForm("sum", float(power[1])) if 1 <= float(power[1]) <= MAX_POWER else None
    names = {"published": PUBLISHED, "largest": PUBLISHED, "mass": MASS}
    return next((form for name, form in names.items() if re.match(rf"{name}(?!\w)", result.gates)), None)
