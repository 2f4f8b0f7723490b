"""The table that compares ways of choosing blocks: a line each, a column for each density and context or task."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from seerattn.report.select import KINDS, SAME_DENSITY, arms, asked, budget, kind, reached, realised
from seerattn.results.record import Result

# Columns that a landscape page holds; wider tables are cut between groups of columns.
WIDTH = 18
OWN_POLICY = "own policy"


class Measured(NamedTuple):
    """What a cell shows: a value, None where it is not finite, its standard error, None where it is not known, a
    remark, and whether the value is one at the density of its column."""

    value: float | None
    error: float | None = None
    more: str = ""
    equal: bool = True


@dataclass(frozen=True)
class Cell:
    """One cell, as text.

    Attributes:
        text: the value.
        error: its standard error.
        more: a remark.
        density: realised density; in the head of the column where all have the same.
        note: number of a sentence below the table; 0 for none.
        best: the best of its column among those that may be compared, dense and oracle left out.
        off: not compared, as its realised density is not that of its column.
    """

    text: str
    error: str = ""
    more: str = ""
    density: str = ""
    note: int = 0
    best: bool = False
    off: bool = False


@dataclass(frozen=True)
class Line:
    """One way of choosing blocks.

    Attributes:
        name: what it is called.
        blocks: sizes of query and key blocks in tokens, "" where they were not recorded.
        cells: a cell or None for each column; for the dense model one for each group of columns.
    """

    name: str
    blocks: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: its title.
        groups: names of the groups of columns, such as contexts, each with its nominal and realised densities.
        kinds: lines under the title of their kind.
        notes: sentences below it.
    """

    title: str
    groups: list[tuple[str, list[tuple[str, str]]]]
    kinds: list[tuple[str, list[Line]]]
    notes: list[str]
    type: str = "grid"

    @property
    def width(self) -> int:
        """Number of columns of values."""
        return sum(len(columns) for _, columns in self.groups)

    @property
    def firsts(self) -> list[int]:
        """The first column of each group."""
        return [sum(len(columns) for _, columns in self.groups[:i]) for i in range(len(self.groups))]


def compare(
    title: str,
    results: Iterable[Result],
    group: Callable[[Result], Hashable],
    measure: Callable[[Sequence[Result]], Measured],
    *,
    group_name: Callable[[Hashable], str],
    better: Literal["lower", "higher"],
    form: str,
    error_form: str | None = None,
    notes: Sequence[str] = (),
) -> list[Grid]:
    """Builds a table, cut into several where it is too wide for a page.

    Args:
        title: its title.
        results: rows of one model; dense ones fill the whole of their group.
        group: the group of columns that a result belongs to; groups are sorted by it.
        measure: what the results of one cell amount to.
        group_name: heading of a group.
        better: which values are best.
        form: format of a value, such as ".2f".
        error_form: format of its error, that of the value if it is not given.
        notes: sentences below the table.
    """
    results = list(results)
    columns: dict[Hashable, list[float | None]] = {}
    for r in results:
        found = columns.setdefault(group(r), [])
        if kind(r) != "dense" and asked(r) not in found:
            found.append(asked(r))
    for found in columns.values():
        found.sort(key=lambda density: math.inf if density is None else -density)
    columns = dict(sorted(columns.items()))
    cells: dict[tuple, tuple[Cell, Measured, Result]] = {}
    places: dict[tuple, list[Result]] = {}
    for r in results:
        places.setdefault((r.arm, group(r), None if kind(r) == "dense" else asked(r)), []).append(r)
    remarks: list[str] = []
    for place, rows in places.items():
        cells[place] = _cell(rows, measure(rows), (form, error_form or form), remarks)
    common = {}
    for name, densities in columns.items():
        for density in densities:
            _mark(cells, (name, density), better, form)
            common[name, density] = _common_density(cells, (name, density))
    notes = [*notes, *(f"[{number}] {remark}" for number, remark in enumerate(remarks, 1))]
    if any(cell.off for cell, _, _ in cells.values()):
        notes.append(f"* not compared: a realised density that it rests on is over {SAME_DENSITY:g} off its column.")
    parts = _cut(columns)
    return [
        Grid(
            title if len(parts) == 1 else f"{title} ({number} of {len(parts)})",
            [
                (group_name(name), [(density_label(d), common[name, d]) for d in densities] or [("1", "")])
                for name, densities in part.items()
            ],
            _lines(results, cells, part),
            notes,
        )
        for number, part in enumerate(parts, 1)
    ]


