import errno
import html
import re
from dataclasses import replace

import numpy as np
import pytest

from seerattn import report
from seerattn.report import style, write_report
from seerattn.report.select import SHARE_ERROR
from seerattn.results.file import ResultsFile
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result
from seerattn.texts import visible

DATA = {"data": "abc", "windows": 1, "min_tokens": 0, "dtype": "float32"}


def result(what: str, arm: str, density: float | None, value: float, **more) -> Result:
    selector = arm if arm in ("dense", "oracle", "streaming") else "gate"
    values = {
        "unit": "tokens",
        "n": 1000,
        "model": "m",
        "context": 4096,
        "text": "books",
        "gates": arm if selector == "gate" else None,
        "policy": None if arm == "dense" else {"policy": "TopK", "density": density, "last_rows_dense": 0},
        "realised_density": 1.0 if arm == "dense" else None if density is None else round(density * 1.02, 3),
        "cell": DATA,
    }
    return Result(what=what, value=value, selector=selector, density=density, **values | more)


def perplexities() -> list[Result]:
    rows = [result("perplexity", "dense", None, 30.0, samples={"documents": [0, 1, 2]})]
    for arm, values in {"streaming": (31.5, 34.25), "oracle": (30.25, 33.0), "best": (30.5, 33.5)}.items():
        for density, value, error in zip((0.2, 0.1), values, (0.125, 0.25)):
            rows.append(result("perplexity", arm, density, value, stderr=2.0))
            rows.append(result("perplexity_difference", arm, density, value - 30, stderr=error))
    return rows


def accuracies() -> list[Result]:
    rows = []
    for depth, right in ((0.2, 3), (0.8, 4)):
        cell = {"task": "passkey", "documents": 4, "depth": depth, "dtype": "float32"}
        more = {"unit": "documents", "n": 4, "cell": cell, "seed": 0}
        rows.append(result("accuracy", "dense", None, right / 4, **more))
        rows.append(result("accuracy", "best", 0.1, (right - 2) / 4, **more))
        policy = {"policy": "TopK", "density": 0.1, "last_rows_dense": 2}
        rows.append(result("accuracy", "best", 0.1, (right - 1) / 4, **more | {"policy": policy}))
    return rows


def recalls() -> list[Result]:
    rows = []
    for arm, value in (("oracle", 0.8), ("best", 0.7)):
        rows.append(result("target_recall", arm, 0.1, value, unit="sequences", n=2, stderr=0.012))
        layer = {"cell": DATA | {"layer": 0}, "samples": {"heads": [value]}}
        rows.append(result("target_recall", arm, 0.1, 0.123, unit="sequences", n=2, **layer))
    return rows


def write(path, rows):
    file = ResultsFile(path)
    for row in rows:
        file.append(row)
    return path


def table_of(tmp_path, rows) -> str:
    write_report([write(tmp_path / "r.jsonl", rows)], tmp_path / "out")
    return (tmp_path / "out" / "table.md").read_text()


def test_perplexity_table_matches_a_written_out_one(tmp_path) -> None:
    assert table_of(tmp_path, perplexities()) == (
        "<!-- Made by seerattn report -->\n\n"
        "### Perplexity: books, 4096 tokens, m\n\n"
        "3 documents, 1000 tokens; ± is the standard error of the paired difference from dense, over documents.\n\n"
        "| selector | 1 | 0.2 (0.204) | 0.1 (0.102) |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| dense | 30.00 |  |  |\n"
        "| oracle |  | 30.25 ± 0.12 | 33.00 ± 0.25 |\n"
        "| best |  | 30.50 ± 0.12 | 33.50 ± 0.25 |\n"
        "| streaming |  | 31.50 ± 0.12 | 34.25 ± 0.25 |\n\n"
        "### Share of the gap from streaming to the oracle that is closed: books, 4096 tokens, m\n\n"
        # (31.5 - 30.5) / (31.5 - 30.25) and (34.25 - 33.5) / (34.25 - 33).
        "| selector | 0.2 (0.204) | 0.1 (0.102) |\n"
        "| --- | ---: | ---: |\n"
        "| best | 80% | 60% |\n"
    )


def test_retrieval_and_recall_tables_match_written_out_ones(tmp_path) -> None:
    table = table_of(tmp_path, accuracies() + recalls())
    head = "### Retrieval, passkey: books, 4096 tokens, {}, m\n\n8 documents a cell; " + SHARE_ERROR
    # 7, 3 and 5 of 8, errors at 8/10, 4/10 and 6/10.
    assert (
        head.format("no dense last rows")
        + "\n\n| selector | 1 | 0.1 (0.102) |\n| --- | ---: | ---: |\n| dense | 0.88 ± 0.14 |  |\n"
        "| best |  | 0.38 ± 0.17 |\n"
    ) in table
    assert head.format("last 2 query-block rows dense") in table and "| best |  | 0.62 ± 0.17 |\n" in table
    assert "| best | 0.1 | 2 | 0.50 | 0.75 |\n" in table
    assert "| selector | 0.1 (0.102) |\n| --- | ---: |\n| oracle | 0.800 ± 0.012 |\n| best | 0.700 ± 0.012 |" in table
    assert "0.123" not in table


