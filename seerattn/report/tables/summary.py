"""Summary: perplexity and retrieval side by side, a line for each method, a table for each density."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report import select
from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Table, plain
from seerattn.results.record import Result
from seerattn.results.statistics import proportion

ID, TITLE = "summary", "Summary"
READ = (
    "Perplexity (lower is better) beside the share of right answers (higher is better), at the longest context that "
    "has both, without dense last rows. Density is the realised one, from the least to the greatest of the line. A "
    f"cell with “at” is over {select.SAME_DENSITY:g} off what was asked for. Standard errors stand in the other tables."
)


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for every density that has both perplexity and retrieval, none without."""
    rows = select.at_density(results, "perplexity", "accuracy")
    found = []
    for of_model in select.group(rows, lambda r: (r.model, r.weights.get("model"))).values():
        places = {(r.what, r.context, r.density) for r in of_model if r.kind != "dense" and r.density is not None}
        both = {(c, d) for what, c, d in places if {("perplexity", c, d), ("accuracy", c, d)} <= places}
        context = max((c for c, _ in both), default=0)
        columns = _columns([r for r in of_model if r.context == context])
        found += [_table(columns, context, d) for c, d in sorted(both, reverse=True) if c == context]
    return found


def _columns(rows: Sequence[Result]) -> dict[str, list[Result]]:
    """Perplexities by text, then shares of right answers by task."""
    several = len({r.text for r in rows if r.what == "accuracy"}) > 1
    losses, answers = ([r for r in rows if r.what == what] for what in ("perplexity", "accuracy"))
    return select.titled(losses, lambda r: f"perplexity, {r.text}") | select.titled(
        answers, lambda r: r.cell["task"].replace("_", "-") + (f", {r.text}" if several else "")
    )


def _table(columns: dict[str, list[Result]], context: int, density: float) -> Table:
    chosen = {name: [r for r in rows if r.kind == "dense" or r.density == density] for name, rows in columns.items()}
    every = [r for rows in chosen.values() for r in rows]
    body, sizes = [], set()
    for line, (row, *_) in select.by_line(every).items():
        cells = [[r for r in rows if r.line == line] for rows in chosen.values()]
        sizes |= {sum(r.n for r in rows) for rows in cells if rows and rows[0].what == "accuracy"}
        shares = select.ends(share for share in map(select.realised, cells) if share is not None)
        body.append([name_of(row), "1" if row.kind == "dense" else shares, *map(_cell, cells)])
    notes = [f"{' or '.join(map(str, sorted(sizes)))} documents a retrieval task."]
    title = f"Summary: density {density:g}, {context:,} tokens, {every[0].model}"
    return plain(title, ["method", "density", *columns], body, notes)


def _cell(rows: Sequence[Result]) -> Cell:
    if not rows:
        return Cell("")
    value = rows[-1].value if rows[0].what == "perplexity" else proportion(*select.right_answers(rows)).value
    return Cell(f"{value:.2f}", at=select.missed(rows))