def density_label(density: float | None) -> str:
    """A nominal density as tables head their columns with it."""
    return OWN_POLICY if density is None else f"{density:g}"


def asked_label(result: Result) -> str:
    """What was asked of one result, as tables of single lines show it; "" for the dense model."""
    of_time = " of the time" if budget(result) == "time" else ""
    return "" if kind(result) == "dense" else density_label(asked(result)) + of_time


def _cell(
    rows: Sequence[Result], found: Measured, forms: tuple[str, str], remarks: list[str]
) -> tuple[Cell, Measured, Result]:
    """The cell of some rows; what they have to say is added to the remarks."""
    text = "not finite" if found.value is None else format(found.value, forms[0])
    error = "" if found.error is None else format(found.error, forms[1])
    share = realised(rows)
    density = "" if share is None else f"{share:.3f}"
    # Budgets of time have no density to reach, and policies of their own neither.
    missed = rows[-1].density is not None and budget(rows[-1]) == "density" and not reached(rows)
    # A note on a missed density would say what its star and its density say.
    note = None if missed else rows[-1].cell.get("note")
    if note and note not in remarks:
        remarks.append(note)
    number = remarks.index(note) + 1 if note else 0
    off = missed or not found.equal
    return Cell(text, error, found.more, density, number, off=off), found, rows[-1]


def _common_density(cells: dict[tuple, tuple[Cell, Measured, Result]], column: tuple) -> str:
    """The realised density that all cells of a column show, taken out of them; "" where they differ."""
    places = [place for place in cells if place[1:] == column and kind(cells[place][2]) != "dense"]
    shown = {cells[place][0].density for place in places}
    if len(shown) != 1:
        return ""
    for place in places:
        cells[place] = replace(cells[place][0], density=""), *cells[place][1:]
    return shown.pop()


def _mark(cells: dict[tuple, tuple[Cell, Measured, Result]], column: tuple, better: str, form: str) -> None:
    """Marks the best of a column among the cells that have its density."""
    places = [place for place in cells if place[1:] == column and kind(cells[place][2]) not in ("dense", "oracle")]
    values = {p: cells[p][1].value for p in places if not cells[p][0].off and cells[p][1].value is not None}
    if len(values) < 2:
        return
    best = min(values.values()) if better == "lower" else max(values.values())
    for place, value in values.items():
        # Equal as shown is equal.
        if format(value, form) == format(best, form):
            cells[place] = replace(cells[place][0], best=True), *cells[place][1:]


def _cut(columns: dict[Hashable, list]) -> list[dict[Hashable, list]]:
    parts: list[dict[Hashable, list]] = [{}]
    for name, densities in columns.items():
        if parts[-1] and sum(map(len, parts[-1].values())) + len(densities) > WIDTH:
            parts.append({})
        parts[-1][name] = densities
    return parts


def _lines(results: Sequence[Result], cells: dict, part: dict[Hashable, list]) -> list[tuple[str, list[Line]]]:
    lines: dict[str, list[Line]] = {}
    for arm in arms(results):
        rows = [r for r in results if r.arm == arm]
        if kind(rows[0]) == "dense":
            found = [cells.get((arm, name, None), (None,))[0] for name in part]
        else:
            found = [cells.get((arm, name, d), (None,))[0] for name, densities in part.items() for d in densities]
        if any(found):
            sizes = sorted({(r.cell["block_q"], r.cell["block_k"]) for r in rows if "block_k" in r.cell})
            blocks = ", ".join(f"{q}x{k}" for q, k in sizes)
            lines.setdefault(KINDS[kind(rows[0])], []).append(Line(arm, blocks, found))
    return list(lines.items())
