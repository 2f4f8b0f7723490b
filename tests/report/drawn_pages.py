"""Tables and figures of pages that are drawn from records: what they must be, and a command that makes them so.

    python tests/report/drawn_pages.py

A page holds a table between two comments, which name the files of records in research/records, the first of which
that is there counts, and the beginning of the table's title in what ``seerattn report`` writes of it:

    <!-- drawn from smollm2-gates or smollm2-targets: In short -->
    <!-- end -->
"""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from seerattn.report import write_report
from seerattn.report.cost import BRIEF
from seerattn.report.select import latest
from seerattn.report.table import render_tables
from seerattn.results.file import read_results

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "research" / "records"
PAGES = ("README.md", "docs/results.md", "docs/targets.md")
# A figure of a report, and the records that it is drawn from.
FIGURES = {
    "docs/figures/smollm2.png": ("teachers.png", "smollm2-gates or smollm2-targets"),
    "docs/figures/targets.png": ("teachers.png", "smollm2-targets"),
}
NONE = "No records yet."
_BLOCK = re.compile(r"(<!-- drawn from ([^:]+): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def records_of(names: str) -> Path | None:
    """The first of the files "a or b" that is there."""
    paths = [RECORDS / f"{name}.jsonl" for name in names.split(" or ")]
    return next((path for path in paths if path.exists()), None)


def redrawn(text: str) -> str:
    """A page with its tables as they are drawn from the records that are there."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{_section(block[2], block[3])}\n\n{block[4]}", text)


def titles(text: str) -> list[str]:
    """Beginnings of the titles of the tables of a page."""
    return [block[3] for block in _BLOCK.finditer(text)]


def _section(names: str, title: str) -> str:
    path = records_of(names)
    if path is None:
        return NONE
    parts = _tables(path).split("### ")
    (found,) = [part for part in parts if part.startswith(title)]
    drawn = found.partition("\n")[2].strip()
    return drawn if title != BRIEF else f"{drawn}\n\nMade by {_commands(path)}."


@cache
def _commands(path: Path) -> str:
    """The commands that wrote a file of records, but for their limits of time: what they left undone others did."""
    commands = (re.sub(r" --time-limit \S+", "", r.command) for r in read_results([path]))
    return " and ".join(f"`{command}`" for command in dict.fromkeys(commands))


@cache
def _tables(path: Path) -> str:
    return render_tables(latest(read_results([path])))


def main() -> None:
    """Writes all tables and figures anew, and says of each file whether it changed."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(redrawn(text), encoding="utf-8")
        print(page, "as it was" if redrawn(text) == text else "changed")
    for figure, (name, names) in FIGURES.items():
        with TemporaryDirectory() as folder:
            write_report([records_of(names)], Path(folder))
            shutil.copyfile(Path(folder) / name, ROOT / figure)
        print(figure, "from", records_of(names).name)


if __name__ == "__main__":
    main()
