"""Names of ways of choosing blocks as people write them, and the families that they belong to."""

from __future__ import annotations

from typing import NamedTuple

from seerattn.eval.results import Result
from seerattn.report.select import kind


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
