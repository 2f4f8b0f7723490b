"""The HTML page, read back by a parser, against the rows that it was made of."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from seerattn.report import style, write_report
from seerattn.results.file import ResultsFile
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr"}
EVIL = "<script>alert('x')</script> & $\\bad$"


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

    def grid(self, number: int) -> dict[tuple[str, str, str], str]:
        """Cells of a table of two headings by (line, group, column)."""
        head, columns, *lines = self.tables[number]
        groups = [name for name, values in head[2:] for _ in range(int(values["colspan"]))]
        names = [name.split()[0] for name, _ in columns]
        found = {}
        for (label, values), *cells in lines:
            if values.get("scope") == "row":
                spread = [text for text, v in cells[1:] for _ in range(int(v.get("colspan", 1)))]
                assert len(spread) == len(groups) == len(names)
                found |= {(label, group, name): text for group, name, text in zip(groups, names, spread) if text}
        return found


def perplexity(selector: str, density: float | None, value: float, *, context: int = 4096, **more) -> Result:
    gates = selector if selector in ("best", "paper") else None
    dense = selector == "dense"
    last = more.pop("last", 0)
    cell = {} if dense else {"budget": "density", "block_q": 64, "block_k": 64}
    values = {
        "n": 1000,
        "unit": "tokens",
        "model": "m",
        "text": "books",
        "realised_density": 1.0 if dense else None if density is None else round(density + 0.002, 4),
        "policy": None if dense else {"last_rows_dense": last, "knob": 0.5},
        "samples": {"documents": [0, 1]},
        "cell": {"data": "abc", "dtype": "float32"} | cell | more.pop("cell", {}),
    }
    kind = "gate" if gates else selector
    return Result(
        what="perplexity", value=value, selector=kind, gates=gates, density=density, context=context, **values | more
    )


VALUES = {"oracle": 0.25, "best": 0.5, "paper": 1.0, "xattention-8": 1.25, "minference": 1.5, "streaming": 2.0}


def comparison(text: str = "books") -> list[Result]:
    """Two contexts, three densities, with and without dense last rows, with paired errors."""
    rows = []
    for context in (2048, 4096):
        rows.append(perplexity("dense", None, 20.0, context=context, text=text))
        for last in (0, 2):
            for density in (0.5, 0.2, 0.1):
                for i, (selector, loss) in enumerate(VALUES.items()):
                    value = 20.0 + loss * 0.1 / density * context / 4096 / (1 + last)
                    realised = round(density + 0.001 * i, 4)
                    row = perplexity(
                        selector, density, value, context=context, text=text, last=last, realised_density=realised
                    )
                    more = {"value": value - 20.0, "stderr": loss / 64, "samples": {}}
                    rows += [row, replace(row, what="perplexity_difference", **more)]
    return rows


def accuracy(selector: str, task: str, density: float | None, right: int, n: int, **cell) -> Result:
    row = perplexity(selector, density, right / n, context=8192)
    more = {"task": task, "documents": n, **cell}
    return replace(row, what="accuracy", n=n, unit="documents", cell=row.cell | more, samples={}, seed=0)


def timed(rows: list[Result], milliseconds, batch: int = 1) -> list[Result]:
    """Times of attention that belong to perplexities, a quarter of them for choosing."""
    found = []
    for r in rows:
        if r.what == "perplexity":
            ms = milliseconds(r)
            share = 0.0 if r.selector == "dense" else 0.25
            samples = {"index": [ms * share], "attention": [ms * (1 - share)]}
            more = {"value": ms, "n": 3, "unit": "forwards", "samples": samples, "cell": r.cell | {"batch": batch}}
            found.append(replace(r, what="attention_ms", **more))
    return found


def block_maps(heads: list[tuple[int, int]], size: int = 12) -> BlockMaps:
    rng = np.random.default_rng(0)
    causal = np.tril(np.ones((size, size), dtype=bool))
    forced = causal & (np.eye(size, dtype=bool) | (np.arange(size) == 0))
    target = rng.random((len(heads), size, size)) * causal
    age = np.arange(size)[:, None] - np.arange(size)
    chosen = np.stack([(np.isin(age, [3, 6]) if head % 2 else age < 4) & causal | forced for _, head in heads])
    return BlockMaps(heads, target, target, chosen, forced, "best", 0.2)


def report(tmp_path, rows, maps: BlockMaps | None = None) -> Page:
    return Page(source(tmp_path, rows, maps))


def source(tmp_path, rows, maps: BlockMaps | None = None) -> str:
    paths = []
    if rows:
        file = ResultsFile(tmp_path / "r.jsonl")
        for row in rows:
            file.append(row)
        paths.append(tmp_path / "r.jsonl")
    if maps is not None:
        maps.save(tmp_path / "maps.npz")
        paths.append(tmp_path / "maps.npz")
    write_report(paths, tmp_path / "out")
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """Figures by name, which are not written."""
    figures = {}
    monkeypatch.setattr(style, "save", lambda figure, folder, name: figures.update({name: figure}) or [])
    return figures


def everything() -> list[Result]:
    rows = comparison() + comparison(EVIL)
    uneven = {"head_density": [[0.1, 0.3], [0.2, 0.2]]}
    rows = [replace(r, samples=r.samples | uneven) if r.selector == "minference" and r.samples else r for r in rows]
    rows += timed(rows, lambda r: 8.0 * r.realised_density + 1.0)
    rows += guarded(0.75, 0.5, "significantly lower than dense")
    rows += [accuracy("best", "passkey", 0.1, 9, 10, depth=0.5), accuracy("dense", "passkey", None, 10, 10, depth=0.5)]
    failed = perplexity("moa", 0.05, 0.0, text=EVIL)
    rows.append(replace(failed, what="failure", value=None, samples={"error": ['<img src="http://e.vil/x">']}))
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a report with every kind of section, its files beside it."""
    folder = tmp_path_factory.mktemp("whole")
    source(folder, everything(), block_maps([(layer, head) for layer in range(4) for head in range(2)]))
    return folder


