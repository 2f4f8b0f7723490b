"""`seerattn report`: a page, tables and figures from results files, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[list[Path], typer.Argument(help="Results (.jsonl, also compressed), and block maps (.npz).")],
    output: Annotated[Path, typer.Option(help="Folder for report.html, table.md and the figures.")] = Path("report"),
) -> None:
    """Make a page, tables and figures from results.

    report.html holds everything and needs no network; open it in a browser.
    """
    from seerattn.report import write_report
    from seerattn.texts import visible

    for path in write_report(results, output):
        typer.echo(visible(str(path)))
