"""A family: one way of choosing blocks, with one number that sets how many.

Each system brings its own knob: a density, a share of the mass, a number of tokens, a budget of a plan. To compare them
at equal density that knob is tuned, and this is all that tuning needs to know of a system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from seerattn.selection.policies import Policy, TopK
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


def top_k_family(
    name: str,
    make: Callable[[Policy], Selector],
    *,
    block_q: int,
    block_k: int,
    sink_blocks: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Family:
    """The family of a selector that leaves the choice to a policy; the knob is the density of `TopK`.

    Args:
        name: what tables call it.
        make: from a policy to the selector, which is the same in every layer.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        sink_blocks: first key blocks that every row keeps.
        settings: what else defines the family.
    """

    def at(density: float) -> SelectorAt:
        selector = make(TopK(density=density, sink_blocks=sink_blocks))
        return lambda layer: selector

    settings = {**settings, "sink_blocks": sink_blocks}
    return Family(name, at, sparsest=1e-3, densest=1.0, block_q=block_q, block_k=block_k, settings=settings)
