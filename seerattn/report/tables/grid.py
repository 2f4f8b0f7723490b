"""Tables that compare methods: a line each, a column for each density and context or task."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from seerattn.report import select
from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Column, Line, Table
from seerattn.results.record import Result

_BUDGETS = {
    "density": "",
    "time": ", by share of the time of dense attention",
    "tokens": ", decoding after a dense prompt, by tokens that a decoded one may read",
}


class Measured(NamedTuple):
    """What a cell shows: a value, None where it is not finite, its standard error, None where it is not known, a
    remark, and whether the value is one at the density of its column."""

    value: float | None
    error: float | None = None
    more: str = ""
    equal: bool = True


class _Shown(NamedTuple):
    cell: Cell
    value: float | None
    rows: Sequence[Result]
    off: bool


def compare(
    title: str,
    results: Iterable[Result],
    measure: Callable[[Sequence[Result]], Measured],
    *,
    better: Literal["lower", "higher"],
    form: str,
    error_form: str = "",
    group_of: Callable[[Result], Hashable] = lambda r: r.context,
    group_name: Callable[[Hashable], str] = lambda context: f"{context:,} tokens",
    group_notes: Mapping[Hashable, str] = {},
    notes: Sequence[str] = (),
) -> Table:
    """The table of some results.

    Args:
        title: its title.
        results: rows of one model; dense ones hold for the whole of their group.
        measure: what the results of one cell amount to.
        better: which values are best.
        form: format of a value, such as ".2f".
        error_form: format of its error, that of the value if it is not given.
        group_of: the group of columns that a result belongs to; groups are sorted by it.
        group_name: heading of a group.
        group_notes: sentences on groups.
        notes: sentences on all.
    """
    results = list(results)
    lines = select.by_line(results)
    remarks: list[str] = []
    found: dict[str, dict[tuple, _Shown]] = {}
    for line, rows in lines.items():
        places = select.group(rows, lambda r: (group_of(r), None if r.kind == "dense" else select.asked(r)))
        found[line] = {
            place: _show(of, measure(of), (form, error_form or form), remarks) for place, of in places.items()
        }
    columns, groups, keys = [], {}, []
    for name, rows in sorted(select.group(results, group_of).items()):
        densities = {select.asked(r) for r in rows if r.kind != "dense"} or {1.0}
        shown = []
        for density in sorted(densities, key=lambda d: math.inf if d is None else -d):
            key = name, density
            column = {line: of[key] for line, of in found.items() if key in of and lines[line][0].kind != "dense"}
            for line in _best(column, better, form):
                found[line][key] = column[line]._replace(cell=replace(column[line].cell, best=True))
            near = [select.realised(of.rows) for of in column.values() if not of.cell.at]
            realised = select.ends(share for share in near if share is not None)
            columns.append(Column(select.density_label(density), group_name(name), realised))
            keys.append((key, (name, None) if not shown else None))
            shown += column.values() or [None]
        counted = [of.off for of in shown if of is not None and (of.off or not of.cell.at)]
        groups[group_name(name)] = " ".join(filter(None, [group_notes.get(name, ""), _count_off(counted)]))
    body = []
    for line, (row, *_) in lines.items():
        whole = row.kind == "dense"
        shown = [found[line].get(key[whole]) for key in keys]
        body.append(Line(name_of(row), [of and of.cell for of in shown], select.KINDS[row.kind], whole))
    notes = [*notes, *_sizes(lines), *(f"[{number}] {remark}" for number, remark in enumerate(remarks, 1))]
    decoded = any(select.budget(r) == "tokens" for r in results)
    return Table(title, "method", columns, body, notes, groups, dense="all tokens" if decoded else "1")


def _show(rows: Sequence[Result], found: Measured, forms: tuple[str, str], remarks: list[str]) -> _Shown:
    """The cell of some rows; what they have to say is added to the remarks."""
    row, share = rows[-1], select.realised(rows)
    # Budgets of time have no density to reach, and policies of their own neither.
    free = row.density is None or select.budget(row) != "density"
    missed = not free and not select.reached(rows)
    off = row.kind != "dense" and (missed or not found.equal)
    # A note on a missed density would say what the cell says.
    note = None if missed else row.cell.get("note")
    if note and note not in remarks:
        remarks.append(note)
    cell = Cell(
        "not finite" if found.value is None else format(found.value, forms[0]),
        "" if found.error is None else format(found.error, forms[1]),
        f"{share:.3f}" if share is not None and (off or free) else "",
        found.more,
        remarks.index(note) + 1 if note else 0,
    )
    return _Shown(cell, found.value, rows, off)


def _best(column: Mapping[str, _Shown], better: str, form: str) -> list[str]:
    """The lines that are best in a column among those that have its density."""
    able = {line: of for line, of in column.items() if not of.off and of.rows[0].kind != "oracle"}
    values = {line: of.value for line, of in able.items() if of.value is not None}
    if len(values) < 2:
        return []
    best = format((min if better == "lower" else max)(values.values()), form)
    # Equal as shown is equal.
    return [line for line, value in values.items() if format(value, form) == best]


def _count_off(off: Sequence[bool]) -> str:
    if not any(off):
        return ""
    near = f"{off.count(False)} of {len(off)} cells are within {select.SAME_DENSITY:g} of the density of their column"
    return f"{near}; the others, with “at”, say what they computed."


def _sizes(lines: Mapping[str, Sequence[Result]]) -> list[str]:
    """Sizes of blocks, where they are not those of all."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for rows in lines.values():
        for size in sorted({(r.cell["block_q"], r.cell["block_k"]) for r in rows if "block_k" in r.cell}):
            sizes.setdefault(size, []).append(name_of(rows[0]))
    others = [f"{q} x {k} of {', '.join(of)}" for (q, k), of in sizes.items() if (q, k) != (select.BLOCK, select.BLOCK)]
    return [f"Blocks have 64 x 64 tokens, those {' and '.join(others)}."] if others else []


def side_by_side(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    """Rows that may share a table with the contexts side by side, each with a title.

    Where one context was measured on several sets of documents, each set beyond the first has a table of its own.
    """
    merged: dict[tuple, list[Result]] = {}
    taken: dict[tuple, int] = {}
    for (model, text, context, rest), rows in select.panels(results).items():
        place = model, text, rest.split(" ", 1)[0], context
        taken[place] = number = taken.get(place, -1) + 1
        merged.setdefault((*place[:3], number), []).extend(rows)
    return [part for rows in merged.values() for part in by_setting(rows)]


def by_setting(rows: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Rows cut apart by budget and dense last rows, with titles; dense rows stand in every part."""
    dense = [r for r in rows if r.kind == "dense"]
    sparse = (r for r in rows if r.kind != "dense")
    parts = select.group(sparse, lambda r: (select.budget(r), select.last_rows_dense(r))) or {("density", 0): []}
    found = []
    for (of, last), part in sorted(parts.items()):
        kept = f", last {last} query-block rows dense" if last else ", no dense last rows"
        kept = "" if of == "tokens" else kept
        found.append((f"{rows[0].text}, {rows[0].model}{kept}{_BUDGETS[of]}", [*dense, *part]))
    return found
