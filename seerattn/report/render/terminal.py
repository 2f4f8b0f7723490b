"""Tables in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Lines
from rich.text import Text

from seerattn.report.parts import Table
from seerattn.report.render.markdown import cell_text, column_text
from seerattn.report.select import latest
from seerattn.report.tables import runs, sections
from seerattn.results.record import Result
from seerattn.texts import visible

WIDTH = 160


def print_tables(results: Iterable[Result]) -> None:
    """Shows the tables of some results on stdout; what was run is left out."""
    # A file or a pipe has no width of its own. What is shown may come from anywhere, so nothing is marked up.
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    for section in sections(latest(results)):
        for part in section.parts if section.id != runs.ID else ():
            for table in part.by_group():
                _print(console, table)


def _print(console: Console, table: Table) -> None:
    # Columns that are empty here say nothing.
    used = [i for i in range(len(table.columns)) if any(cell_text(line.cells[i]) for line in table.lines)]
    lines = Lines(box=None, header_style="bold")
    lines.add_column(visible(table.label), no_wrap=True)
    for i in used:
        lines.add_column(visible(column_text(table.columns[i])), justify="left" if table.columns[i].text else "right")
    for line in table.lines:
        cells = (line.cells[i] for i in used)
        texts = [Text(visible(cell_text(cell)), "bold" if cell and cell.best else "") for cell in cells]
        lines.add_row(visible(line.name), *texts, style="yellow" if line.warned else None)
    console.print(f"\n{visible(table.title)}", style="bold", soft_wrap=True)
    console.print(lines)
    for note in table.notes:
        console.print(visible(note), style="dim")
