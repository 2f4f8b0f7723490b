"""What the page is made of: sections of tables and figures, still without any HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seerattn.report.grid import Grid


@dataclass(frozen=True)
class Table:
    """A plain table; the first column of its body names the line.

    Attributes:
        title: its title, "" where the section's says it.
        head: names of the columns.
        body: lines of cells.
        notes: sentences below it.
        texts: how many columns from the left hold text; the others hold numbers.
        warned: lines of the body, by number, that carry a warning.
    """

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: int = 1
    warned: frozenset[int] = frozenset()
    type: str = "table"


@dataclass(frozen=True)
class Figure:
    """A figure that was written as .svg.

    Attributes:
        svg: the file.
        alt: what it shows, for those who do not see it.
        caption: what to look for in it.
    """

    svg: Path
    alt: str
    caption: str = ""
    type: str = "figure"


@dataclass(frozen=True)
class Letters:
    """A map of layers by heads with a letter and a number in each cell.

    Attributes:
        title: its title.
        heads: numbers of the columns.
        lines: a layer, and for each column (letter, long name, number) or None.
    """

    title: str
    heads: Sequence[int]
    lines: Sequence[tuple[int, Sequence[tuple[str, str, str] | None]]]
    type: str = "letters"


@dataclass(frozen=True)
class Lines:
    """Lines of code, folded away.

    Attributes:
        title: what they are.
        lines: the lines.
    """

    title: str
    lines: Sequence[str]
    type: str = "lines"


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: its anchor.
        title: its title.
        read: how to read it.
        parts: what is in it.
    """

    id: str
    title: str
    read: str
    parts: Sequence[Grid | Table | Figure | Letters | Lines]
