"""The share of the gap in perplexity from streaming (0) to the best oracle (1) that a way of choosing blocks closes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from seerattn.report.names import map_of
from seerattn.report.select import kind, reached, realised, same_density
from seerattn.results.record import Result

BLOCK = 64


class Closed(NamedTuple):
    """What one perplexity amounts to between those of streaming and of the best oracle.

    Attributes:
        share: 0 is streaming, 1 the oracle.
        ends: realised density of streaming, where it is not that of the row, so that the share is none at equal
            density; None where it is.
        oracle: name of the oracle.
    """

    share: float
    ends: float | None
    oracle: str


def closed(row: Result, results: Iterable[Result]) -> Closed | None:
    """The gap that a row closes at its nominal density.

    Of several oracles, which choose by other maps or have budgets per head, the best at that density is the end: what
    is known to be possible.

    Args:
        row: a perplexity.
        results: perplexities that it may stand in a table with; those of its own context count.

    Returns:
        None for the dense model and the ends themselves, and where there is no gap: an end was not measured, or no
        oracle is better than streaming at one density.
    """
    if kind(row) in ("dense", "oracle") or row.arm == "streaming" or row.value is None:
        return None
    ends = {r.arm: r for r in results if (r.context, r.density) == (row.context, row.density) and r.value is not None}
    floor = ends.get("streaming")
    if floor is None:
        return None
    oracles = [r for r in ends.values() if is_ceiling(r) and _equal(floor, r)]
    ceiling = min(oracles, key=lambda r: r.value, default=None)
    if ceiling is None or floor.value <= ceiling.value:
        return None
    share = (floor.value - row.value) / (floor.value - ceiling.value)
    return Closed(share, None if _equal(row, floor) else realised([floor]), ceiling.arm)


def is_ceiling(result: Result) -> bool:
    """Whether it is of an oracle with the blocks of gates."""
    return map_of(result) is not None and result.cell.get("block_k", BLOCK) == BLOCK


def _equal(one: Result, other: Result) -> bool:
    """Whether two results of one nominal density may be compared: both reached it, or both missed it alike."""
    densities = realised([one]), realised([other])
    return (reached([one]) and reached([other])) or (None not in densities and same_density(*densities))
