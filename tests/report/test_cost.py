"""What sparse attention costs beside dense attention: its tables and its figure, on made-up records."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer

from seerattn.report import style
from seerattn.report.cost import cost_section, cost_tables, measured, over
from seerattn.report.gap import closed
from seerattn.report.names import map_name, map_of, name_of, teacher_of
from seerattn.report.parts import Table
from seerattn.report.select import PER_HEAD, latest
from seerattn.report.table import render_tables
from seerattn.report.teachers_figure import draw_teachers
from seerattn.results.record import Result
from seerattn.selection.map_form import PUBLISHED, MapForm

DENSE = (3.0, 3.5)
TOKENS = 100
# Nats a token over dense, on the first and the second document, at densities .2 and .1.
LOSSES = {
    "oracle": ((0.02, 0.04), (0.10, 0.14)),
    "oracle sum:2": ((0.01, 0.01), (0.04, 0.06)),
    "oracle sum:2, budgets per head": ((0.00, 0.01), (0.03, 0.05)),
    "streaming": ((0.06, 0.08), (0.20, 0.24)),
    "gate fine": ((0.02, 0.03), (0.08, 0.12)),
    "gate fine, budgets": ((0.02, 0.02), (0.07, 0.10)),
    "gate power-2": ((0.03, 0.05), (0.11, 0.15)),
}
# Log-probabilities of the answers to two documents, at density .1.
ANSWERS = {"dense": (-4.0, -6.0), "streaming": (-20.0, -26.0), "gate fine": (-5.0, -9.0)}
ANSWERS |= {"gate fine, budgets": (-5.0, -6.5), "oracle sum:2": (-3.0, -6.0)}


def result(what: str, arm: str, density: float | None, value: float, *, cell: dict, **more) -> Result:
    gates = arm.removeprefix("gate ").removesuffix(", budgets") if arm.startswith("gate ") else None
    policy = None if arm == "dense" else {"policy": "TopK", "density": density, "last_rows_dense": 0}
    if gates is not None and not arm.endswith(", budgets"):
        policy["heads"] = "equal"
    return Result(
        what=what,
        value=value,
        selector="gate" if gates else arm,
        gates=gates,
        density=density,
        policy=policy,
        realised_density=1.0 if arm == "dense" else round(density + (0.001 if "budgets" in arm else 0.006), 3),
        model="m",
        device="a GPU",
        cell=cell | ({"budgets": "b7e1"} if "budgets" in arm else {}),
        **more,
    )


def perplexity(arm: str, density: float | None, nats: Sequence[float], text: str = "books") -> list[Result]:
    losses = [TOKENS * (base + more) for base, more in zip(DENSE, nats)]
    more = {"n": 2 * TOKENS, "unit": "tokens", "context": 8192, "text": text, "cell": {"data": "abc"}}
    value = math.exp(sum(losses) / (2 * TOKENS))
    samples = {"documents": [0, 1], "losses": losses, "tokens": [TOKENS, TOKENS]}
    row = result("perplexity", arm, density, value, samples=samples, stderr=1.0, **more)
    if arm == "dense":
        return [row]
    base = math.exp(sum(DENSE) / 2)
    return [row, result("perplexity_difference", arm, density, value - base, stderr=0.25, **more)]


def answers(arm: str, density: float | None, found: Sequence[float], context: int = 4096) -> list[Result]:
    cell = {"task": "passkey", "data": "def", "documents": 1}
    more = {"n": 1, "unit": "documents", "context": context, "text": "books", "seed": 1}
    return [
        result("accuracy", arm, density, 0.0, cell=cell | {"depth": depth}, samples={"log_prob": [value]}, **more)
        for depth, value in zip((0.1, 0.9), found)
    ]


def made_up() -> list[Result]:
    rows = perplexity("dense", None, (0, 0)) + answers("dense", None, ANSWERS["dense"])
    for arm, of in LOSSES.items():
        for density, nats in zip((0.2, 0.1), of):
            rows += perplexity(arm, density, nats)
        if arm in ANSWERS:
            rows += answers(arm, 0.1, ANSWERS[arm])
    return latest(rows)


def by_start(start: str, rows: Sequence[Result] | None = None) -> Table:
    return next(table for table in cost_tables(made_up() if rows is None else rows) if table.title.startswith(start))


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
    assert table.title == "In short: 8192 tokens, m"
    # Answers were asked for at .1 alone, and the line of gates with budgets stands for them.
    assert table.head == ["", "books 0.1 (0.101 to 0.106)", "gap closed, books 0.1", "passkey 4k 0.1 (0.101 to 0.106)"]
    base, gap = math.exp(3.25), math.exp(0.22) - math.exp(0.04)
    shares = [f"{(math.exp(0.22) - math.exp(nats)) / gap:.0%}" for nats in (0.085, 0.13)]
    assert table.body == [
        ["dense", f"{base:.2f}", "", "-5.00"],
        ["best oracle: power 2, budgets per head", f"{percent(0.04):+.1f} ± 1.0 %", "100%", ""],
        ["gates: fine, budgets per head", f"{percent(0.085):+.1f} ± 1.6 %", shares[0], "-0.8 ± 0.2"],
        ["gates: power-2", f"{percent(0.13):+.1f} ± 2.3 %", shares[1], ""],
        ["streaming", f"{percent(0.22):+.1f} ± 2.5 %", "0%", "-18.0 ± 2.0"],
    ]
    assert "books: 2 documents, 200 tokens; answers: 2 documents each" in table.notes[1]
    assert table.notes[1].endswith("Measured on a GPU.")


def test_the_short_table_says_once_what_all_gates_have() -> None:
    table = by_start("In short", [r for r in made_up() if r.arm != "power-2"])
    assert [line[0] for line in table.body][2:] == ["gates: fine", "streaming"]
    assert "All gates with budgets per head." in table.notes[0] and "All gates" not in by_start("In short").notes[0]


def test_the_long_tables_have_every_arm_and_both_kinds_of_heads() -> None:
    table = by_start("Perplexity over dense")
    assert table.head == ["selector", "books 0.2 (0.201 to 0.206)", "books 0.1 (0.101 to 0.106)"]
    assert [line[0] for line in table.body] == [
        "dense",
        "oracle, published map",
        "oracle, power 2",
        "oracle, power 2, budgets per head",
        "fine",
        "fine, budgets per head",
        "power-2",
        "streaming",
    ]
    assert table.body[4][1:] == [f"{percent(0.025):+.2f} ± 0.51 %", f"{percent(0.10):+.2f} ± 2.21 %"]
    told = {line[0]: line[1] for line in by_start("Answers").body}
    # -1 and -3 against dense; -1 and -.5.
    assert told["fine"] == "-2.00 ± 1.00" and told["fine, budgets per head"] == "-0.75 ± 0.25"
    assert set(told) == {"dense", "oracle, power 2", "fine", "fine, budgets per head", "streaming"}
    assert told["dense"] == "-5.00"


def test_costs_are_told_where_several_maps_were_compared_and_of_rows_without_losses_without_errors() -> None:
    one_map = [r for r in made_up() if "sum:2" not in r.selector]
    assert not cost_tables(one_map) and cost_section(one_map) is None
    assert "Perplexity over dense" in render_tables(made_up())
    bare = [r if r.what != "perplexity" else type(r)(**{**vars(r), "samples": {}}) for r in made_up()]
    line = next(line for line in by_start("Perplexity", bare).body if line[0] == "fine")
    assert line[2] == f"{percent(0.10):+.2f} %"


@pytest.mark.parametrize(
    "samples",
    [{}, {"losses": [1.0], "tokens": [1, 1]}, {"losses": [1.0, None], "tokens": [1, 1]},
     {"losses": [1.0, 2.0], "tokens": [0, 0]}, {"losses": [1e6, 2e6], "tokens": [1, 1]}],
    ids=str,
)  # fmt: skip
def test_damaged_samples_cost_an_error_and_no_report(samples: dict, tmp_path: Path) -> None:
    rows = [
        type(r)(**{**vars(r), "samples": {"documents": [0, 1]} | samples}) if r.arm == "fine" and r.samples else r
        for r in made_up()
    ]
    line = next(line for line in by_start("Perplexity", rows).body if line[0] == "fine")
    assert line[2] == f"{percent(0.10):+.2f} %"
    draw_teachers(rows, tmp_path)
    assert not cost_tables([type(r)(**{**vars(r), "density": None}) for r in rows])


def test_gates_with_budgets_and_with_equal_heads_stand_apart_and_replace_their_former() -> None:
    rows = made_up()
    arms = {r.arm for r in rows if r.gates}
    assert arms == {"fine", f"fine{PER_HEAD}", "power-2"}
    anew = [r for r in perplexity("gate fine, budgets", 0.1, (0.0, 0.0)) if r.what == "perplexity"]
    anew = [type(r)(**{**vars(r), "cell": r.cell | {"budgets": "other"}}) for r in anew]
    found = [r for r in latest([*rows, *anew]) if (r.what, r.arm, r.density) == ("perplexity", f"fine{PER_HEAD}", 0.1)]
    assert [r.value for r in found] == [pytest.approx(math.exp(3.25))]
    assert latest(rows) == rows


def test_the_gap_ends_at_the_best_oracle_of_its_density() -> None:
    rows = [r for r in made_up() if r.what == "perplexity"]
    row = next(r for r in rows if r.arm == "power-2" and r.density == 0.1)
    found = closed(row, rows)
    assert found.oracle == f"oracle sum:2{PER_HEAD}"
    assert found.share == pytest.approx((math.exp(0.22) - math.exp(0.13)) / (math.exp(0.22) - math.exp(0.04)))
    published = closed(row, [r for r in rows if "sum" not in r.selector])
    assert published.oracle == "oracle"
    assert published.share == pytest.approx((math.exp(0.22) - math.exp(0.13)) / (math.exp(0.22) - math.exp(0.12)))
    table = render_tables(made_up())
    assert "Share of the gap from streaming to the best oracle that is closed" in table
    assert f"The best: oracle sum:2{PER_HEAD} at 0.2, oracle sum:2{PER_HEAD} at 0.1." in table


@pytest.mark.parametrize(
    ("gates", "form"),
    [
        ("published", PUBLISHED),
        ("largest-salient", PUBLISHED),
        ("mass", MapForm("sum", 1)),
        ("power-2", MapForm("sum", 2)),
        ("power-4-fine", MapForm("sum", 4)),
        ("power-2.5", MapForm("sum", 2.5)),
        ("power-0", None),
        ("power-4k", None),
        ("massive", None),
        ("fine", None),
    ],
)
def test_names_of_gates_tell_their_teacher(gates: str, form: MapForm | None) -> None:
    (row, _) = perplexity(f"gate {gates}", 0.1, (0, 0))
    assert teacher_of(row) == form and map_of(row) is None


def test_names_of_oracles_tell_their_map() -> None:
    names = {"oracle": "oracle", "oracle sum:4": "oracle by power 4", "oracle sum:inf": "oracle by largest row"}
    names |= {f"oracle sum:1{PER_HEAD}": f"oracle by mass{PER_HEAD}", "oracle-32": "oracle-32"}
    for selector, name in names.items():
        assert name_of(perplexity(selector, 0.1, (0, 0))[0]) == name
    assert map_of(perplexity("oracle-32", 0.1, (0, 0))[0]) is None
    assert map_name(MapForm("max", 2)) == "max:2"


def test_the_figure_shows_maps_and_gates_with_errors_at_realised_densities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(style, "save", lambda figure, folder, name: drawn.update({name: figure}) or [])
    draw_teachers(made_up(), tmp_path)
    left, right = drawn["teachers"].axes
    lines = [{c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)} for axes in (left, right)]
    assert set(lines[0]) == {"published", "power 2", "_power 2, per head", "streaming"}
    assert set(lines[1]) == {"fine", "_fine, per head", "power-2", "streaming"}
    assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim()
    points = lines[0]["_power 2, per head"][0].get_xydata().tolist()
    assert points == [pytest.approx([0.201, percent(0.005)]), pytest.approx([0.101, percent(0.04)])]
    bars = lines[0]["published"][2][0].get_segments()
    assert bars[1][1][1] - bars[1][0][1] == pytest.approx(2 * 100 * math.exp(0.12) * 0.02)
    colours = [{name: line[0].get_color() for name, line in of.items()} for of in lines]
    assert colours[0]["power 2"] == colours[0]["_power 2, per head"] == colours[1]["power-2"]
    assert len({*colours[0].values(), *colours[1].values()}) == 4
    assert lines[0]["power 2"][0].get_linestyle() == "-" and lines[0]["_power 2, per head"][0].get_linestyle() == "--"
    assert not draw_teachers([r for r in made_up() if "sum" not in r.selector], tmp_path)


def test_models_are_told_apart() -> None:
    rows = made_up()
    other = [type(r)(**{**vars(r), "model": "other"}) for r in rows]
    assert [one.model for one in measured([*rows, *other])] == ["m", "other"]
