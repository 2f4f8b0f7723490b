"""Measured times of attention in models, the choice of blocks included."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.benchmarks import in_models
from seerattn.report.parts import Table
from seerattn.report.tables.grid import Measured, compare, side_by_side
from seerattn.results.record import Result

ID, TITLE = "time", "Quality and time"
READ = "What quality costs in time. A method is better where its line lies lower and more to the left."


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each number of sequences at once, text and setting."""
    found = []
    for batch, timed in sorted(in_models(results).items()):
        for title, rows in side_by_side(timed):
            runs = sorted({f"{r.n} {r.unit if r.n > 1 else r.unit.removesuffix('s')}" for r in rows})
            counts = f"Median over {', '.join(runs)}; on {rows[0].device}."
            title = f"Milliseconds of attention a sequence, all layers, batch {batch}: {title}"
            options = {"better": "lower", "form": ",.2f", "notes": [counts]}
            found.append(compare(title, rows, _measure, **options))
    return found


def _measure(rows: Sequence[Result]) -> Measured:
    choice, attention = (sum(rows[-1].sampled(name)) for name in ("index", "attention"))
    share = f"{choice / (choice + attention):.0%} choice" if choice else ""
    return Measured(rows[-1].value, None, share)
