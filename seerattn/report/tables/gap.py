"""How much of the gap in perplexity from streaming (0%) to the best oracle (100%) a method closes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seerattn.report.names import map_of, name_of
from seerattn.report.parts import Table
from seerattn.report.select import BLOCK, budget, group, reached, realised, same_density
from seerattn.report.tables.grid import Measured, compare, side_by_side
from seerattn.results.record import Result

ID, TITLE = "gap", "Gap closed from streaming to the oracle"
READ = (
    "100% is the perplexity of the oracle, of several that of the best. 0% is that of streaming. Both have blocks of "
    "64 tokens, the same nominal density and the same setting. Below 0% is worse than streaming. Columns where no "
    "oracle is better than streaming have no gap to close and are left out. Where both ends have another realised "
    "density than the method, it stands beside the share."
)
STREAMING = "streaming"


class Closed(NamedTuple):
    """What one perplexity amounts to between those of streaming and of the best oracle.

    Attributes:
        share: 0 is streaming, 1 the oracle.
        ends: realised density of streaming, where it is not that of the row, so that the share is none at equal
            density; None where it is.
        oracle: the row of the oracle.
    """

    share: float
    ends: float | None
    oracle: Result


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each text and setting."""
    found = []
    losses = [r for r in results if r.what == "perplexity" and r.value is not None and budget(r) == "density"]
    for title, rows in side_by_side(losses):
        shares = {r.key: gap for r in rows if (gap := closed(r, rows)) is not None}
        between = [r for r in rows if r.key in shares]
        if not between:
            continue

        def measure(rows: Sequence[Result], shares: dict[str, Closed] = shares) -> Measured:
            share, ends, _ = shares[rows[-1].key]
            return Measured(share, None, "" if ends is None else f"ends at {ends:.3f}", equal=ends is None)

        several = len({r.line for r in rows if _is_end(r)}) > 1
        notes = {
            context: _oracles(of, shares) for context, of in group(between, lambda r: r.context).items() if several
        }
        title = f"Share of the gap that is closed: {title}"
        options = {"better": "higher", "form": ".0%", "group_notes": notes}
        found.append(compare(title, between, measure, **options))
    return found


def _oracles(rows: Sequence[Result], shares: dict[str, Closed]) -> str:
    """Which of several oracles is the end of each gap."""
    best = {r.density: name_of(shares[r.key].oracle) for r in rows if r.density is not None}
    return f"The best oracles: {', '.join(f'{best[d]} at {d:g}' for d in sorted(best, reverse=True))}."


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
    if row.kind in ("dense", "oracle") or row.line == STREAMING or row.value is None:
        return None
    found = [r for r in results if (r.context, r.density) == (row.context, row.density) and r.value is not None]
    streaming = next((r for r in reversed(found) if r.line == STREAMING), None)
    if streaming is None:
        return None
    best = min((r for r in found if _is_end(r) and _equal(streaming, r)), key=lambda r: r.value, default=None)
    if best is None or streaming.value <= best.value:
        return None
    share = (streaming.value - row.value) / (streaming.value - best.value)
    return Closed(share, None if _equal(row, streaming) else realised([streaming]), best)


def _is_end(result: Result) -> bool:
    """Whether it is of an oracle with the blocks of gates."""
    return map_of(result) is not None and result.cell.get("block_k", BLOCK) == BLOCK


def _equal(one: Result, other: Result) -> bool:
    """Whether two results of one nominal density may be compared: both reached it, or both missed it alike."""
    densities = realised([one]), realised([other])
    return (reached([one]) and reached([other])) or (None not in densities and same_density(*densities))
