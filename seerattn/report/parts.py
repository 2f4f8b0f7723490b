"""What a report is made of: sections of tables and figures, still without any markup."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

# Stands near the beginning of every file that a report writes, and says that it may be replaced.
MARK = "Made by seerattn report"


@dataclass(frozen=True)
class Cell:
    """One cell of a table, as text.

    Attributes:
        text: the value.
        error: its standard error.
        at: realised density, where that is not the density of its column.
        more: a remark.
        note: number of a sentence below the table; 0 for none.
        best: the best of its column among those that may be compared, dense and oracle left out.
    """

    text: str
    error: str = ""
    at: str = ""
    more: str = ""
    note: int = 0
    best: bool = False


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        name: its name.
        group: the group that it belongs to, such as a context; "" for a column of its own.
        realised: densities of the cells that have that of the column, from the least to the greatest.
        text: whether it holds text, and not numbers.
    """

    name: str
    group: str = ""
    realised: str = ""
    text: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        name: its name.
        cells: a cell or None for each column.
        kind: title of the lines that it stands with.
        whole: its cells, in the first column of each group, hold for all columns of the group.
        warned: it carries a warning.
    """

    name: str
    cells: Sequence[Cell | None]
    kind: str = ""
    whole: bool = False
    warned: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: its title.
        label: head of the names of lines.
        columns: the other columns, those of their own before all groups.
        lines: its lines.
        notes: sentences on all of it.
        groups: groups of columns in their order, each with a sentence or "".
        letters: it is a map of layers by heads with a letter in each cell.
        dense: head of the column of cells that hold for a whole group, where it stands alone.
    """

    title: str
    label: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    letters: bool = False
    dense: str = "1"

    @property
    def spans(self) -> dict[int, tuple[str, int]]:
        """Each group with its number of columns, by its first column."""
        names = [column.group for column in self.columns]
        return {names.index(name): (name, names.count(name)) for name in self.groups}

    @property
    def kinds(self) -> dict[str, list[Line]]:
        """Lines by kind."""
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line.kind, []).append(line)
        return found

    def by_group(self) -> list[Table]:
        """A table for each group, where there is no room for several side by side.

        Cells that hold for the whole group get a column of their own, by default that of density 1.
        """
        return [self._part(*span) for span in self.spans.items()] or [self]

    def _part(self, first: int, span: tuple[str, int]) -> Table:
        name, count = span
        own = [i for i, column in enumerate(self.columns) if not column.group]
        of_group = range(first, first + count)
        of_group = [i for i in of_group if any(line.cells[i] for line in self.lines if not line.whole)]
        dense = any(line.whole and line.cells[first] for line in self.lines)
        lines = []
        for line in self.lines:
            cells = [None if line.whole else line.cells[i] for i in of_group]
            cells = [line.cells[first] if line.whole else None, *cells] if dense else cells
            if any(cells):
                lines.append(replace(line, cells=[*(line.cells[i] for i in own), *cells], whole=False))
        columns = [self.columns[i] for i in own] + [Column(self.dense)] * dense
        columns += [replace(self.columns[i], group="") for i in of_group]
        notes = [note for note in (self.groups[name], *self.notes) if note]
        return replace(self, title=f"{self.title}, {name}", columns=columns, lines=lines, notes=notes, groups={})


def plain(
    title: str,
    head: Sequence[str],
    body: Sequence[Sequence[str | Cell]],
    notes: Sequence[str] = (),
    *,
    texts: int = 1,
    warned: Collection[int] = (),
) -> Table:
    """A table without groups; a line of the body begins with its name.

    Args:
        title: its title.
        head: names of all columns.
        body: lines of cells.
        notes: sentences on it.
        texts: how many columns from the left hold text.
        warned: lines, by number, that carry a warning.
    """
    columns = [Column(name, text=i < texts) for i, name in enumerate(head)]
    lines = []
    for number, (name, *cells) in enumerate(body):
        cells = [Cell(cell) if isinstance(cell, str) else cell for cell in cells]
        lines.append(Line(str(name), cells, warned=number in warned))
    return Table(title, head[0], columns[1:], lines, notes)


@dataclass(frozen=True)
class Figure:
    """A figure that was written as .svg: the file, what it shows, and what to look for in it."""

    svg: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A section of a report: its anchor, its title, how to read it, and what is in it."""

    id: str
    title: str
    read: str
    parts: Sequence[Table | Figure] = ()
