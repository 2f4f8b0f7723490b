"""Perplexity in the form of the paper's Table 1 (arXiv 2410.13276): a line a method, contexts side by side."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.parts import Table
from seerattn.report.select import group, paired, perplexity_key
from seerattn.report.tables.grid import Measured, compare, side_by_side
from seerattn.results.record import Result

ID, TITLE = "perplexity", "Perplexity"
READ = (
    "Lower is better. ± is the standard error of the paired difference from the dense model on the same documents. It "
    "is far smaller than that of the perplexity itself. Different contexts rest on different amounts of text, so their "
    "perplexities do not compare."
)


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each text and setting."""
    errors = paired(results)

    def measure(rows: Sequence[Result]) -> Measured:
        return Measured(rows[-1].value, errors.get(perplexity_key(rows[-1])))

    found = []
    for title, rows in side_by_side(r for r in results if r.what == "perplexity"):
        # All of a context are measured on the same documents.
        notes = {context: _size(of[0]) for context, of in group(rows, lambda r: r.context).items()}
        options = {"better": "lower", "form": ".2f", "error_form": ".3f", "group_notes": notes}
        found.append(compare(f"Perplexity: {title}", rows, measure, **options))
    return found


def _size(row: Result) -> str:
    documents = len(row.samples.get("documents", ()))
    counted = f"{documents} document{'s' if documents > 1 else ''}, " if documents else ""
    return f"{counted}{row.n:,} {row.unit}."
