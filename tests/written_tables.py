"""Tables as they stand on the project's pages, and the records that they were taken from."""

from pathlib import Path

from seerattn.results.file import read_results
from seerattn.results.record import Result

ROOT = Path(__file__).parents[1]


def text_of(page: str) -> str:
    """A page, by its place in the project."""
    return (ROOT / page).read_text(encoding="utf-8")


def table(page: str, head: str) -> list[list[str]]:
    """Cells of the table whose first line begins so, without bold letters; the head comes first."""
    lines = text_of(page).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")])
    return [rows[0], *rows[2:]]


def records(*names: str) -> list[Result]:
    """The rows of these files of records."""
    return read_results([ROOT / "research" / "records" / f"{name}.jsonl.xz" for name in names])
