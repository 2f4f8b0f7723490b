"""The summary: its table against a written-out one, and which arms its figure shows."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer

from seerattn.report import style
from seerattn.report.names import name_of
from seerattn.report.summary import summary_tables
from seerattn.report.summary_figure import draw_summary, representatives
from seerattn.results.record import Result


def result(what: str, arm: str, density: float | None, value: float, **more) -> Result:
    gates = arm.removeprefix("gate ") if arm.startswith("gate ") else None
    values = {
        "n": 20,
        "unit": "documents",
        "model": "m",
        "context": 8192,
        "text": "books",
        "gates": gates,
        "selector": "gate" if gates else arm,
        "policy": None if arm == "dense" else {"last_rows_dense": 0},
        "realised_density": 1.0 if arm == "dense" else density,
        "cell": {"task": "passkey", "documents": 20, "depth": 0.5} if what == "accuracy" else {"windows": 1},
    }
    return Result(what=what, value=value, density=density, **values | more)


def measured() -> list[Result]:
    rows = [result("perplexity", "dense", None, 20.0), result("accuracy", "dense", None, 1.0)]
    for depth, right in ((0.2, 9), (0.8, 16)):
        cell = {"task": "passkey", "documents": 20, "depth": depth}
        rows.append(result("accuracy", "gate best", 0.1, right / 20, cell=cell, realised_density=0.105))
    rows += [result("perplexity", "gate best", density, 21.0, realised_density=0.1) for density in (0.1, 0.5)]
    rows.append(result("perplexity", "gate best", 0.1, 7.5, text="proofs", realised_density=0.092))
    rows.append(result("perplexity", "moa", 0.1, 30.0, realised_density=0.2))
    # Left out: another context, dense last rows, a density without retrieval.
    rows += [result(what, "gate best", 0.1, 0.5, context=4096) for what in ("perplexity", "accuracy")]
    rows.append(result("perplexity", "gate best", 0.1, 99.0, policy={"last_rows_dense": 2}))
    return rows


def test_summary_matches_a_written_out_table() -> None:
    (table,) = summary_tables(measured())
    assert table.title == "Summary: density 0.1, 8192 tokens, m"
    assert table.head == ["selector", "density", "perplexity, books", "perplexity, proofs", "passkey"]
    assert table.body == [
        ["dense", "1", "20.00", "", "1.00"],
        # 25 of 40.
        ["best", "0.092 to 0.105", "21.00", "7.50", "0.62"],
        ["moa", "0.200", "30.00 at 0.200", "", ""],
    ]
    assert "20 or 40 documents a retrieval task" in table.notes[0]
    assert not summary_tables([r for r in measured() if r.what == "perplexity"])


def test_summary_keeps_other_documents_and_other_weights_apart() -> None:
    rows = measured()
    other = replace(rows[0], cell={"windows": 9}, value=50.0)
    (table,) = summary_tables([*rows, other])
    assert table.head[2:5] == ["perplexity, books", "perplexity, books (2)", "perplexity, proofs"]
    assert table.body[0][2:5] == ["20.00", "50.00", ""]
    trained = [replace(r, weights={"model": "w"}) for r in rows]
    assert len(summary_tables([*rows, *trained])) == 2


def rows_of(losses: dict[str, float], densities: tuple[float, ...] = (0.2, 0.1)) -> list[Result]:
    return [result("perplexity", arm, None if arm == "dense" else d, v) for arm, v in losses.items() for d in densities]


def test_representatives_are_one_of_each_family_and_three_gates() -> None:
    losses = {"dense": 20, "oracle": 20.5, "streaming": 25, "random": 40, "minference paper": 23, "vertical_slash": 22}
    losses |= {f"gate g{i}": 21 + i / 10 for i in range(5)}
    losses |= {"xattention": 30, "xattention-8": 28, "own_idea": 26, "moa": 27}
    rows = rows_of(losses)
    # The second of two systems that there is room for is the next best family, not the next best arm.
    assert representatives(rows) == ["dense", "oracle", "g0", "g2", "g4", "own_idea", "vertical_slash", "streaming"]
    few = [r for r in rows if r.gates in (None, "g3") and r.selector != "oracle"]
    assert representatives(few) == [
        "dense",
        "g3",
        "moa",
        "own_idea",
        "vertical_slash",
        "xattention-8",
        "streaming",
    ]


def test_an_arm_that_missed_a_density_does_not_stand_for_its_family() -> None:
    rows = rows_of({"minference paper": 21, "minference repository": 23})
    rows = [replace(r, realised_density=0.3) if r.value == 21 and r.density == 0.1 else r for r in rows]
    assert representatives(rows) == ["minference repository"]


def test_summary_figure_shows_realised_densities_of_its_arms_in_colours_of_their_own(
    compared: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(style, "save", lambda figure, folder, name: drawn.update({name: figure}) or [])
    draw_summary(compared, tmp_path)
    (figure,) = drawn.values()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "books-test, 8,192 tokens",
        "proofs-test, 8,192 tokens",
    ]
    (axes, _), by_name = figure.axes, {name_of(r): r.arm for r in compared}
    lines = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    assert len({c[0].get_color() for c in lines.values()}) == len(lines) == 7
    assert {text.get_text() for text in axes.texts} == {*lines, "dense"}
    for name, line in lines.items():
        rows = [r for r in compared if (r.arm, r.what, r.text) == (by_name[name], "perplexity", "books-test")]
        rows = [r for r in rows if r.context == 8192 and not r.policy["last_rows_dense"]]
        expected = sorted(((r.realised_density, r.value) for r in rows), reverse=True)
        assert line[0].get_xydata().tolist() == pytest.approx([pytest.approx(point) for point in expected])
    # Drawn once more it is not needed where every arm is in it.
    drawn.clear()
    draw_summary(rows_of({"dense": 20, "oracle": 21, "streaming": 22}), tmp_path)
    assert not drawn


def test_no_two_arms_look_the_same(compared: list[Result]) -> None:
    looks = style.looks(compared)
    assert len(looks) == 20 and len({tuple(map(str, look.values())) for look in looks.values()}) == 20
    family = [looks[name] for name in ("xattention 64", "xattention 64 profile", "xattention 128")]
    assert [len({str(look[name]) for look in family}) for name in ("color", "linestyle", "marker")] == [1, 3, 3]
    many = rows_of({f"gate g{i}": 21 for i in range(12)} | {f"system{i}": 22 for i in range(12)})
    assert len({tuple(map(str, look.values())) for look in style.looks(many).values()}) == 24
    assert len({look["marker"] for arm, look in style.looks(many).items() if arm.startswith("g")}) == 12


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("minference paper", "MInference paper"),
        ("vertical_slash", "vertical-slash"),
        ("xattention 64 profile", "XAttention 64 profile"),
        ("my_own_idea", "my-own-idea"),
        ("gate best_one", "gates: best_one"),
    ],
)
def test_names_for_people(arm: str, name: str) -> None:
    assert name_of(result("perplexity", arm, 0.1, 1.0)) == name