def test_page_is_balanced_refers_to_nothing_outside_and_escapes_what_it_shows(whole) -> None:
    text = (whole / "out" / "report.html").read_text(encoding="utf-8")
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


def test_perplexity_tables_hold_the_rows_values_errors_and_densities(tmp_path, drawn) -> None:
    rows = comparison()
    page = report(tmp_path, rows)
    number = 2  # after two tables of what was run
    for last in (0, 2):
        grid = page.grid(number + (last == 2))
        expected = {}
        for r in rows:
            group = f"{r.context:,} tokens"
            if r.what == "perplexity" and r.selector == "dense":
                expected |= {("dense", group, name): "20.00" for name in ("0.5", "0.2", "0.1")}
            elif r.what == "perplexity" and r.policy["last_rows_dense"] == last:
                error = VALUES[r.arm] / 64
                expected[r.arm, group, f"{r.density:g}"] = f"{r.value:.2f} ±{error:.3f} {r.realised_density:.3f}"
        assert grid == expected
    assert "no dense last rows" in page.text and "last 2 query-block rows dense" in page.text
    # Best of every column, of 2 contexts, 3 densities and 2 tables, and of as many of the gap.
    assert set(page.bold) == {f"{r.value:.2f}" for r in rows if r.arm == "best" and r.what == "perplexity"} | {"86%"}
    assert page.bold.count("86%") == 12


def test_kinds_of_selectors_stand_in_their_order_under_their_titles(tmp_path, drawn) -> None:
    page = report(tmp_path, comparison())
    first = [line[0][0] for line in page.tables[2][2:]]
    assert first == [
        "dense",
        "Oracle: chooses by the true map",
        "oracle",
        "Learned gates",
        "best",
        "paper",
        "Systems without a trained gate",
        "minference",
        "xattention-8",
        "Floors: look at no query and no key",
        "streaming",
    ]


def test_gap_table_holds_the_share_from_streaming_to_the_oracle(tmp_path, drawn) -> None:
    page = report(tmp_path, comparison())
    grid = page.grid(4)
    assert {line for line, _, _ in grid} == {"best", "paper", "minference", "xattention-8"}
    for (line, _, _), text in grid.items():
        assert text.split()[0] == f"{(2.0 - VALUES[line]) / (2.0 - 0.25):.0%}"


