"""Figures of quality: what they draw, of results written by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from rows import of, written
from whole import block_maps

from seerattn.report import style, write_report
from seerattn.report.figures import summary
from seerattn.report.figures.summary import representatives
from seerattn.report.names import name_of
from seerattn.report.select import last_rows_dense
from seerattn.results.record import Result


def result(what: str, name: str, density: float | None, value: float, *, last: int = 0, **more) -> Result:
    dense = name == "dense"
    values = of(name) | {"n": 20, "unit": "tokens", "model": "m", "text": "books", "context": 4096}
    values["settings"] = values["settings"] | ({} if dense else {"last_rows_dense": last})
    values |= {"realised_density": 1.0 if dense else density, "cell": {"data": "abc"} | more.pop("cell", {})}
    return Result(what=what, value=value, density=density, **values | more)


def losses(found: dict[str, float], densities: tuple[float, ...] = (0.2, 0.1)) -> list[Result]:
    return [
        result("perplexity", name, None if name == "dense" else d, v) for name, v in found.items() for d in densities
    ]


def timed(rows: list[Result], milliseconds, batch: int = 1) -> list[Result]:
    """Times of attention that belong to perplexities."""
    found = []
    for r in rows:
        if r.what == "perplexity":
            samples = {"index": [0.0], "attention": [milliseconds(r)]}
            more = {"n": 3, "unit": "forwards", "cell": r.cell | {"batch": batch}, "samples": samples}
            found.append(replace(r, what="attention_ms", value=milliseconds(r), **more))
    return found


def report(folder: Path, rows: list[Result]) -> None:
    write_report([written(folder / "r.jsonl", rows)], folder / "out")


def drawn_lines(axes) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def test_perplexity_figure_shows_realised_densities_paired_errors_and_labels(tmp_path, drawn) -> None:
    rows = losses({"dense": 30.0, "oracle": 30.25, "best": 30.5, "streaming": 30.6})
    rows = [replace(r, realised_density=round(r.density * 1.02, 3)) if r.density else r for r in rows]
    errors = [replace(r, what="perplexity_difference", stderr=r.density) for r in rows if r.density]
    report(tmp_path, rows + errors)
    (axes,) = drawn["perplexity"].axes
    assert {t.get_text() for t in axes.texts} == {"dense", "oracle", "gates: best", "streaming"}
    points, _, (bars,) = drawn_lines(axes)["gates: best"]
    assert points.get_xydata() == pytest.approx(np.array([(0.204, 30.5), (0.102, 30.5)]))
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2 * 0.2, 2 * 0.1])
    # Density falls to the right.
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def test_static_baselines_that_lose_much_leave_the_figure_at_its_top(tmp_path, drawn) -> None:
    rows = losses({"dense": 20.0, "best": 21.0, "minference": 23.0, "streaming": 24.0})
    report(tmp_path, rows + [result("perplexity", "random", d, 60.0 / d) for d in (0.2, 0.1)])
    (axes,) = drawn["perplexity"].axes
    assert 24 < axes.get_ylim()[1] < 30
    names = {text.get_text() for text in axes.texts}
    assert "random \N{UPWARDS ARROW}" in names and "streaming" in names


def test_pareto_figure_joins_what_nothing_beats_and_leaves_the_oracle_out(tmp_path, drawn) -> None:
    rows = [result("perplexity", "dense", None, 20.0), result("perplexity", "oracle", 0.1, 20.5)]
    rows += [result("perplexity", "best", 0.2, 21.0), result("perplexity", "best", 0.1, 22.0)]
    rows += [result("perplexity", "paper", 0.2, 23.0), result("perplexity", "paper", 0.2, 20.1, last=2)]
    ms = {"dense": 10.0, "oracle": 1.0, "best": 4.0, "paper": 5.0}
    rows += timed(rows, lambda r: ms[r.name] * (1.0 if r.density != 0.1 or r.name == "oracle" else 0.5))
    report(tmp_path, rows)
    (axes,) = drawn["pareto"].axes
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert found["not beaten"] == [[2.0, 22.0], [4.0, 21.0], [10.0, 20.0]]
    containers = {label: c[0].get_xydata().tolist() for label, c in drawn_lines(axes).items()}
    assert containers["gates: best"] == [[2.0, 22.0], [4.0, 21.0]] and containers["gates: paper"] == [[5.0, 23.0]]


def test_times_of_other_batches_have_panels_of_their_own(tmp_path, drawn) -> None:
    rows = [result("perplexity", "dense", None, 20.0), result("perplexity", "best", 0.2, 21.0)]
    report(tmp_path, rows + timed(rows, lambda r: 8.0) + timed(rows, lambda r: 3.0, batch=4))
    for axes, batch, ms in zip(drawn["pareto"].axes, (1, 4), (8.0, 3.0)):
        assert axes.get_title(loc="left").endswith(f"batch {batch}")
        assert {x for c in drawn_lines(axes).values() for x, _ in c[0].get_xydata()} == {ms}
    # Times of comparisons are not taken for benchmarks.
    assert set(drawn) == {"perplexity", "pareto"}


def test_head_densities_are_drawn_where_heads_differ(tmp_path, drawn) -> None:
    even, uneven = [[0.1, 0.1]], [[0.05, 0.4]]
    rows = [result("perplexity", "best", 0.1, 21.0, samples={"head_density": even})]
    rows.append(result("perplexity", "minference", 0.1, 22.0, samples={"head_density": even}))
    # Alike at one density, they are drawn beside the others.
    rows.append(result("perplexity", "minference", 0.2, 22.0, samples={"head_density": uneven}))
    report(tmp_path, rows)
    axes = drawn["head_density"].axes
    images = [image for one in axes for image in one.get_images()]
    assert [np.asarray(image.get_array()).tolist() for image in images] == [uneven, even]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["MInference"]
    assert not [text for one in axes for text in one.texts]


def test_representatives_are_the_best_line_of_each_method_and_three_gates() -> None:
    found = {"dense": 20, "oracle": 20.5, "streaming": 25, "random": 40, "minference paper": 23, "vertical_slash": 22}
    found |= {f"g{i}": 21 + i / 10 for i in range(5)}
    found |= {"xattention 64": 30, "xattention 128": 28, "flexprefill": 26, "moa": 27}
    # Of the methods that there is room for, the best ones, and of each its best line.
    expected = ["dense", "oracle", "g0", "g2", "g4", "flexprefill", "minference paper", "vertical_slash", "streaming"]
    assert representatives(losses(found)) == expected
    few = {name: loss for name, loss in found.items() if name not in ("oracle", "g0", "g1", "g2", "g4")}
    expected = [
        "dense",
        "g3",
        "flexprefill",
        "minference paper",
        "moa",
        "vertical_slash",
        "xattention 128",
        "streaming",
    ]
    assert representatives(losses(few)) == expected


def test_a_line_that_missed_a_density_does_not_stand_for_its_method() -> None:
    rows = losses({"minference paper": 21, "minference repository": 23})
    rows = [replace(r, realised_density=0.3) if r.value == 21 and r.density == 0.1 else r for r in rows]
    assert representatives(rows) == ["minference repository"]


def test_summary_figure_shows_its_lines_at_realised_densities(compared: list[Result], tmp_path: Path, drawn) -> None:
    style.each("summary", summary.groups(compared), summary.draw, tmp_path)
    figure = drawn["summary"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["books-test, 8,192 tokens", "proofs-test, 8,192 tokens"]
    (axes, _), by_name = figure.axes, {name_of(r): r.line for r in compared}
    found = drawn_lines(axes)
    assert {text.get_text() for text in axes.texts} == {*found, "dense"} and len(found) == 8
    for name, line in found.items():
        rows = [r for r in compared if (r.line, r.what, r.text) == (by_name[name], "perplexity", "books-test")]
        rows = [r for r in rows if r.context == 8192 and not last_rows_dense(r)]
        expected = sorted(((r.realised_density, r.value) for r in rows), reverse=True)
        assert line[0].get_xydata().tolist() == pytest.approx([pytest.approx(point) for point in expected])
    # It is not needed where every line is in it.
    assert not summary.groups(losses({"dense": 20, "oracle": 21, "streaming": 22}))


def test_no_two_lines_look_the_same(compared: list[Result]) -> None:
    looks = style.looks(compared)
    plain = {line: {name: str(of) for name, of in look.items() if name != "label"} for line, look in looks.items()}
    assert len(plain) == 20 and len({tuple(look.values()) for look in plain.values()}) == 20
    variants = [plain[name] for name in ("xattention 64", "xattention 64 profile", "xattention 128")]
    assert [len({look[name] for look in variants}) for name in ("color", "linestyle", "marker")] == [1, 3, 3]
    many = style.looks(losses({f"g{i}": 21 for i in range(12)}))
    assert len({look["marker"] for look in many.values()}) == 12


def test_choices_are_drawn_beside_the_true_map_with_their_density_and_recall(tmp_path, drawn) -> None:
    alone = block_maps([(0, 0), (3, 1)])
    rng = np.random.default_rng(1)
    kept = (rng.random((10, 2, 12, 12)) < 0.3) & np.tril(np.ones((12, 12), dtype=bool)) | alone.forced
    systems = ["oracle sum:4", "gates: <b>", *(f"xattention {number}" for number in range(8))]
    target = alone.target / alone.target.sum(-1, keepdims=True)
    replace(alone, target=target, systems=systems, kept=kept).save(tmp_path / "maps.npz")
    write_report([tmp_path / "maps.npz"], tmp_path / "out")
    panels = drawn["choices"].get_axes()
    assert len(panels) == 2 * (1 + len(systems))
    names = ["oracle by power 4", "gates: <b>", *(f"XAttention {number}" for number in range(8))]
    titles = [axes.get_title(loc="left").strip() for axes in panels]
    assert titles == ["layer 0, head 0", *names, "layer 3, head 1", *names]
    told = [axes.texts[0].get_text() for axes in panels]
    assert told[0] == told[11] == "true map"
    for head, number in ((0, 0), (1, 9)):
        blocks = [(i, j) for i in range(12) for j in range(i + 1) if kept[number, head, i, j]]
        recall = sum(target[head, i, j] for i, j in blocks) / 12
        assert told[11 * head + 1 + number] == f"density {len(blocks) / 78:.2f}, recall {recall:.2f}"
    drawn.clear()
    alone.save(tmp_path / "maps.npz")
    write_report([tmp_path / "maps.npz"], tmp_path / "out")
    assert set(drawn) == {"maps"}


def test_figures_ignore_the_users_own_matplotlib_settings(tmp_path) -> None:
    import matplotlib

    rows = losses({"dense": 30.0, "best": 30.5})
    report(tmp_path / "a", rows)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        report(tmp_path / "b", rows)
    first, second = (tmp_path / name / "out" / "perplexity.svg" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_labels_are_spread_by_the_gap_and_stay_put_where_there_is_room() -> None:
    assert style.spread([10.0, 50.0, 90.0], 11) == [10.0, 50.0, 90.0]
    moved = style.spread([50.0, 52.0, 51.0, 90.0], 11)
    assert moved == pytest.approx([40.0, 62.0, 51.0, 90.0])
    crowded = style.spread([0.0, 1.0, 11.5, 12.0], 10)
    assert np.diff(sorted(crowded)).min() >= 10 - 1e-9 and np.mean(crowded) == pytest.approx(6.125)
