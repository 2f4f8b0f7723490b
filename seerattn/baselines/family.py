"""A family: one way of choosing blocks, with one number that sets how many.

Each system brings its own knob: a density, a share of the mass, a number of tokens, a budget of a plan. To compare them
at equal density that knob is tuned, and this is all that tuning needs to know of a system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from seerattn.selection.selector import Selector

SelectorAt = Callable[[int], Selector | None]


@dataclass(frozen=True, eq=False)
class Family:
    """A way of choosing blocks whose density one number sets.

    Attributes:
        name: what tables call it.
        at: from a value of the knob to what gives the selector of each layer.
        sparsest: the knob that keeps the fewest blocks.
        densest: the knob that keeps the most; density does not fall on the way there.
        scale: whether equal steps or equal factors of the knob are about equal steps of density.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        settings: everything else that defines it, as plain JSON types; part of what identifies a result.
    """

    name: str
    at: Callable[[float], SelectorAt]
    sparsest: float
    densest: float
    scale: Literal["linear", "log"] = "linear"
    block_q: int = 64
    block_k: int = 64
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
