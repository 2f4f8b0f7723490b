"""Tables in Markdown: perplexity, retrieval and recall by way of choosing blocks and density."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seerattn.eval.results import Result
from seerattn.eval.statistics import proportion
from seerattn.report.finetuned import finetuned_markdown, is_finetuned
from seerattn.report.markdown import markdown
from seerattn.report.select import arms, asked, budget, group, last_rows_dense, paired, panels, perplexity_key
from seerattn.report.speed_table import speed_tables

CALIBRATED = "own policy"


def render_tables(results: Sequence[Result]) -> str:
    """All tables that the results allow, as Markdown."""
    finetuned = finetuned_markdown(results)
    results = [r for r in results if not is_finetuned(r)]
    parts = [*_perplexity(results), *_gap(results), *_retrieval(results), *_by_depth(results), *_recall(results)]
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
            note = f"{len(dense.samples['documents'])} documents, {dense.n} tokens; {note}"
        parts += [f"### Perplexity: {text}, {context} tokens, {model}{_of_time(panel)}", note, _grid(panel, cell)]
    return parts


def _gap(results: Sequence[Result]) -> list[str]:
    """How far each arm comes from streaming (0) to the oracle (1) at the same density, in perplexity."""
    parts = []
    rows = [r for r in results if r.what == "perplexity" and r.value is not None and not last_rows_dense(r)]
    rows = [r for r in rows if budget(r) == "density"]
    for (model, text, context, _), panel in panels(rows).items():
        floor = {r.density: r.value for r in panel if r.arm == "streaming"}
        ceiling = {r.density: r.value for r in panel if r.arm == "oracle"}
        between = [
            r for r in panel if r.selector == "gate" and floor.get(r.density, 0) > ceiling.get(r.density, float("inf"))
        ]
        if not between:
            continue

        def cell(rows: list[Result], floor: dict = floor, ceiling: dict = ceiling) -> str:
            (row,) = rows
            low, high = floor[row.density], ceiling[row.density]
            return f"{(low - row.value) / (low - high):.0%}"

        title = f"### Share of the gap from streaming to the oracle that is closed: {text}, {context} tokens, {model}"
        parts += [title, _grid(between, cell)]
    return parts


def _retrieval(results: Sequence[Result]) -> list[str]:
    def cell(rows: list[Result]) -> str:
        right, n = sum(round(r.value * r.n) for r in rows), sum(r.n for r in rows)
        share, error = proportion(right, n)
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
                parts += [title, f"{n} documents a cell; ± is the binomial standard error.", _grid(line, cell)]
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
                    label = "" if name == "dense" else _density(density)
                    values = [f"{line[d].value:.2f}" if d in line else "" for d in depths]
                    body.append([name, label, str(rows_dense) if name != "dense" else "", *values])
        head = ["selector", "density", "dense last rows", *(f"depth {d:g}" for d in depths)]
        parts += [f"### Pass keys by depth: {text}, {context} tokens, {model}{_of_time(panel)}", markdown(head, body)]
    return parts


def _recall(results: Sequence[Result]) -> list[str]:
    def cell(rows: list[Result]) -> str:
        (row,) = rows
        return f"{row.value:.3f}" if row.stderr is None else f"{row.value:.3f} ± {row.stderr:.3f}"

    titles = {"target_recall": "Recall of the target map", "mass_recall": "Recall of the attention mass"}
    parts = []
    rows = [r for r in results if r.what in titles and "layer" not in r.cell]
    for (what,), of_what in group(rows, "what").items():
        for (model, text, context, _), panel in panels(of_what).items():
            parts += [f"### {titles[what]}: {text}, {context} tokens, {model}{_of_time(panel)}", _grid(panel, cell)]
    return parts


def _grid(rows: Sequence[Result], cell: Callable[[list[Result]], str]) -> str:
    """A table with a row for each arm and a column for each nominal density, with the realised ones in the head."""
    dense = {1.0} if "dense" in arms(rows) else set()
    densities = sorted({asked(r) for r in rows if asked(r) is not None} | dense, reverse=True)
    own = any(r.arm != "dense" and asked(r) is None for r in rows)
    columns: list[float | None] = [*densities, *([None] if own else [])]
    head = ["selector", *(f"{_density(d)} {_realised(rows, d)}".rstrip() for d in columns)]
    body = []
    for arm in arms(rows):
        line = [r for r in rows if r.arm == arm]
        cells = [[r for r in line if (1.0 if arm == "dense" else asked(r)) == d] for d in columns]
        body.append([arm, *(cell(found) if found else "" for found in cells)])
    return markdown(head, body)


def _of_time(rows: Sequence[Result]) -> str:
    """Says that columns are shares of a time, where they are."""
    return ", by share of the time of dense attention" if any(budget(r) == "time" for r in rows) else ""


def _density(density: float | None) -> str:
    return CALIBRATED if density is None else f"{density:g}"


def _realised(rows: Sequence[Result], density: float | None) -> str:
    found = [r.realised_density for r in rows if r.arm != "dense" and asked(r) == density]
    if not found or None in found:
        return ""
    low, high = f"{min(found):.3f}", f"{max(found):.3f}"
    return f"({low})" if low == high else f"({low} to {high})"
