"""Draws the tables and figures of the pages from research/records.

    .venv/bin/python docs/draw_pages.py            # writes them anew, and says of each file whether it changed
    .venv/bin/python docs/draw_pages.py --check    # writes nothing; exit code 1 where a table would change

A table stands between two comments, the first of which has its name in `docs/page_tables.py`:

    <!-- drawn: smollm2-in-short -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))
from page_tables import FIGURES, ROOT, TABLES, path

from seerattn.report import write_report
from seerattn.report.render.markdown import heading, render_table

PAGES = ("README.md", "docs/results.md", "docs/targets.md", "docs/comparison.md", "docs/speed.md", "docs/finetuning.md")
PAGES += ("docs/ablation.md", "docs/tasks.md", "docs/decoding.md", "docs/howto/decode.md")
_BLOCK = re.compile(r"(?<=<!-- drawn: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def redrawn(page: str, text: str) -> str:
    """The text of a page with its tables as they are drawn from the records."""
    return _BLOCK.sub(lambda block: f"{block[1]}{block[2]}\n{_drawn(block[1], Path(page).parent)}\n\n", text)


def names(text: str) -> list[str]:
    """Names of the tables of a page."""
    return [block[1] for block in _BLOCK.finditer(text)]


def _drawn(name: str, folder: Path) -> str:
    sources = [path(record) for record in (*TABLES[name].records, *TABLES[name].raw)]
    links = [f"[{p.name}]({Path(os.path.relpath(p, ROOT / folder)).as_posix()})" for p in sources]
    return f"{_tables(name)}\n\nDrawn from {', '.join(links)}."


@cache
def _tables(name: str) -> str:
    tables = TABLES[name].tables()
    if not tables:
        raise ValueError(f"{name} must be a table of its records, got none; mend its title in docs/page_tables.py")
    blocks = [block for t in tables for block in ([heading(t, 3)] * (len(tables) > 1) + [render_table(t)])]
    return "\n\n".join(blocks)


def draw_figures() -> None:
    """Writes all figures anew."""
    reports: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for figure, (file, records) in FIGURES.items():
        reports.setdefault(tuple(records), []).append((file, figure))
    for records, figures in reports.items():
        with TemporaryDirectory() as folder:
            write_report([path(name) for name in records], Path(folder))
            for file, figure in figures:
                shutil.copyfile(Path(folder) / file, ROOT / "docs" / "figures" / figure)
                print(f"docs/figures/{figure} drawn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws or checks what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES, help="pages, by their place in the project")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a table would change")
    parser.add_argument("--figures", action="store_true", help="draw the figures, too")
    options = parser.parse_args(arguments)
    changed = 0
    for page in options.pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = redrawn(page, text)
        changed += new != text
        print(page, "changed" if new != text else "as it was")
        if not options.check:
            (ROOT / page).write_text(new, encoding="utf-8")
    if options.figures and not options.check:
        draw_figures()
    return int(options.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