def test_cell_that_is_off_its_column_is_starred_and_not_best(tmp_path, drawn) -> None:
    rows = [perplexity("dense", None, 20.0)]
    rows += [perplexity("best", 0.1, 22.0), perplexity("paper", 0.1, 23.0), perplexity("oracle", 0.1, 21.0)]
    note = "density 0.1 cannot be reached"
    rows.append(perplexity("moa", 0.1, 20.5, realised_density=0.2, cell={"note": note}))
    other = "measured <twice>"
    rows.append(perplexity("xattention", 0.1, 25.0, cell={"note": other}))
    rows.append(perplexity("streaming", 0.1, 20.5, realised_density=0.0899))
    rows.append(perplexity("random", 0.1, 24.0, realised_density=0.09))
    rows.append(perplexity("flexprefill", 0.1, None))
    page = report(tmp_path, rows)
    assert page.bold == ["22.00"]
    grid = page.grid(2)
    assert grid["moa", "4,096 tokens", "0.1"] == "20.50* 0.200" and note not in page.text
    assert grid["xattention", "4,096 tokens", "0.1"] == "25.00 [1] 0.102" and f"[1] {other}" in page.text
    assert grid["streaming", "4,096 tokens", "0.1"] == "20.50* 0.090"
    assert grid["random", "4,096 tokens", "0.1"] == "24.00 0.090"
    assert grid["flexprefill", "4,096 tokens", "0.1"].startswith("not finite")
    assert "it rests on is over 0.01 off its column" in page.text


def test_no_cell_is_best_where_none_reached_the_density(tmp_path, drawn) -> None:
    rows = [perplexity(arm, 0.05, 40.0 + i, realised_density=0.119) for i, arm in enumerate(("best", "paper", "moa"))]
    page = report(tmp_path, rows)
    assert not page.bold and page.grid(2)["best", "4,096 tokens", "0.05"] == "40.00*"
    assert [name for name, _ in page.tables[2][1]] == ["0.05 0.119"]


def test_gap_between_ends_of_another_density_names_it_and_is_not_best(tmp_path, drawn) -> None:
    rows = [perplexity("oracle", 0.2, 21.0, realised_density=0.176)]
    rows += [perplexity("streaming", 0.2, 23.0, realised_density=0.176)]
    rows += [perplexity("best", 0.2, 22.0, realised_density=0.176)]
    rows += [perplexity("paper", 0.2, 21.5, realised_density=0.2)]
    grid = report(tmp_path, rows).grid(3)
    assert grid["best", "4,096 tokens", "0.2"] == "50%* 0.176"
    assert grid["paper", "4,096 tokens", "0.2"] == "75%* ends at 0.176 0.200"


def test_density_that_a_column_shares_stands_in_its_head(tmp_path, drawn) -> None:
    page = report(tmp_path, [perplexity("best", 0.1, 22.0), perplexity("paper", 0.1, 23.0)])
    assert [name for name, _ in page.tables[2][1]] == ["0.1 0.102"]
    assert page.grid(2)["paper", "4,096 tokens", "0.1"] == "23.00"


def test_equal_time_has_tables_of_its_own_with_shares_as_columns(tmp_path, drawn) -> None:
    rows = [perplexity("dense", None, 20.0), perplexity("best", 0.5, 21.0), perplexity("paper", 0.5, 22.0)]
    for selector, value, density in (("best", 23.0, 0.4), ("paper", 24.0, 0.25)):
        cell = {"budget": "time", "share": 0.5}
        rows.append(perplexity(selector, None, value, realised_density=density, cell=cell))
    page = report(tmp_path, rows)
    assert page.grid(2)["best", "4,096 tokens", "0.5"] == "21.00"
    grid = page.grid(3)
    assert grid["dense", "4,096 tokens", "0.5"] == "20.00"
    # Densities differ where times are equal, and none of them is "too dense".
    assert grid["best", "4,096 tokens", "0.5"] == "23.00 0.400"
    assert grid["paper", "4,096 tokens", "0.5"] == "24.00 0.250"
    assert "by share of the time of dense attention" in (tmp_path / "out" / "table.md").read_text()


