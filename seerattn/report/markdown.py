"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.select import reached, realised
from seerattn.results.record import Result


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at(rows: Sequence[Result]) -> str:
    """What the results of a cell say of their density: nothing where it is the one asked for."""
    return "" if reached(rows) else f" at {realised(rows):.3f}"
