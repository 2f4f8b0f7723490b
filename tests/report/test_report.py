"""What a report writes, where, and what it refuses; names that come from anywhere."""

import errno
import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rows import of, written

from seerattn import report
from seerattn.report import write_report
from seerattn.report.render.terminal import print_tables
from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result
from seerattn.texts import visible


def result(what: str, name: str, density: float | None, value: float, **more) -> Result:
    values = of(name) | {"n": 8, "unit": "documents", "model": "m", "context": 4096, "text": "books", "cell": {}}
    return Result(what=what, value=value, density=density, realised_density=density, **values | more)


def rows() -> list[Result]:
    found = [result("perplexity", "dense", None, 30.0)]
    for name, value in (("streaming", 31.5), ("oracle", 30.25), ("best", 30.5)):
        found.append(result("perplexity", name, 0.1, value))
        found.append(result("target_recall", name, 0.1, 0.5, stderr=0.125))
    found.append(result("accuracy", "best", 0.1, 0.5, cell={"task": "passkey", "depth": 0.5}))
    return found


def maps() -> BlockMaps:
    rng = np.random.default_rng(0)
    causal = np.tril(np.ones((6, 6), dtype=bool))
    target = rng.random((2, 6, 6)) * causal
    forced = causal & (np.eye(6, dtype=bool) | (np.arange(6) == 0))
    return BlockMaps(
        [(0, 1), (1, 0)], target / target.sum(-1, keepdims=True), target, (target > 0.5) | forced, forced, "best", 0.1
    )


def test_reports_are_the_same_byte_for_byte(tmp_path) -> None:
    maps().save(tmp_path / "maps.npz")
    paths = [written(tmp_path / "r.jsonl", rows()), tmp_path / "maps.npz"]
    first, second = write_report(paths, tmp_path / "a"), write_report(paths, tmp_path / "b")
    names = ["report.html", "table.md", "perplexity.png", "perplexity.svg", "maps.png", "maps.svg"]
    assert [p.name for p in first] == [p.name for p in second] == names
    assert all(p.stat().st_size > 500 for p in first)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_tables_stand_as_markdown_under_their_sections(tmp_path) -> None:
    write_report([written(tmp_path / "r.jsonl", rows())], tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert re.findall(r"^## (.*)", text, re.M)[:3] == [
        "Summary",
        "Perplexity",
        "Gap closed from streaming to the oracle",
    ]
    assert (
        "### Recall of the target map: books, m, no dense last rows, 4,096 tokens\n\n8 documents.\n\n"
        "| method | 0.1 (0.100) |\n| --- | ---: |\n| oracle | 0.500 ± 0.125 |\n"
    ) in text


def test_a_terminal_shows_the_tables_without_packages_for_pictures(capsys, monkeypatch) -> None:
    import sys

    for name in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    print_tables(rows())
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["gates:", "best", "30.50"] in lines and ["dense", "30.00"] in lines
    assert "Summary: density 0.1" in out and "Measured" not in out


def test_report_names_what_must_be_installed(tmp_path, monkeypatch) -> None:
    import sys

    for module in [name for name in sys.modules if name.startswith(("jinja2", "seerattn.report.render.page"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="jinja2"):
        write_report([written(tmp_path / "r.jsonl", rows())], tmp_path / "out")


def test_report_rejects_missing_and_empty_files_and_writes_nothing(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for path in (tmp_path / "none.jsonl", tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match=path.name):
            write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAMES = ["[/]", "a|b", "<script>alert(1)</script>", "new\nline", "\x1b[2Jclear", "$x$", "\ud800", "*stars*", "`code`"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_as_they_are_and_mark_nothing_up(tmp_path, capsys, name: str) -> None:
    named = [replace(r, model=name, text=name, name=name if r.method == "gate" else r.name) for r in rows()]
    write_report([written(tmp_path / "r.jsonl", named)], tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    heads = [line for line in lines if line.startswith("| method")]
    # Cells of a table are divided by bars that nothing escapes; a name makes no cell, no line and no tag.
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert heads and len(set(cells)) <= len(heads)
    assert "<script" not in table and "\x1b" not in table
    assert all(not re.search(r"(?<!\\)[*`]", line) for line in lines if name.strip("*`") in line)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page
    assert html.escape(visible(name)) in page
    print_tables(named)
    assert f"gates: {visible(name)}" in capsys.readouterr().out


def test_a_report_replaces_reports_and_nothing_else(tmp_path) -> None:
    path = written(tmp_path / "r.jsonl", rows())
    made = write_report([path], tmp_path / "out")
    assert write_report([path], tmp_path / "out") == made
    before = {path: path.read_bytes() for path in made}
    for file in made:
        file.write_bytes(b"mine")
        with pytest.raises(ValueError, match=file.name):
            write_report([path], tmp_path / "out")
        assert file.read_bytes() == b"mine"
        file.write_bytes(before[file])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_leaves_no_part_of_a_report(tmp_path, monkeypatch) -> None:
    path = written(tmp_path / "r.jsonl", rows())
    write_report([path], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    copy, copied = report.shutil.copyfile, []

    def full(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 3:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(report.shutil, "copyfile", full)
    for folder in ("out", "new"):
        copied.clear()
        with pytest.raises(OSError):
            write_report([path], tmp_path / folder)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list((tmp_path / "new").iterdir())


def test_a_report_goes_into_folders_alone(tmp_path) -> None:
    path = written(tmp_path / "r.jsonl", rows())
    for output in (path, path / "out"):
        with pytest.raises(ValueError, match="output"):
            write_report([path], output)


def test_maps_replace_maps_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "maps.npz"
    ones = np.ones((1, 2, 2), np.float32)
    found = BlockMaps([(0, 0)], ones, ones, ones > 0, np.eye(2) > 0, "g", 0.5)
    found.save(path)
    found.save(path)
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="maps"):
        found.save(path)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "change",
    [{"target": np.ones((1, 3, 2), np.float32)}, {"chosen": np.ones((1, 2, 2))}, {"forced": np.zeros((2, 2)) > 0},
     {"gate": np.full((1, 2, 2), np.nan, np.float32)}, {"density": np.nan}, {"heads": np.zeros((0, 2), int)},
     {"systems": ["a", "b"], "kept": np.ones((1, 1, 2, 2)) > 0}, {"systems": ["a"], "kept": np.ones((1, 1, 2, 2))}],
    ids=str,
)  # fmt: skip
def test_maps_that_do_not_belong_together_are_refused(tmp_path, change: dict) -> None:
    ones = np.ones((1, 2, 2), np.float32)
    good = {"heads": [(0, 0)], "target": ones, "gate": ones, "chosen": ones > 0, "forced": np.eye(2) > 0}
    np.savez(tmp_path / "maps.npz", **good | {"gates": "g", "density": 0.5} | change)
    with pytest.raises(ValueError, match="maps"):
        write_report([tmp_path / "maps.npz"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