def test_retrieval_table_pools_depths_and_keeps_variants_of_a_task_apart(tmp_path, drawn) -> None:
    rows = []
    for depth, right in ((0.2, 3), (0.8, 4)):
        rows.append(accuracy("dense", "passkey", None, 4, 4, depth=depth))
        rows.append(accuracy("best", "passkey", 0.1, right, 4, depth=depth))
    for pairs, right in ((8, 5), (16, 2)):
        rows.append(accuracy("best", "key_value", 0.1, right, 10, pairs=pairs))
    page = report(tmp_path, rows)
    grid = page.grid(2)
    # 7 of 8, its error at 8 of 10: sqrt(.8 * .2 / 8).
    assert grid["best", "passkey", "0.1"] == "0.88 ±0.14"
    assert grid["dense", "passkey", "0.1"].startswith("1.00")
    assert grid["best", "key-value (documents 10, pairs 8)", "0.1"].startswith("0.50")
    assert grid["best", "key-value (documents 10, pairs 16)", "0.1"].startswith("0.20")
    assert "passkey 8" in page.text


def test_failures_are_listed_with_their_reason_until_the_cell_is_measured(tmp_path, drawn) -> None:
    done = perplexity("moa", 0.1, 21.0)
    failed = replace(done, what="failure", value=None, cell=done.cell | {"task": "perplexity"})
    failed = replace(failed, samples={"error": ["OutOfMemoryError: no room"]})
    other = replace(failed, density=0.05)
    page = report(tmp_path, [failed, other, done])
    (table,) = [t for t in page.tables if t[0][-1][0] == "reason"]
    assert [[text for text, _ in line] for line in table[1:]] == [
        ["moa", "0.05", "4,096", "books", "0", "perplexity", "OutOfMemoryError: no room"]
    ]


def test_a_benchmark_that_failed_is_not_hidden_by_another_share_of_targets(tmp_path, drawn) -> None:
    step = replace(perplexity("gate", 0.1, 800.0), what="finetune_step_ms")
    done = replace(step, cell={"work": "fine-tuning step", "layers": 4, "target_share": 0.1})
    failed = replace(done, value=None, cell=done.cell | {"target_share": 1.0}, samples={"error": ["out of memory"]})
    page = report(tmp_path, [done, failed])
    (table,) = [t for t in page.tables if t[0][-1][0] == "reason"]
    assert [line[-1][0] for line in table[1:]] == ["out of memory"]
    assert not [
        t for t in report(tmp_path / "tried", [failed, replace(failed, value=900.0)]).tables if t[0][-1][0] == "reason"
    ]


def test_what_was_run_counts_results_and_names_software_and_commands(tmp_path, drawn) -> None:
    page = report(tmp_path, comparison())
    measured, machines = page.tables[:2]
    assert [text for text, _ in measured[1]] == ["perplexity", "m", "books", "2,048, 4,096", "74", "1,000 tokens"]
    assert [text for text, _ in measured[2]][4] == "72"
    assert machines[1][-1][0] == "146" and "torch " in machines[1][2][0]
    assert "Commands (1)" in page.text and any(text in page.text for text in ("pytest", "__main__.py"))


def test_sections_stand_only_where_there_is_data(tmp_path, whole, drawn) -> None:
    assert report(tmp_path / "a", [perplexity("dense", None, 20.0)]).sections() == ["run", "perplexity"]
    assert report(tmp_path / "b", [], block_maps([(0, 0), (0, 1)])).sections() == ["masks"]
    rows = [accuracy("best", "passkey", 0.1, 1, 2, depth=0.5)]
    assert report(tmp_path / "c", rows).sections() == ["run", "retrieval"]
    every = ["run", "failures", "perplexity", "gap", "retrieval", "pareto", "heads", "masks", "tasks"]
    assert Page((whole / "out" / "report.html").read_text(encoding="utf-8")).sections() == every