def test_gates_measured_anew_replace_the_former_and_other_text_has_its_own_table(tmp_path) -> None:
    rows = perplexities()
    old = replace(rows[-2], weights={"gates": "old"}, value=99.0)
    other = [replace(r, cell=DATA | {"data": "xyz"}, value=50.0) for r in rows if r.arm == "dense"]
    table = table_of(tmp_path, [old, *rows, *other])
    assert "99.00" not in table and table.count("### Perplexity") == 2
    own = {"policy": "Threshold", "threshold": [[0.1]], "last_rows_dense": 0}
    calibrated = result("perplexity", "best", None, 31.25, policy=own, realised_density=0.15)
    table = table_of(tmp_path / "b", [*rows, calibrated])
    assert "| selector | 1 | 0.2 (0.204) | 0.1 (0.102) | own policy |" in table
    assert "| best |  | 30.50 ± 0.12 | 33.50 ± 0.25 | 31.25 at 0.150 |" in table


def test_a_cell_that_is_off_its_column_shows_its_own_density_and_is_no_part_of_the_head(tmp_path) -> None:
    off = {"best": 0.111, "oracle": 0.109, "streaming": 0.284}
    rows = [replace(r, realised_density=off[r.arm]) if r.density == 0.1 else r for r in perplexities()]
    table = table_of(tmp_path, rows)
    perplexity, gap = table.split("### Share of the gap")
    assert (
        "| selector | 1 | 0.2 (0.204) | 0.1 (0.109) |" in perplexity
        and "\n\n4 of 6 cells are within 0.01" in perplexity
    )
    assert "| oracle |  | 30.25 ± 0.12 | 33.00 ± 0.25 |" in perplexity
    assert "| best |  | 30.50 ± 0.12 | 33.50 ± 0.25 at 0.111 |" in perplexity
    assert "| streaming |  | 31.50 ± 0.12 | 34.25 ± 0.25 at 0.284 |" in perplexity
    # Ends at .109 and .284 are none of one density.
    assert "| selector | 0.2 (0.204) |\n| --- | ---: |\n| best | 80% |\n" in gap
    off["streaming"] = 0.118
    rows = [replace(r, realised_density=off[r.arm]) if r.density == 0.1 else r for r in perplexities()]
    assert "| best | 80% | 60% at 0.111 |\n" in table_of(tmp_path / "b", rows)
    off |= {"best": 0.09, "oracle": 0.119, "streaming": 0.119}
    rows = [replace(r, realised_density=off[r.arm]) if r.density == 0.1 else r for r in perplexities()]
    assert "| best | 80% | 60% at 0.090, ends at 0.119 |\n" in table_of(tmp_path / "c", rows)


def test_pass_keys_by_depth_show_the_density_that_dense_last_rows_add(tmp_path) -> None:
    rows = [replace(r, realised_density=0.135) if r.policy and r.policy["last_rows_dense"] else r for r in accuracies()]
    table = table_of(tmp_path, rows)
    assert "| best | 0.1 at 0.135 | 2 | 0.50 | 0.75 |\n" in table and "| best | 0.1 | 0 | 0.25 | 0.50 |\n" in table
    assert "| best |  | 0.62 ± 0.17 at 0.135 |\n" in table


def maps() -> BlockMaps:
    rng = np.random.default_rng(0)
    causal = np.tril(np.ones((6, 6), dtype=bool))
    target = rng.random((2, 6, 6)) * causal
    forced = causal & (np.eye(6, dtype=bool) | (np.arange(6) == 0))
    return BlockMaps(
        [(0, 1), (1, 0)], target / target.sum(-1, keepdims=True), target, (target > 0.5) | forced, forced, "best", 0.1
    )


def test_reports_are_the_same_byte_for_byte(tmp_path) -> None:
    results = write(tmp_path / "r.jsonl", perplexities() + accuracies() + recalls())
    maps().save(tmp_path / "maps.npz")
    paths = [results, tmp_path / "maps.npz"]
    first, second = write_report(paths, tmp_path / "a"), write_report(paths, tmp_path / "b")
    names = ["report.html", "table.md", "perplexity.png", "perplexity.svg", "maps.png", "maps.svg"]
    assert [p.name for p in first] == [p.name for p in second] == names
    assert all(p.stat().st_size > 500 for p in first)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_perplexity_figure_shows_realised_sparsity_paired_errors_and_a_label_for_each_line(
    tmp_path, monkeypatch
) -> None:
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, folder, name: drawn.append(figure) or [])
    write_report([write(tmp_path / "r.jsonl", perplexities())], tmp_path / "out")
    (axes,) = drawn[0].axes
    assert {t.get_text() for t in axes.texts} == {"dense", "oracle", "gates: best", "streaming"}
    line = next(c for c in axes.containers if c.get_label() == "gates: best")
    points, _, (bars,) = line
    assert points.get_xdata() == pytest.approx([1 - 0.204, 1 - 0.102])
    assert points.get_ydata() == pytest.approx([30.5, 33.5])
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2 * 0.125, 2 * 0.25])


