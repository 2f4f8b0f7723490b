"""Sections and tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from seerattn.report.parts import Cell, Column, Section, Table
from seerattn.texts import in_markdown


def render_sections(sections: Sequence[Section]) -> str:
    """All sections that have tables, their figures left out."""
    blocks: list[str] = []
    for section in sections:
        tables = [table for part in section.parts if isinstance(part, Table) for table in part.by_group()]
        blocks += [f"## {section.title}", in_markdown(section.read)] if tables else []
        blocks += [block for table in tables for block in (heading(table, 3), render_table(table))]
    return "\n\n".join(blocks) + "\n"


def heading(table: Table, level: int) -> str:
    """The title of a table as a heading."""
    return f"{'#' * level} {in_markdown(table.title)}"


def render_table(table: Table) -> str:
    """The notes and the lines of a table without groups."""
    marks = ["---", *("---" if column.text else "---:" for column in table.columns)]
    head = [table.label, *map(column_text, table.columns)]
    lines = [head, *([line.name, *map(cell_text, line.cells)] for line in table.lines)]
    rows = [list(map(in_markdown, line)) for line in lines]
    rows.insert(1, marks)
    return "\n\n".join([*map(in_markdown, table.notes), "\n".join(f"| {' | '.join(row)} |" for row in rows)])


def column_text(column: Column) -> str:
    """The head of a column, with the realised densities of its cells."""
    return column.name + (f" ({column.realised})" if column.realised else "")


def cell_text(cell: Cell | None) -> str:
    """A cell with all that it says, in one line."""
    if cell is None:
        return ""
    error, at = f" ± {cell.error}" if cell.error else "", f" at {cell.at}" if cell.at else ""
    return cell.text + error + at + (f" ({cell.more})" if cell.more else "") + (f" [{cell.note}]" if cell.note else "")