def test_pareto_figure_joins_what_nothing_beats_and_leaves_the_oracle_out(tmp_path, drawn) -> None:
    rows = [perplexity("dense", None, 20.0), perplexity("oracle", 0.1, 20.5)]
    rows += [perplexity("best", 0.2, 21.0), perplexity("best", 0.1, 22.0), perplexity("paper", 0.2, 23.0)]
    rows.append(perplexity("paper", 0.2, 20.1, last=2))
    ms = {"dense": 10.0, "oracle": 1.0, "best": 4.0, "paper": 5.0}
    rows += timed(rows, lambda r: ms[r.arm] * (1.0 if r.density != 0.1 or r.arm == "oracle" else 0.5))
    page = report(tmp_path, rows)
    (axes,) = drawn["pareto"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["not beaten"] == [[2.0, 22.0], [4.0, 21.0], [10.0, 20.0]]
    containers = {c.get_label(): c[0].get_xydata().tolist() for c in axes.containers}
    assert containers["gates: best"] == [[2.0, 22.0], [4.0, 21.0]] and containers["gates: paper"] == [[5.0, 23.0]]
    cells = [cell for number in range(2, len(page.tables)) for cell in page.grid(number).values()]
    assert any(cell.startswith("2 25% choice") for cell in cells)


def test_times_of_other_batches_have_panels_and_tables_of_their_own(tmp_path, drawn) -> None:
    rows = [perplexity("dense", None, 20.0), perplexity("best", 0.2, 21.0)]
    both = timed(rows, lambda r: 8.0) + timed(rows, lambda r: 3.0, batch=4)
    page = report(tmp_path, rows + both)
    one, four = drawn["pareto"].axes
    for axes, batch, ms in ((one, 1, 8.0), (four, 4, 3.0)):
        assert axes.get_title(loc="left").endswith(f"batch {batch}")
        assert {x for c in axes.containers for x, _ in c[0].get_xydata()} == {ms}
    cells = [set(page.grid(number).values()) for number in range(2, len(page.tables))]
    assert [any(c.startswith("8 25%") for c in found) for found in cells].count(True) == 1
    assert [any(c.startswith("3 25%") for c in found) for found in cells].count(True) == 1


def test_times_of_comparisons_are_not_taken_for_benchmarks(tmp_path, drawn) -> None:
    rows = comparison()
    report(tmp_path, rows + timed(rows, lambda r: 1.0))
    assert "Attention alone" not in (tmp_path / "out" / "table.md").read_text()
    assert set(drawn) == {"perplexity", "pareto"}


def test_floors_that_lose_much_leave_the_perplexity_figure_at_its_top(tmp_path, drawn) -> None:
    rows = comparison() + [perplexity("random", density, 60.0 / density) for density in (0.5, 0.2, 0.1)]
    report(tmp_path, rows)
    axes = next(a for a in drawn["perplexity"].axes if "4,096" in a.get_title(loc="left"))
    worst = max(r.value for r in rows if r.what == "perplexity" and r.arm not in ("streaming", "random"))
    assert worst < axes.get_ylim()[1] < 30
    names = {text.get_text() for text in axes.texts}
    assert "random \N{UPWARDS ARROW}" in names and "streaming" in names


def test_head_densities_are_drawn_where_heads_differ_and_listed_with_their_extremes(tmp_path, drawn) -> None:
    even, uneven = [[0.1, 0.1], [0.1, 0.1]], [[0.05, 0.1], [0.125, 0.325]]
    rows = [perplexity("best", 0.1, 21.0, samples={"head_density": even})]
    rows.append(perplexity("minference", 0.1, 22.0, samples={"head_density": uneven}))
    # Shorter contexts are left out.
    rows.append(perplexity("minference", 0.1, 22.0, context=1024, samples={"head_density": even}))
    page = report(tmp_path, rows)
    (image,) = [image for axes in drawn["head_density"].axes for image in axes.get_images()]
    assert np.asarray(image.get_array()) == pytest.approx(np.array(uneven))
    assert [tick.get_text() for tick in drawn["head_density"].axes[0].get_yticklabels()] == ["MInference"]
    (table,) = [t for t in page.tables if t[0][-1][0] == "densest head"]
    assert [[text for text, _ in line] for line in table[1:]] == [
        ["minference", "0.1", "0.050 (layer 0, head 0)", "0.150", "0.325 (layer 1, head 1)"]
    ]
    assert "Every head alike: best." in page.text


def test_heads_that_are_alike_at_one_density_are_drawn_beside_the_others(tmp_path, drawn) -> None:
    even, uneven = [[0.1, 0.1]], [[0.05, 0.4]]
    rows = [perplexity("minference", 0.1, 22.0, samples={"head_density": even})]
    rows.append(perplexity("minference", 0.2, 22.0, samples={"head_density": uneven}))
    report(tmp_path, rows)
    images = [image for axes in drawn["head_density"].axes for image in axes.get_images()]
    assert [np.asarray(image.get_array()).tolist() for image in images] == [uneven, even]
    assert not [text for axes in drawn["head_density"].axes for text in axes.texts]


def test_pattern_tables_name_the_planted_shape_of_each_head(tmp_path, drawn) -> None:
    maps = block_maps([(0, 0), (0, 1), (2, 1)], size=24)
    page = report(tmp_path, [], maps)
    letters = page.tables[1]
    assert [text for text, _ in letters[0]] == ["layer", "0", "1"]
    assert [text for text, _ in letters[1]] == ["0", "A 1.00", "S 1.00"]
    assert [text for text, _ in letters[2]] == ["2", "", "S 1.00"]
    counts = {line[0][0]: line[1][0] for line in page.tables[0][1:]}
    assert counts["A-shape"] == "1" and counts["slash"] == "2"
    assert set(drawn) == {"maps"}


def guarded(dense: float, sparse: float, note: str | None) -> list[Result]:
    row = perplexity("best", 0.2, sparse, context=4096, text="niah_single_1")
    score = {"task": "niah_single_1", "metric": "4096", "documents": 50}
    row = replace(row, what="task_score", n=50, unit="documents", stderr=0.05, cell=row.cell | score)
    base = perplexity("dense", None, dense, text="niah_single_1")
    base = replace(base, what="task_score", n=50, unit="documents", stderr=0.05, cell=base.cell | score)
    samples = {"score": [sparse], "dense": [dense], "p": [0.01], "test": ["paired sign flips"]}
    guard = replace(row, what="task_guard", value=sparse - dense, stderr=0.04, samples=samples)
    return [base, row, replace(guard, cell=guard.cell | ({"note": note} if note else {}))]


def test_task_table_holds_guards_and_marks_significant_ones_in_words(tmp_path, drawn) -> None:
    page = report(tmp_path, guarded(0.75, 0.5, "significantly lower than dense"))
    assert page.sections() == ["run", "tasks"]
    (table,) = page.tables[2:]
    line = ["niah_single_1", "4,096", "accuracy", "best", "0.2", "0.202", "0", "0.750", "0.500", "-0.250 ± 0.040"]
    assert [text for text, _ in table[1]] == [*line, "0.01", "50", "⚠ differs"]
    assert "1 of 1 lines are marked" in page.text
    page = report(tmp_path / "b", guarded(0.75, 0.75, None))
    assert page.tables[2][1][-1][0] == "" and "0 of 1 lines are marked" in page.text


def test_scores_without_a_guard_stand_in_a_table_of_their_own(tmp_path, drawn) -> None:
    page = report(tmp_path, guarded(0.75, 0.5, None)[:2])
    (table,) = page.tables[2:]
    assert [[text for text, _ in line][-2:] for line in table[1:]] == [["0.750 ± 0.050", "50"], ["0.500 ± 0.050", "50"]]


def test_wide_tables_are_cut_between_contexts(tmp_path, drawn) -> None:
    densities = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    rows = [perplexity("best", d, 21.0, context=c) for c in (1024, 2048, 4096, 8192) for d in densities]
    page = report(tmp_path, rows)
    sizes = [{group for _, group, _ in page.grid(number)} for number in (2, 3)]
    assert [len(groups) for groups in sizes] == [3, 1] and "(2 of 2)" in page.text


def test_page_of_many_heads_and_selectors_stays_small(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = [perplexity("dense", None, 20.0, context=8192)]
    for i in range(8):
        for density in (0.5, 0.3, 0.2, 0.1, 0.05):
            heads = (density * rng.uniform(0.5, 1.5, (32, 32))).tolist()
            samples = {"head_density": heads}
            rows.append(perplexity(f"system-{i}", density, 21.0 + i, context=8192, samples=samples))
    maps = block_maps([(layer, head) for layer in range(8) for head in range(32)], size=16)
    assert len(source(tmp_path, rows, maps)) < 1_500_000


def test_page_is_the_same_byte_for_byte(tmp_path, whole) -> None:
    write_report([whole / "r.jsonl", whole / "maps.npz"], tmp_path)
    assert (whole / "out" / "report.html").read_bytes() == (tmp_path / "report.html").read_bytes()
