"""Recall of the true map, and of the attention mass."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.parts import Table
from seerattn.report.tables.grid import Measured, compare, side_by_side
from seerattn.results.record import Result

ID, TITLE = "recall", "Recall of the true map"
READ = (
    "Share of the true block map that lies in the chosen blocks, a mean over layers and heads. Mass alone misleads. "
    "A window of recent blocks can hold as much of it as the oracle's choice and still lose all that was to be found."
)
_TITLES = {"target_recall": "target map", "mass_recall": "attention mass"}


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each quantity, text and setting."""
    found = []
    for what, name in _TITLES.items():
        for title, rows in side_by_side(r for r in results if r.what == what and "layer" not in r.cell):
            title = f"Recall of the {name}: {title}"
            notes = [f"{rows[0].n} {rows[0].unit}."]
            found.append(compare(title, rows, _measure, better="higher", form=".3f", notes=notes))
    return found


def _measure(rows: Sequence[Result]) -> Measured:
    return Measured(rows[-1].value, rows[-1].stderr)
