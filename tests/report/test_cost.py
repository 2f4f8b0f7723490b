"""What sparse attention costs beside dense attention: its tables and its figure, on made-up records."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from matplotlib.container import ErrorbarContainer
from rows import lines, of, section

from seerattn.report.figures import teachers
from seerattn.report.names import map_name, map_of
from seerattn.report.parts import Table
from seerattn.report.select import PER_HEAD, latest
from seerattn.report.tables.cost import compared, over
from seerattn.report.tables.gap import closed
from seerattn.results.record import Result
from seerattn.selection.map_form import MapForm

DENSE = (3.0, 3.5)
TOKENS = 100
# Nats a token over dense, on the first and the second document, at densities .2 and .1.
LOSSES = {
    "oracle": ((0.02, 0.04), (0.10, 0.14)),
    "oracle sum:2": ((0.01, 0.01), (0.04, 0.06)),
    "oracle sum:2, budgets per head": ((0.00, 0.01), (0.03, 0.05)),
    "streaming": ((0.06, 0.08), (0.20, 0.24)),
    "fine": ((0.02, 0.03), (0.08, 0.12)),
    "fine, budgets per head": ((0.02, 0.02), (0.07, 0.10)),
    "power-2": ((0.03, 0.05), (0.11, 0.15)),
}
# Log-probabilities of the answers to two documents, at density .1.
ANSWERS = {"dense": (-4.0, -6.0), "streaming": (-20.0, -26.0), "fine": (-5.0, -9.0)}
ANSWERS |= {"fine, budgets per head": (-5.0, -6.5), "oracle sum:2": (-3.0, -6.0)}


def result(what: str, name: str, density: float | None, value: float, **more) -> Result:
    shared = name.endswith(PER_HEAD)
    realised = 1.0 if density is None else round(density + (0.001 if shared else 0.006), 3)
    values = of(name) | {"model": "m", "device": "a GPU", "realised_density": realised}
    return Result(what=what, value=value, density=density, **values | more)


def perplexity(name: str, density: float | None, nats: Sequence[float], text: str = "books") -> list[Result]:
    losses = [TOKENS * (base + more) for base, more in zip(DENSE, nats)]
    more = {"n": 2 * TOKENS, "unit": "tokens", "context": 8192, "text": text, "cell": {"data": "abc"}}
    value = math.exp(sum(losses) / (2 * TOKENS))
    samples = {"documents": [0, 1], "losses": losses, "tokens": [TOKENS, TOKENS]}
    row = result("perplexity", name, density, value, samples=samples, stderr=1.0, **more)
    if name == "dense":
        return [row]
    base = math.exp(sum(DENSE) / 2)
    return [row, result("perplexity_difference", name, density, value - base, stderr=0.25, **more)]


def answers(name: str, density: float | None, found: Sequence[float], context: int = 4096) -> list[Result]:
    cell = {"task": "passkey", "data": "def", "documents": 1}
    more = {"n": 1, "unit": "documents", "context": context, "text": "books", "seed": 1}
    return [
        result("accuracy", name, density, 0.0, cell=cell | {"depth": depth}, samples={"log_prob": [value]}, **more)
        for depth, value in zip((0.1, 0.9), found)
    ]


def made_up() -> list[Result]:
    rows = perplexity("dense", None, (0, 0)) + answers("dense", None, ANSWERS["dense"])
    for name, losses in LOSSES.items():
        for density, nats in zip((0.2, 0.1), losses):
            rows += perplexity(name, density, nats)
        if name in ANSWERS:
            rows += answers(name, 0.1, ANSWERS[name])
    return latest(rows)


def by_start(start: str, rows: Sequence[Result] | None = None) -> Table:
    tables = section(made_up() if rows is None else rows, "cost").parts
    return next(table for table in tables if table.title.startswith(start))


def percent(nats: float) -> float:
    return 100 * (math.exp(nats) - 1)


def test_a_cost_is_the_ratio_of_perplexities_with_the_error_of_paired_losses() -> None:
    dense, row = perplexity("dense", None, (0, 0))[0], perplexity("oracle", 0.1, (0.10, 0.14))[0]
    value, error = over(row, dense)
    assert value == pytest.approx(percent(0.12))
    # Two documents of equal length: the standard error of the mean of .10 and .14 is .02, of the ratio that times it.
    assert error == pytest.approx(100 * math.exp(0.12) * 0.02)


def test_the_short_table_matches_a_written_out_one() -> None:
    table = by_start("In short")
    # One of the gates has no budgets, so lines say which.
    assert table.title == "In short: 8,192 tokens, m"
    base, gap = math.exp(3.25), math.exp(0.22) - math.exp(0.04)
    shares = [f"{(math.exp(0.22) - math.exp(nats)) / gap:.0%}" for nats in (0.085, 0.13)]
    assert lines(table) == [
        # Answers were asked for at .1 alone, and the line of gates with budgets stands for them.
        ["", "books 0.1 (0.101 to 0.106)", "gap closed, books 0.1", "passkey 4k 0.1 (0.101 to 0.106)"],
        ["dense", f"{base:.2f}", "", "-5.00"],
        ["best oracle: power 2, budgets per head", f"{percent(0.04):+.1f} ± 1.0 %", "100%", ""],
        ["gates: fine, budgets per head", f"{percent(0.085):+.1f} ± 1.6 %", shares[0], "-0.8 ± 0.2"],
        ["gates: power-2", f"{percent(0.13):+.1f} ± 2.3 %", shares[1], ""],
        ["streaming", f"{percent(0.22):+.1f} ± 2.5 %", "0%", "-18.0 ± 2.0"],
    ]
    assert "books: 2 documents, 200 tokens; answers: 2 documents each" in table.notes[1]
    assert table.notes[1].endswith("Measured on a GPU.")


def test_the_short_table_says_once_what_all_gates_have() -> None:
    table = by_start("In short", [r for r in made_up() if r.name != "power-2"])
    assert [line.name for line in table.lines][2:] == ["gates: fine", "streaming"]
    assert "All gates with budgets per head." in table.notes[0] and "All gates" not in by_start("In short").notes[0]


def test_the_long_tables_have_every_line_and_both_kinds_of_heads() -> None:
    head, *body = lines(by_start("Perplexity over dense"))
    assert head == ["method", "books 0.2 (0.201 to 0.206)", "books 0.1 (0.101 to 0.106)"]
    assert [line[0] for line in body] == [
        "dense",
        "oracle by published map",
        "oracle by power 2",
        "oracle by power 2, budgets per head",
        "gates: fine",
        "gates: fine, budgets per head",
        "gates: power-2",
        "streaming",
    ]
    assert body[4][1:] == [f"{percent(0.025):+.2f} ± 0.51 %", f"{percent(0.10):+.2f} ± 2.21 %"]
    told = {line[0]: line[1] for line in lines(by_start("Answers"))[1:]}
    # -1 and -3 against dense; -1 and -.5.
    assert told["gates: fine"] == "-2.00 ± 1.00" and told["gates: fine, budgets per head"] == "-0.75 ± 0.25"
    assert set(told) == {"dense", "oracle by power 2", "gates: fine", "gates: fine, budgets per head", "streaming"}
    assert told["dense"] == "-5.00"


def test_what_budgets_change_is_told_of_lines_that_have_both() -> None:
    head, *body = lines(by_start("Budgets per head over equal heads"))
    assert [line[0] for line in body] == ["oracle by power 2", "gates: fine"] and len(head) == 4
    # At .1 the gates lose .07 and .10 instead of .08 and .12, and answer by 0 and 2.5 nats better.
    assert body[1][2].split()[0] == f"{percent(-0.015):+.2f}" and body[1][3] == "+1.25 ± 1.25"


def test_costs_are_told_where_several_maps_were_compared_and_of_rows_without_losses_without_errors() -> None:
    one_map = [r for r in made_up() if "target" not in r.settings]
    assert not section(one_map, "cost").parts
    bare = [r if r.what != "perplexity" else replace(r, samples={}) for r in made_up()]
    assert fine(by_start("Perplexity", bare))[2] == f"{percent(0.10):+.2f} %"


def fine(table: Table) -> list[str]:
    return next(line for line in lines(table) if line[0] == "gates: fine")


@pytest.mark.parametrize(
    "samples",
    [{}, {"losses": [1.0], "tokens": [1, 1]}, {"losses": [1.0, None], "tokens": [1, 1]},
     {"losses": [1.0, 2.0], "tokens": [0, 0]}, {"losses": [1e6, 2e6], "tokens": [1, 1]}],
    ids=str,
)  # fmt: skip
def test_damaged_samples_cost_an_error_and_no_report(samples: dict) -> None:
    damaged = {"documents": [0, 1]} | samples
    rows = [replace(r, samples=damaged) if r.name == "fine" and r.samples else r for r in made_up()]
    assert fine(by_start("Perplexity", rows))[2] == f"{percent(0.10):+.2f} %"
    assert all(map(teachers.draw, teachers.groups(rows)))
    assert not section([replace(r, density=None) for r in rows], "cost").parts


def test_gates_with_budgets_and_with_equal_heads_stand_apart_and_replace_their_former() -> None:
    rows = made_up()
    assert {r.name for r in rows if r.method == "gate"} == {"fine", f"fine{PER_HEAD}", "power-2"}
    anew = [r for r in perplexity("fine, budgets per head", 0.1, (0.0, 0.0)) if r.what == "perplexity"]
    anew = [replace(r, settings={"budgets": "other"}) for r in anew]
    found = [r for r in latest([*rows, *anew]) if (r.what, r.name, r.density) == ("perplexity", f"fine{PER_HEAD}", 0.1)]
    assert [r.value for r in found] == [pytest.approx(math.exp(3.25))]
    assert latest(rows) == rows


def test_the_gap_ends_at_the_best_oracle_of_its_density() -> None:
    rows = [r for r in made_up() if r.what == "perplexity"]
    row = next(r for r in rows if r.name == "power-2" and r.density == 0.1)
    found = closed(row, rows)
    assert found.oracle.name == f"oracle sum:2{PER_HEAD}"
    assert found.share == pytest.approx((math.exp(0.22) - math.exp(0.13)) / (math.exp(0.22) - math.exp(0.04)))
    published = closed(row, [r for r in rows if "target" not in r.settings])
    assert published.oracle.name == "oracle"
    assert published.share == pytest.approx((math.exp(0.22) - math.exp(0.13)) / (math.exp(0.22) - math.exp(0.12)))
    (table,) = section(made_up(), "gap").parts
    name = "oracle by power 2, budgets per head"
    assert f"{name} at 0.2, {name} at 0.1" in table.groups["8,192 tokens"]


def test_oracles_are_told_by_the_map_that_records_name() -> None:
    (row, _) = perplexity("oracle sum:4", 0.1, (0, 0))
    assert map_of(row) == MapForm("sum", 4) and map_name(MapForm("max", 2)) == "max:2"
    assert map_of(replace(row, method="gate", kind="learned")) is None


def test_the_figure_shows_maps_and_gates_with_errors_at_realised_densities() -> None:
    (one,) = teachers.groups(made_up())
    left, right = teachers.draw(one).axes
    found = [{c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)} for axes in (left, right)]
    shared = f"_oracle sum:2{PER_HEAD}"
    assert set(found[0]) == {"oracle", "oracle by power 2", shared, "streaming"}
    assert set(found[1]) == {"gates: fine", f"_fine{PER_HEAD}", "gates: power-2", "streaming"}
    assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim()
    points = found[0][shared][0].get_xydata().tolist()
    assert points == [pytest.approx([0.201, percent(0.005)]), pytest.approx([0.101, percent(0.04)])]
    bars = found[0]["oracle"][2][0].get_segments()
    assert bars[1][1][1] - bars[1][0][1] == pytest.approx(2 * 100 * math.exp(0.12) * 0.02)
    # Budgets per head look like the same line with equal heads, but for their dashes.
    equal, budgets = found[0]["oracle by power 2"][0], found[0][shared][0]
    assert equal.get_color() == budgets.get_color() != found[0]["oracle"][0].get_color()
    assert (equal.get_linestyle(), budgets.get_linestyle()) == ("-", "--")
    assert not teachers.groups([r for r in made_up() if "target" not in r.settings])


def test_models_are_told_apart() -> None:
    rows = made_up()
    assert [one.model for one in compared([*rows, *(replace(r, model="other") for r in rows)])] == ["m", "other"]
