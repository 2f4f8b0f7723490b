"""Summary: perplexity and retrieval side by side, a line for each way of choosing blocks, a table for each density."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seerattn.report.markdown import at
from seerattn.report.parts import Section, Table
from seerattn.report.select import SAME_DENSITY, arms, budget, kind, last_rows_dense, panels, realised, right_answers
from seerattn.results.record import Result
from seerattn.results.statistics import proportion

Columns = dict[str, list[Result]]


def summary_tables(results: Iterable[Result]) -> list[Table]:
    """Tables of the longest context and of every density that have both perplexity and retrieval; none without.

    Dense last rows are left out: they would be a measurement of the question, see `quality.retrieval_section`.
    """
    rows = [r for r in results if r.what in ("perplexity", "accuracy") and r.value is not None]
    groups: dict[tuple, list[Result]] = {}
    for r in rows:
        if budget(r) == "density" and not last_rows_dense(r):
            groups.setdefault((r.model, r.weights.get("model")), []).append(r)
    return [table for rows in groups.values() for table in _tables(rows)]


def summary_section(results: Iterable[Result]) -> Section | None:
    """The summary as a section of the page."""
    read = (
        "Perplexity (lower is better) beside the share of right answers (higher is better), at the longest context "
        "that has both. Standard errors stand in the tables of each quantity below."
    )
    tables = summary_tables(results)
    return Section("summary", "Summary", read, tables) if tables else None


def _tables(rows: Sequence[Result]) -> list[Table]:
    places = {(r.what, r.context, r.density) for r in rows if kind(r) != "dense"}
    both = [(c, d) for what, c, d in places if what == "perplexity" and d is not None and ("accuracy", c, d) in places]
    if not both:
        return []
    context = max(c for c, _ in both)
    columns = _columns([r for r in rows if r.context == context])
    return [_table(columns, context, d) for d in sorted((d for c, d in both if c == context), reverse=True)]


def _columns(rows: Sequence[Result]) -> Columns:
    """Perplexities by text, then shares of right answers by task; sets of other documents have columns of their own."""
    columns: Columns = {}
    texts = {r.text for r in rows if r.what == "accuracy"}
    for what in ("perplexity", "accuracy"):
        found: list[tuple[str, list[Result]]] = []
        for (_, text, _, _), panel in panels([r for r in rows if r.what == what]).items():
            if what == "perplexity":
                found.append((f"perplexity, {text}", panel))
                continue
            for task in {r.cell["task"] for r in panel}:
                name = task.replace("_", "-") + (f", {text}" if len(texts) > 1 else "")
                found.append((name, [r for r in panel if r.cell["task"] == task]))
        for name, panel in sorted(found, key=lambda column: column[0]):
            number = sum(other == name or other.startswith(f"{name} (") for other in columns)
            columns[f"{name} ({number + 1})" if number else name] = panel
    return columns


def _table(columns: Columns, context: int, density: float) -> Table:
    chosen = {name: [r for r in rows if kind(r) == "dense" or r.density == density] for name, rows in columns.items()}
    every = [r for rows in chosen.values() for r in rows]
    body, sizes = [], set()
    for arm in arms(every):
        line = [[r for r in rows if r.arm == arm] for rows in chosen.values()]
        sizes |= {sum(r.n for r in rows) for rows in line if rows and rows[0].what == "accuracy"}
        body.append([arm, _density(line), *map(_cell, line)])
    notes = [
        f"No dense last rows; {' or '.join(map(str, sorted(sizes)))} documents a retrieval task.",
        "Density: realised, the least and the greatest of the line. "
        f'A cell with "at" is over {SAME_DENSITY:g} off what was asked for.',
    ]
    title = f"Summary: density {density:g}, {context} tokens, {every[0].model}"
    return Table(title, ["selector", "density", *columns], body, notes)


def _density(line: Sequence[Sequence[Result]]) -> str:
    """The realised densities of a line, from the least to the greatest."""
    if any(kind(r) == "dense" for rows in line for r in rows):
        return "1"
    found = [f"{share:.3f}" for share in map(realised, line) if share is not None]
    return " to ".join(dict.fromkeys((min(found), max(found)))) if found else ""


def _cell(rows: Sequence[Result]) -> str:
    if not rows:
        return ""
    where = "" if kind(rows[0]) == "dense" else at(rows)
    if rows[0].what == "perplexity":
        return f"{rows[-1].value:.2f}{where}"
    return f"{proportion(*right_answers(rows)).value:.2f}{where}"
