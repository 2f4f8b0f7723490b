"""Tables and curves of training runs, against written out ones."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rows import lines, of, tables, written

from seerattn.report import write_report
from seerattn.report.curves import Curve
from seerattn.report.figures.curves import smoothed
from seerattn.results.record import Result

TOKENS = [1000, 3000]
TRAINED = {"sparsity": None, "annealed": False, "target_share": None, "target_every": 1, "steps": 400}
TOGETHER = {"target_share": 0.1}


def perplexity(training: dict, sparsity: float | None, losses: list[float], *, weights: str, **more) -> Result:
    """A result over two documents of 1000 and 3000 tokens with these mean losses."""
    dense = sparsity is None
    density = None if dense else round(1 - sparsity, 6)
    sums = [loss * tokens for loss, tokens in zip(losses, TOKENS)]
    values = {
        "what": "perplexity",
        "value": math.exp(sum(sums) / sum(TOKENS)),
        "n": sum(TOKENS),
        "unit": "tokens",
        "samples": {"documents": [0, 1], "losses": sums, "tokens": TOKENS},
        "model": "m",
        "context": 32768,
        "text": "books",
        "density": density,
        "realised_density": 1.0 if dense else density + 0.002,
        "weights": {"model": weights},
        "cell": {"data": "abc", "windows": 1, "dtype": "float32", "training": TRAINED | training},
    }
    return Result(**of("dense" if dense else "gates") | values | more)


def rows() -> list[Result]:
    after, together = {"name": "gates after"}, {"name": "together", "sparsity": 0.9} | TOGETHER
    return [
        perplexity({"name": "dense"}, None, [3.0, 3.0], weights="a"),
        perplexity(after, None, [3.0, 3.0], weights="a"),
        perplexity(after, 0.5, [3.1, 3.1], weights="a"),
        perplexity(after, 0.9, [3.2, 3.2], weights="a"),
        perplexity(together, None, [3.0, 3.2], weights="c9"),
        perplexity(together, 0.9, [3.02, 3.0], weights="c9"),
        perplexity(together | {"name": "whole", "target_share": 1.0}, 0.9, [3.01, 3.01], weights="d"),
    ]


def report_of(tmp_path: Path, results: list[Result], curves: str = "") -> list[Path]:
    paths = [written(tmp_path / "results.jsonl", results)]
    if curves:
        (tmp_path / "curves.jsonl").write_text(curves)
        paths.append(tmp_path / "curves.jsonl")
    return write_report(paths, tmp_path / "out")


def test_table_of_finetuned_models_matches_a_written_out_one() -> None:
    base = math.exp(3.0)
    # Losses of the documents are .02 and 0 higher: .005 a token, and residuals from that of .015 * 1000 and
    # .005 * 3000 tokens, with the factor n / (n - 1) = 2 (Cochran, section 6.3).
    value = math.exp(3.005)
    theirs = np.array([value * (3.02 - 3.005) * 1000, value * (3.0 - 3.005) * 3000])
    error = 100 * math.sqrt(2 * (theirs**2).sum()) / 4000 / base
    found = tables(rows())
    table = found["Fine-tuned: perplexity, m, books"]
    after, dense = "gates after", f"{math.exp(3.15):.2f}"
    *body, run_dense = lines(table)
    assert body == [
        ["trained", "sparsity", "32,768 tokens"],
        ["dense", "0", f"{base:.2f}"],
        [after, "0.5 (0.498)", f"{math.exp(3.1):.2f} (+10.52 ± 0.00 %)"],
        [after, "0.9 (0.898)", f"{math.exp(3.2):.2f} (+22.14 ± 0.00 %)"],
        ["together", "0.9 (0.898)", f"{value:.2f} (+0.50 ± {error:.2f} %)"],
        ["whole", "0.9 (0.898)", f"{math.exp(3.01):.2f} (+1.01 ± 0.00 %)"],
    ]
    assert run_dense[:2] == ["together, run dense", "0, trained at 0.9"]
    assert run_dense[2].startswith(f"{dense} (+16.18 ± ")
    assert table.notes[0] == "2 documents, 4,000 tokens."
    # They stand in no other table.
    assert not [title for title in found if title.startswith(("Perplexity", "Share"))]


def test_a_finetuned_model_has_the_sparsity_that_was_asked_for_or_else_the_realised_one() -> None:
    together = {"name": "together", "sparsity": 0.9} | TOGETHER
    for more, label in (({"realised_density": None}, "0.9"), ({"density": None}, "0.898 (0.898)")):
        row = perplexity(together, 0.9, [3.0, 3.0], weights="c9", **more)
        assert lines(tables([row])["Fine-tuned: perplexity, m, books"])[1][1] == label


def test_partial_targets_are_compared_with_whole_ones_at_the_same_sparsity() -> None:
    (head, first, second) = lines(tables(rows())["Fine-tuned: targets of some rows, m"])
    whole, some = math.exp(3.01), math.exp(3.005)
    assert head == ["sparsity and target", "books, 32,768"] and first == ["0.9, 100% of the rows", f"{whole:.3f}"]
    # Gates that were added afterwards have no target during training.
    assert second[0] == "0.9, 10% of the rows"
    assert second[1].startswith(f"{some:.3f} ({100 * (some / whole - 1):+.2f} ± ")


def test_retrieval_of_finetuned_models_adds_up_the_depths() -> None:
    found = []
    for depth, right in ((0.1, 3), (0.9, 4)):
        cell = {"task": "passkey", "documents": 4, "depth": depth, "training": TRAINED | {"name": "after"}}
        more = {"what": "accuracy", "unit": "documents", "n": 4, "seed": 1, "samples": {}}
        found.append(perplexity({}, 0.9, [3, 3], weights="a", value=right / 4, cell=cell, **more))
    table = tables(found)["Fine-tuned: retrieval, m, books"]
    # 7 of 8, error at 8/10.
    assert lines(table)[1] == ["after", "0.9 (0.898)", "0.88 ± 0.14"] and table.notes[0] == "8 documents a cell."


def curves() -> str:
    records = []
    for arm, sparsity, more in (("dense", 0.0, 0.0), ("together-0.9", 0.9, 0.25), ("after", 0.0, None)):
        for step in range(1, 61):
            gates = None if arm == "dense" else 1 / step
            loss = None if more is None else 3 + 1 / step + more
            of_gates = {} if gates is None else {"gate_loss": gates}
            told = {"loss": loss, "sparsity": sparsity, "tokens_per_second": 1.0}
            records.append({"arm": arm, "step": step} | told | of_gates)
    return "".join(json.dumps(record) + "\n" for record in records) + '{"arm": "dense", "st'


def test_curves_show_running_means_and_the_difference_from_the_dense_run(tmp_path: Path, drawn: dict) -> None:
    report_of(tmp_path, rows(), curves())
    losses, difference, gates = ({line.get_label(): line for line in axes.lines} for axes in drawn["curves"].axes)
    together, after = "together-0.9", "after, gates alone"
    assert (list(losses), list(difference), list(gates)) == (["dense"], [together], [together, after])
    assert {text.get_text() for text in drawn["curves"].axes[2].texts} == {together, after}
    # 5 % of 60 records are 3.
    expected = [3 + sum(1 / s for s in range(max(1, step - 2), step + 1)) / min(step, 3) for step in range(1, 61)]
    assert losses["dense"].get_xdata() == pytest.approx(range(1, 61))
    assert losses["dense"].get_ydata() == pytest.approx(expected)
    assert difference[together].get_ydata() == pytest.approx([0.25] * 60)
    assert len({(str(line.get_color()), line.get_linestyle()) for line in gates.values()}) == 2
    # 1 / step from step 7 on, after a tenth of the steps, with 8 % of that range on each side.
    top, bottom = (np.mean([1 / s for s in steps]) for steps in ((5, 6, 7), (58, 59, 60)))
    expected = bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom)
    assert drawn["curves"].axes[2].get_ylim() == pytest.approx(expected)


def test_names_of_runs_tell_of_rising_sparsity() -> None:
    def label(name: str, *sparsities: float) -> str:
        return Curve(name, [{"step": i, "sparsity": s} for i, s in enumerate(sparsities)]).label

    assert label("together-0.9-every4", 0.901, 0.901) == "together-0.9-every4"
    assert label("annealed", 0.0, 0.4, 0.89) == "annealed, sparsity 0 to 0.89"
    assert label("dense", 0.0) == "dense"


def distilled(steps: int) -> str:
    records = []
    for step in range(1, steps + 1):
        layers = {"1": 1 / step, "0": 3 / step, "10": 5 / step}
        records.append({"step": step, "loss": 3 / step, "layer_loss": layers, "tokens_per_second": 1.0})
    return "".join(json.dumps(record) + "\n" for record in records)


def test_distillation_draws_the_loss_of_its_gates_and_of_each_layer(tmp_path: Path, drawn: dict) -> None:
    log = tmp_path / "gates" / "training.jsonl"
    log.parent.mkdir()
    log.write_text(distilled(20))
    write_report([log], tmp_path / "out")
    whole, layers, bar = drawn["curves"].axes
    (line,) = whole.lines
    assert line.get_label() == "gates" and line.get_ydata() == pytest.approx([3 / s for s in range(1, 21)])
    assert whole.get_ylabel() == "loss of the gates, nats a row"
    by_layer = {line.get_label(): line.get_ydata() for line in layers.lines}
    assert list(by_layer) == ["layer 0", "layer 1", "layer 10"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Block-sparse attention</h1>" in page and "Fine-tuning" not in page
    assert by_layer["layer 10"] == pytest.approx([5 / s for s in range(1, 21)])
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "1", "10"]
    # Beside a run of fine-tuning it is one with gates alone.
    (tmp_path / "curves.jsonl").write_text(curves())
    drawn.clear()
    write_report([log, tmp_path / "curves.jsonl"], tmp_path / "both")
    assert drawn["curves"].axes[2].lines[0].get_label() == "gates, gates alone"


def test_page_holds_curves_and_tables_of_finetuned_models(tmp_path: Path) -> None:
    names = [path.name for path in report_of(tmp_path, rows(), curves())]
    assert names == ["report.html", "table.md", "curves.png", "curves.svg"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "+10.52 ± 0.00 %" in page[page.index('<section id="finetuned"') :]
    assert "<svg" in page[page.index('<section id="training"') :] and '<section id="perplexity"' not in page


def test_running_mean_matches_numpy() -> None:
    values = np.random.default_rng(0).normal(size=41)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(41)]
    assert smoothed(values, 7) == pytest.approx(expected)


def test_report_reads_the_log_of_one_run_and_rejects_a_broken_one(tmp_path: Path) -> None:
    log = tmp_path / "run" / "training.jsonl"
    log.parent.mkdir()
    line = json.dumps({"step": 1, "loss": 3.0, "gate_loss": 0.5, "sparsity": 0.9, "tokens_per_second": 1.0}) + "\n"
    log.write_text(line)
    assert [p.name for p in write_report([log], tmp_path / "out")] == ["report.html", "curves.png", "curves.svg"]
    log.write_text(line + "{}\n")
    with pytest.raises(ValueError, match="line 2 is none"):
        write_report([log], tmp_path / "other")
    assert not (tmp_path / "other").exists()
