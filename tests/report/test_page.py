"""The HTML page, read back by a parser, against the tables that it was made of."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from rows import written
from whole import EVIL, block_maps, everything, result

from seerattn.report import write_report
from seerattn.report.parts import Table
from seerattn.report.select import latest
from seerattn.report.tables import sections
from seerattn.results.file import read_results
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Elements, tables and references of a page; balanced or an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[tuple[str, dict]]]] = []
        self.text = ""
        self.bold: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", values])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:])
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            gap = " " if self.open[-1] in ("small", "sup") else ""
            self.tables[-1][-1][-1][0] += gap + data.strip()
        if self.open and self.open[-1] == "strong":
            self.bold.append(data)

    def all(self, name: str) -> list[str]:
        return [values[name] for _, values in self.tags if name in values]

    def sections(self) -> list[str]:
        return [values["id"] for tag, values in self.tags if tag == "section"]

    def body(self, number: int) -> list[list[str]]:
        """Lines of a table as text; a cell that spans several columns stands in each of them."""
        found = []
        for line in self.tables[number]:
            if any(values.get("scope") == "row" for _, values in line):
                found.append([text for text, values in line for _ in range(int(values.get("colspan", 1)))])
        return found


def source(folder: Path, rows: list[Result], maps: BlockMaps | None = None) -> str:
    paths = [written(folder / "r.jsonl", rows)] if rows else []
    if maps is not None:
        folder.mkdir(exist_ok=True)
        maps.save(folder / "maps.npz")
        paths.append(folder / "maps.npz")
    write_report(paths, folder / "out")
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_page_is_balanced_refers_to_nothing_outside_and_escapes_what_it_shows(whole) -> None:
    text = whole.read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert {"svg", "table", "figure"} <= tags
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    for name in page.all("href") + page.all("src") + page.all("xlink:href"):
        assert name.startswith("data:image/png;base64,") or (name[0] == "#" and name[1:] in ids)
    assert set(page.all("aria-labelledby")) <= set(ids)
    assert all(name[0] == "#" and name[1:] in ids for name in re.findall(r"url\(\"?([^)\"]*)", text))
    assert "@import" not in text and not [name for _, v in page.tags for name in v if name.startswith("on")]
    assert "default-src 'none'" in page.all("content")[1] + page.all("content")[2]
    # Shown as text, and nowhere as an element.
    assert EVIL in page.text and '<img src="http://e.vil/x">' in page.text
    assert all(v.get("aria-label") for tag, v in page.tags if tag == "figure")
    assert all(v.get("scope") for tag, v in page.tags if tag == "th")


def test_results_come_first_and_failures_and_runs_last_with_a_link_at_the_top(whole, tmp_path, drawn) -> None:
    page = Page(whole.read_text(encoding="utf-8"))
    every = ["summary", "perplexity", "gap", "retrieval", "time", "heads", "masks", "tasks", "speed", "failures", "run"]
    assert page.sections() == every
    assert "1 cell could not be measured" in page.text and page.all("href").count("#failures") == 2
    clean = Page(source(tmp_path / "a", [result("perplexity", "dense", None, 20.0)]))
    assert clean.sections() == ["perplexity", "run"] and "#failures" not in clean.all("href")
    assert Page(source(tmp_path / "b", [], block_maps([(0, 0), (0, 1)]))).sections() == ["masks"]


def expected_lines(table: Table) -> list[list[str]]:
    """What the page must say of a table's lines."""
    found = []
    for line in table.lines:
        cells = []
        for place, cell in enumerate(line.cells):
            if line.whole:
                first = max(first for first in table.spans if first <= place)
                cell = line.cells[first]
            error, at = (f"±{cell.error}" if cell and cell.error else ""), (f"at {cell.at}" if cell and cell.at else "")
            note = f"[{cell.note}]" if cell and cell.note else ""
            cells.append(" ".join(filter(None, (cell.text, note, error, at, cell.more))) if cell else "")
        found.append([line.name, *cells])
    return found


def test_every_table_stands_on_the_page_as_it_was_computed(tmp_path, drawn) -> None:
    page = Page(source(tmp_path, everything()))
    read = latest(read_results([tmp_path / "r.jsonl"]))
    tables = [table for section in sections(read) for table in section.parts]
    assert len(tables) == len(page.tables) > 10
    for number, table in enumerate(tables):
        assert page.body(number) == expected_lines(table), table.title
        titles = [line[0][0] for line in page.tables[number] if line[0][1].get("scope") == "rowgroup"]
        assert titles == [kind for kind in table.kinds if kind not in ("", "Dense")]
    best = [cell.text for table in tables for line in table.lines for cell in line.cells if cell and cell.best]
    assert best and page.bold == best


def test_wide_tables_are_shown_group_by_group(tmp_path, drawn) -> None:
    densities = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    rows = [result("perplexity", "best", d, 21.0, context=c) for c in (1024, 2048, 4096, 8192) for d in densities]
    page = Page(source(tmp_path, rows))
    assert [len(page.body(number)[0]) for number in range(4)] == [7, 7, 7, 7]


def test_pattern_tables_name_the_planted_shape_of_each_head(tmp_path, drawn) -> None:
    page = Page(source(tmp_path, [], block_maps([(0, 0), (0, 1), (2, 1)], size=24)))
    assert page.body(1) == [["0", "A 1.00", "S 1.00"], ["2", "", "S 1.00"]]
    counts = {line[0]: line[1] for line in page.body(0)}
    assert counts["A-shape"] == "1" and counts["slash"] == "2"
    letters = [values["class"] for line in page.tables[1] for text, values in line if text.startswith("A")]
    assert letters and all("A" in found.split() for found in letters)
    assert set(drawn) == {"maps"}


def test_page_of_many_heads_and_methods_stays_small(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = [result("perplexity", "dense", None, 20.0, context=8192)]
    for i in range(8):
        for density in (0.5, 0.3, 0.2, 0.1, 0.05):
            heads = (density * rng.uniform(0.5, 1.5, (32, 32))).tolist()
            rows.append(result("perplexity", f"g{i}", density, 21.0 + i, context=8192, samples={"head_density": heads}))
    maps = block_maps([(layer, head) for layer in range(8) for head in range(32)], size=16)
    assert len(source(tmp_path, rows, maps)) < 1_500_000
