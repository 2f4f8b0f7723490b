"""Systems by tasks: what each changes beside dense attention, in one table a density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from seerattn.report import select
from seerattn.report.benchmarks import tokens
from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Column, Line, Table
from seerattn.results.record import Result

# Metrics of this package: what a table of them is called, and what its values are.
_OURS = {
    "log_prob_per_token": ("Right answers", "Log-probability of a token of the right answer, nats"),
    "first_choice": ("First choices", "Share of right answers each token of which is the most probable one"),
}
_WRITTEN = ("Scores", "Score of what was written")


def grids(guards: Sequence[Result]) -> list[Table]:
    """Tables of one model where several systems did several tasks.

    Metrics of how likely right answers are have tables of their own, before scores of written ones.

    Args:
        guards: differences from dense.
    """
    found = []
    parts = select.group(
        select.at_density(guards, "task_guard"), lambda r: (_OURS.get(r.cell["metric"], _WRITTEN), r.density)
    )
    order = [*_OURS.values(), _WRITTEN]
    for (kind, density), rows in sorted(parts.items(), key=lambda part: (order.index(part[0][0]), -part[0][1])):
        ordered = sorted(rows, key=lambda r: (r.context, r.cell["task"], r.cell["metric"]))
        columns, lines = select.group(ordered, _column), select.by_line(rows)
        if len(columns) > 1 and len(lines) > 1:
            title = f"{kind[0]} beside dense: {rows[0].model}, density {density:g}"
            found.append(_grid(title, kind[1], columns, lines))
    return found


def _grid(
    title: str, what: str, columns: Mapping[str, Sequence[Result]], lines: Mapping[str, Sequence[Result]]
) -> Table:
    dense = [of[0].samples["dense"][0] for of in columns.values()]
    values = [*dense, None if None in dense else fmean(dense)]
    body = [Line("dense", [None if value is None else Cell(f"{value:.2f}") for value in values], select.KINDS["dense"])]
    for rows in lines.values():
        of = {_column(r): r for r in rows}
        cells = [_beside(of[name]) if name in of else None for name in columns]
        body.append(Line(name_of(rows[0]), [*cells, _mean(rows) if all(cells) else None], select.KINDS[rows[0].kind]))
    heads = []
    for name, of in columns.items():
        heads.append(Column(name, realised=select.ends(r.realised_density for r in of if _met(r))))
    counts = [r.n for of in columns.values() for r in of]
    notes = [
        f"{what}: of the dense model itself, of the others less its own. ± is the standard error of the paired "
        "difference, over documents. * is a difference that is significant at the level of 5%; where nothing differs, "
        "one in twenty is by chance.",
        f"{' to '.join(dict.fromkeys((str(min(counts)), str(max(counts)))))} documents a task and length.",
    ]
    return Table(title, "method", [*heads, Column("mean")], body, notes)


def _met(row: Result) -> bool:
    return row.realised_density is not None and select.reached([row])


def _beside(row: Result) -> Cell:
    error = "" if row.stderr is None else f"{row.stderr:.2f}"
    return Cell(f"{row.value:+.2f}{'*' if 'note' in row.cell else ''}", error, select.missed([row]))


def _mean(rows: Sequence[Result]) -> Cell:
    """Of all tasks and lengths, which have documents of their own."""
    errors = [r.stderr for r in rows]
    error = "" if None in errors else f"{math.hypot(*errors) / len(errors):.2f}"
    return Cell(f"{fmean(r.value for r in rows):+.2f}", error, select.missed(rows))


def _column(row: Result) -> str:
    name = row.cell["task"].removeprefix("local_").removeprefix("ruler_").removeprefix("niah_")
    # RULER's metrics are called by the length, and those of ours have tables of their own.
    metric = "" if row.cell["metric"] in (*_OURS, str(row.context)) else f", {row.cell['metric']}"
    return f"{name}{metric} {tokens(row.context)}".replace("_", " ")
