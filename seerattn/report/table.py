"""Tables in Markdown: perplexity, retrieval and recall by way of choosing blocks and density."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seerattn.report.cost import cost_tables
from seerattn.report.finetuned import finetuned_markdown, is_finetuned
from seerattn.report.gap import closed, is_ceiling
from seerattn.report.grid import density_label
from seerattn.report.markdown import at, markdown
from seerattn.report.select import (
    SAME_DENSITY,
    SHARE_ERROR,
    arms,
    asked,
    budget,
    group,
    last_rows_dense,
    paired,
    panels,
    perplexity_key,
    realised,
    right_answers,
)
from seerattn.report.speed_table import speed_tables
from seerattn.report.summary import summary_tables
from seerattn.results.record import Result, with_texts
from seerattn.results.statistics import proportion
from seerattn.texts import in_markdown


def render_tables(results: Sequence[Result]) -> str:
    """All tables that the results allow, as Markdown."""
    results = [with_texts(r, in_markdown) for r in results]
    finetuned = finetuned_markdown(results)
    results = [r for r in results if not is_finetuned(r)]
    tables = [*summary_tables(results), *cost_tables(results)]
    parts = [part for t in tables for part in (f"### {t.title}", *t.notes, markdown(t.head, t.body))]
    parts += [*_perplexity(results), *_gap(results), *_retrieval(results), *_by_depth(results), *_recall(results)]
    parts += [*finetuned, *speed_tables(results)]
    return "\n\n".join(parts) + "\n"


def _perplexity(results: Sequence[Result]) -> list[str]:
    errors = paired(results)

    def cell(rows: list[Result]) -> str:
        (row,) = rows
        error = errors.get(perplexity_key(row))
        value = "not finite" if row.value is None else f"{row.value:.2f}"
        return value if error is None else f"{value} ± {error:.2f}"

    parts = []
    rows = [r for r in results if r.what == "perplexity" and not last_rows_dense(r)]
    for (model, text, context, _), panel in panels(rows).items():
        dense = next((r for r in panel if r.arm == "dense"), None)
        note = "± is the standard error of the paired difference from dense, over documents."
        if dense is not None:
            note = f"{len(dense.samples.get('documents', ()))} documents, {dense.n} tokens; {note}"
        parts += [f"### Perplexity: {text}, {context} tokens, {model}{_of_time(panel)}", *_grid(panel, cell, note)]
    return parts


def _gap(results: Sequence[Result]) -> list[str]:
    """How far each gate comes from streaming (0) to the oracle (1) at the same density, in perplexity."""
    parts = []
    rows = [r for r in results if r.what == "perplexity" and r.value is not None and not last_rows_dense(r)]
    rows = [r for r in rows if budget(r) == "density"]
    for (model, text, context, _), panel in panels(rows).items():
        between = [r for r in panel if r.selector == "gate" and closed(r, panel)]
        if not between:
            continue

        def cell(rows: list[Result], panel: list[Result] = panel) -> str:
            return f"{closed(rows[0], panel).share:.0%}"

        def ends(rows: list[Result], panel: list[Result] = panel) -> str:
            other = closed(rows[0], panel).ends
            return at(rows) if other is None else f" at {realised(rows):.3f}, ends at {other:.3f}"

        best = {r.density: closed(r, panel).oracle for r in between if r.density is not None}
        several = len({r.arm for r in panel if is_ceiling(r)}) > 1
        to = "the best oracle" if several else "the oracle"
        note = f"The best: {', '.join(f'{best[d]} at {d:g}' for d in sorted(best, reverse=True))}." if several else ""
        title = f"### Share of the gap from streaming to {to} that is closed: {text}, {context} tokens, {model}"
        parts += [title, *_grid(between, cell, note, where=ends, who="they, or the ends of their gap,")]
    return parts


def _retrieval(results: Sequence[Result]) -> list[str]:
    def cell(rows: list[Result]) -> str:
        share, error = proportion(*right_answers(rows))
        return f"{share:.2f} ± {error:.2f}"

    parts = []
    rows = [r for r in results if r.what == "accuracy"]
    options = sorted({last_rows_dense(r) for r in rows if r.arm != "dense"}) or [0]
    for task in sorted({r.cell["task"] for r in rows}):
        of_task = [r for r in rows if r.cell["task"] == task]
        for (model, text, context, _), panel in panels(of_task).items():
            for option in options:
                # The dense model has no last rows of its own: its row stands in every table.
                line = [r for r in panel if r.arm == "dense" or last_rows_dense(r) == option]
                kept = f"last {option} query-block rows dense" if option else "no dense last rows"
                n = sum(r.n for r in line if (r.arm, asked(r)) == (line[0].arm, asked(line[0])))
                place = f"{text}, {context} tokens, {kept}, {model}{_of_time(line)}"
                title = f"### Retrieval, {task.replace('_', '-')}: {place}"
                parts += [title, *_grid(line, cell, f"{n} documents a cell; {SHARE_ERROR}")]
    return parts


def _by_depth(results: Sequence[Result]) -> list[str]:
    rows = [r for r in results if r.what == "accuracy" and "depth" in r.cell]
    parts = []
    for (model, text, context, _), panel in panels(rows).items():
        depths = sorted({r.cell["depth"] for r in panel})
        lines: dict[tuple, dict[float, Result]] = {}
        for r in panel:
            lines.setdefault((r.arm, asked(r), last_rows_dense(r)), {})[r.cell["depth"]] = r
        body = []
        for arm in arms(panel):
            for (name, density, rows_dense), line in lines.items():
                if name == arm:
                    label = "" if name == "dense" else density_label(density) + at(list(line.values()))
                    values = [f"{line[d].value:.2f}" if d in line else "" for d in depths]
                    body.append([name, label, str(rows_dense) if name != "dense" else "", *values])
        head = ["selector", "density", "dense last rows", *(f"depth {d:g}" for d in depths)]
        parts += [f"### Pass keys by depth: {text}, {context} tokens, {model}{_of_time(panel)}", markdown(head, body)]
    return parts


def _recall(results: Sequence[Result]) -> list[str]:
    def cell(rows: list[Result]) -> str:
        (row,) = rows
        value = "not finite" if row.value is None else f"{row.value:.3f}"
        return value if row.stderr is None else f"{value} ± {row.stderr:.3f}"

    titles = {"target_recall": "Recall of the target map", "mass_recall": "Recall of the attention mass"}
    parts = []
    rows = [r for r in results if r.what in titles and "layer" not in r.cell]
    for (what,), of_what in group(rows, "what").items():
        for (model, text, context, _), panel in panels(of_what).items():
            parts += [f"### {titles[what]}: {text}, {context} tokens, {model}{_of_time(panel)}", *_grid(panel, cell)]
    return parts


def _grid(
    rows: Sequence[Result],
    cell: Callable[[list[Result]], str],
    note: str = "",
    where: Callable[[list[Result]], str] = at,
    who: str = "they",
) -> list[str]:
    """Notes and a table with a row for each arm and a column for each nominal density.

    Args:
        rows: what stands in the table.
        cell: text of the results of one cell.
        note: a sentence above the table.
        where: what a cell says of its density, "" where that is the density of its column.
        who: whose density that is.
    """
    dense = {1.0} if "dense" in arms(rows) else set()
    densities = sorted({asked(r) for r in rows if asked(r) is not None} | dense, reverse=True)
    own = any(r.arm != "dense" and asked(r) is None for r in rows)
    columns: list[float | None] = [*densities, *([None] if own else [])]
    found: dict[tuple, list[Result]] = {}
    for r in rows:
        found.setdefault((r.arm, 1.0 if r.arm == "dense" else asked(r)), []).append(r)
    places = {place: where(rows) for place, rows in found.items()}
    equal = {place: rows for place, rows in found.items() if place[0] != "dense" and not places[place]}
    head = ["selector", *(_head([rows for (_, d), rows in equal.items() if d == column], column) for column in columns)]
    body = [
        [arm, *(cell(found[arm, d]) + places[arm, d] if (arm, d) in found else "" for d in columns)]
        for arm in arms(rows)
    ]
    notes = [note] if note else []
    asked_for = [place for place, rows in found.items() if place[0] != "dense" and rows[0].density is not None]
    if any(places[place] for place in asked_for):
        notes.append(
            f"{sum(not places[place] for place in asked_for)} of {len(asked_for)} cells are within {SAME_DENSITY:g} of "
            f"the density of their column; the others say what {who} computed."
        )
    return [*notes, markdown(head, body)]


def _of_time(rows: Sequence[Result]) -> str:
    """Says that columns are shares of a time, where they are."""
    return ", by share of the time of dense attention" if any(budget(r) == "time" for r in rows) else ""


def _head(cells: Sequence[list[Result]], density: float | None) -> str:
    """Heading of a column: what was asked for, and what the cells that have it computed."""
    found = [f"{realised(rows):.3f}" for rows in cells if realised(rows) is not None]
    ends = dict.fromkeys((min(found), max(found))) if found else ()
    return density_label(density) + (f" ({' to '.join(ends)})" if ends else "")
