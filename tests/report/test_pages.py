"""The project's pages, against the records that they are drawn from."""

import re

import pytest
from docs_scripts import docs_script
from written_tables import ROOT, records, text_of

from seerattn.report.select import last_rows_dense, latest
from seerattn.report.tables.cost import answers_over, compared, over
from seerattn.results.record import Result

draw_pages = docs_script("draw_pages")


def numbers(text: str) -> set[float]:
    """Numbers of a text; one of thousands may have a comma."""
    return {float(number.replace(",", "")) for number in re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)", text)}


def section(page: str, title: str) -> str:
    """A section of a page without its drawn tables."""
    text = re.sub(r"<!-- drawn.*?<!-- end -->", "", text_of(page), flags=re.DOTALL)
    return re.split(r"^#+ ", text[text.index(f"# {title}\n") :], flags=re.MULTILINE)[1]


@pytest.mark.parametrize("page", draw_pages.PAGES)
def test_tables_of_the_pages_are_those_that_are_drawn(page: str) -> None:
    """Where this fails `python docs/draw_pages.py` mends it."""
    text = text_of(page)
    assert draw_pages.redrawn(page, text) == text
    # A comment that is misspelt draws nothing.
    assert text.count("<!-- drawn") == text.count("<!-- end -->") == len(draw_pages.names(text)) > 0


def test_every_table_that_is_declared_stands_on_a_page() -> None:
    shown = {name for page in draw_pages.PAGES for name in draw_pages.names(text_of(page))}
    assert shown == set(draw_pages.TABLES)


def test_a_table_that_was_changed_by_hand_is_found_and_drawn_again(tmp_path, monkeypatch, capsys) -> None:
    page = text_of("README.md")
    changed = page.replace("| streaming |", "| streaming, retyped |", 1)
    assert draw_pages.redrawn("README.md", changed) == page
    (tmp_path / "README.md").write_text(changed)
    monkeypatch.setattr(draw_pages, "ROOT", tmp_path)
    monkeypatch.setattr(draw_pages, "_drawn", lambda name, folder: "another table")
    assert draw_pages.main(["--check", "README.md"]) == 1
    assert (tmp_path / "README.md").read_text() == changed
    assert draw_pages.main(["README.md"]) == 0 and draw_pages.main(["--check", "README.md"]) == 0


def test_figures_of_the_pages_are_there_and_drawn_ones_have_records() -> None:
    for page in draw_pages.PAGES:
        for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(page)):
            assert (ROOT / page).parent.joinpath(figure).is_file(), (page, figure)
    for figure, (_, names) in draw_pages.FIGURES.items():
        assert (ROOT / "docs" / "figures" / figure).is_file() and all(draw_pages.path(name).is_file() for name in names)


def test_numbers_of_the_page_on_targets_are_those_of_the_records() -> None:
    (one,) = compared(latest(records("smollm2-targets")))
    perplexity, answers = ({(p.name, p.density): p for p in places} for places in (one.perplexity, one.answers))

    def loss(line: str, text: str = "books", density: float = 0.1) -> float:
        place = perplexity[f"{text}-test", density]
        return round(over(place.rows[line][0], place.dense[0]).value, 1)

    def nats(line: str) -> list[float]:
        place = answers["passkey 4k", 0.1]
        value, error = answers_over(place.rows[line], place.dense)
        return [round(abs(value), 1), round(error, 1)]

    published, two, four = "oracle", "oracle sum:2", "oracle sum:4"
    told = {loss(published), loss(two), loss(published, density=0.2), loss(two, density=0.2)}
    told |= {loss("streaming", density=0.05), loss(published, density=0.05), nats("oracle sum:1")[0]}
    told |= {*nats(two), *nats(four), loss(four), loss(two, "proofs"), loss(four, "proofs")}
    for gates in ("power-2", "power-4", "largest"):
        told |= {loss(gates), loss(gates, "proofs"), nats(gates)[0]}
    assert told <= numbers(section("docs/targets.md", "Teachers"))


def test_counts_of_cells_on_the_comparison_page_are_those_of_the_records(compared: list[Result]) -> None:
    cells: dict[tuple, list[Result]] = {}
    for r in compared:
        if r.what in ("perplexity", "accuracy") and r.kind != "dense" and not last_rows_dense(r):
            place = (r.what, r.context, r.text, r.cell.get("task"))
            cells.setdefault((place, r.line, r.density), []).append(r)
    counts: dict[tuple, list[bool]] = {}
    for (place, _, density), rows in cells.items():
        off = abs(sum(r.realised_density for r in rows) / len(rows) - density)
        counts.setdefault(place, []).append(off <= 0.01 + 1e-9)
    text = " ".join(text_of("docs/comparison.md").split())
    for place, near in counts.items():
        assert f" {sum(near)} of {len(near)} cells are within 0.01 of " in text, place