def test_figures_ignore_the_users_own_matplotlib_settings(tmp_path) -> None:
    import matplotlib

    results = write(tmp_path / "r.jsonl", perplexities())
    write_report([results], tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        write_report([results], tmp_path / "b")
    assert (tmp_path / "a/perplexity.svg").read_bytes() == (tmp_path / "b/perplexity.svg").read_bytes()


def test_labels_are_spread_by_the_gap_and_stay_put_where_there_is_room() -> None:
    assert style.spread([10.0, 50.0, 90.0], 11) == [10.0, 50.0, 90.0]
    moved = style.spread([50.0, 52.0, 51.0, 90.0], 11)
    assert moved == pytest.approx([40.0, 62.0, 51.0, 90.0])
    crowded = style.spread([0.0, 1.0, 11.5, 12.0], 10)
    assert np.diff(sorted(crowded)).min() >= 10 - 1e-9 and np.mean(crowded) == pytest.approx(6.125)


def test_report_rejects_missing_and_empty_files_and_writes_nothing(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for path, message in ((tmp_path / "none.jsonl", "must be files"), (tmp_path / "empty.jsonl", "at least one line")):
        with pytest.raises(ValueError, match=message):
            write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAMES = ["[/]", "a|b", "<script>alert(1)</script>", "new\nline", "\x1b[2Jclear", "$x$", "\ud800", "*stars*", "`code`"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_as_they_are_and_mark_nothing_up(tmp_path, name: str) -> None:
    rows = [replace(row, model=name, text=name, gates=row.gates and name) for row in perplexities() + accuracies()]
    table = table_of(tmp_path, rows)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    heads = [line for line in lines if line.startswith("| selector")]
    # Cells of a table are divided by bars that nothing escapes; a name makes no cell, no line and no tag.
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert heads and len(set(cells)) <= len(heads)
    assert "<script" not in table and "\x1b" not in table
    assert all(not re.search(r"(?<!\\)[*`]", line) for line in lines if name.strip("*`") in line)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page
    assert html.escape(visible(name)) in page


def test_a_report_replaces_reports_and_nothing_else(tmp_path) -> None:
    rows = write(tmp_path / "r.jsonl", perplexities())
    made = write_report([rows], tmp_path / "out")
    assert write_report([rows], tmp_path / "out") == made
    before = {path: path.read_bytes() for path in made}
    for path in made:
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"output must be a new file or a report, got .*{path.name}"):
            write_report([rows], tmp_path / "out")
        assert path.read_bytes() == b"mine"
        path.write_bytes(before[path])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_leaves_no_part_of_a_report(tmp_path, monkeypatch) -> None:
    rows = write(tmp_path / "r.jsonl", perplexities())
    write_report([rows], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    copy, copied = report.shutil.copyfile, []

    def full(source, target) -> None:
        copied.append(target)
        if len(copied) == 3:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    more = write(tmp_path / "more.jsonl", accuracies())
    monkeypatch.setattr(report.shutil, "copyfile", full)
    for folder in ("out", "new"):
        copied.clear()
        with pytest.raises(OSError, match="the report could not be saved"):
            write_report([rows, more], tmp_path / folder)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list((tmp_path / "new").iterdir())


def test_a_report_goes_into_folders_alone(tmp_path) -> None:
    rows = write(tmp_path / "r.jsonl", perplexities())
    for output in (rows, rows / "out"):
        with pytest.raises(ValueError, match="output must be a folder that can be written"):
            write_report([rows], output)


def test_maps_replace_maps_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "maps.npz"
    ones = np.ones((1, 2, 2), np.float32)
    maps = BlockMaps([(0, 0)], ones, ones, ones > 0, np.eye(2) > 0, "g", 0.5)
    maps.save(path)
    maps.save(path)
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="maps must be a new file or block maps"):
        maps.save(path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "change",
    [{"target": np.ones((1, 3, 2), np.float32)}, {"chosen": np.ones((1, 2, 2))}, {"forced": np.zeros((2, 2)) > 0},
     {"gate": np.full((1, 2, 2), np.nan, np.float32)}, {"density": np.nan}, {"heads": np.zeros((0, 2), int)}],
    ids=str,
)  # fmt: skip
def test_maps_that_do_not_belong_together_are_refused(tmp_path, change: dict) -> None:
    ones = np.ones((1, 2, 2), np.float32)
    good = {"heads": [(0, 0)], "target": ones, "gate": ones, "chosen": ones > 0, "forced": np.eye(2) > 0}
    np.savez(tmp_path / "maps.npz", **good | {"gates": "g", "density": 0.5} | change)
    with pytest.raises(ValueError, match="maps must be a file that seerattn eval recall --maps wrote"):
        write_report([tmp_path / "maps.npz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
