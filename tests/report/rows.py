"""Results written by hand: what a line is called says which method it is of."""

from pathlib import Path
from typing import Any

from seerattn.report.parts import Section, Table
from seerattn.report.render.markdown import cell_text, column_text
from seerattn.report.select import latest
from seerattn.report.tables import sections
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

KINDS = {"dense": "dense", "oracle": "oracle"}
KINDS |= dict.fromkeys(("streaming", "random", "a_shape", "tri_shape"), "static")
KINDS |= dict.fromkeys(
    ("minference", "vertical_slash", "xattention", "flexprefill", "moa", "mean_pooled"), "training-free"
)
PER_HEAD = ", budgets per head"


def of(name: str) -> dict[str, Any]:
    """Method, kind, name and settings of a line; what is no method is the name of gates."""
    method = next((id for id in KINDS if name == id or name.startswith((f"{id} ", f"{id},"))), "gate")
    form = name.removesuffix(PER_HEAD).removeprefix("oracle").strip() if method == "oracle" else ""
    settings: dict[str, Any] = {"target": form} if ":" in form else {}
    settings |= {"budgets": "b7e1"} if name.endswith(PER_HEAD) else {}
    # Gates have one name, whatever their budgets; the report tells them apart.
    named = name.removesuffix(PER_HEAD) if method == "gate" else name
    return {"method": method, "kind": KINDS.get(method, "learned"), "name": named, "settings": settings}


def written(path: Path, rows: list[Result]) -> Path:
    """The rows as a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = ResultsFile(path)
    for row in rows:
        file.append(row)
    return path


def tables(rows: list[Result]) -> dict[str, Table]:
    """Every table of a report of these rows, for each group of columns its own, by title."""
    parts = [part for section in sections(latest(rows)) for part in section.parts]
    return {table.title: table for part in parts for table in part.by_group()}


def section(rows: list[Result], id: str) -> Section:
    """A section of a report of these rows."""
    return next(found for found in sections(latest(rows)) if found.id == id)


def lines(table: Table) -> list[list[str]]:
    """A table without groups, as text, with its head."""
    head = [table.label, *map(column_text, table.columns)]
    return [head, *([line.name, *map(cell_text, line.cells)] for line in table.lines)]
