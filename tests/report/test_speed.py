"""Figures and tables of the benchmarks, from results written by hand."""

from dataclasses import replace

import numpy as np
import pytest
from rows import lines as lines_of
from rows import of, section, written

from seerattn.report import write_report
from seerattn.results.record import Result

HERE = {"device": "some GPU", "dtype": "bfloat16"}
PER_HEAD = {"block_q": 64, "block_k": 64, "mask_heads": 32, "share": "head"}


def result(what: str, value: float | None, context: int, impl: str, cell: dict | None = None, **more) -> Result:
    values = of(more.pop("name", "dense")) | {
        "n": 3,
        "unit": "runs",
        "model": "m",
        "text": "random",
        "realised_density": 1.0,
    }
    return Result(what=what, value=value, context=context, cell=HERE | {"impl": impl} | (cell or {}), **values | more)


def attention() -> list[Result]:
    rows = []
    for tokens, dense in ((8192, 2.0), (32768, 24.0)):
        rows.append(result("attention_ms", dense, tokens, "flash", {"clock": "device"}))
        rows.append(result("attention_ms", dense / 2, tokens, "cudnn", {"clock": "device"}))
        # Of the crossover table, and in no figure.
        rows.append(result("attention_ms", 99.0, tokens, "flash", {"clock": "pipeline"}))
        for density, realised in ((0.5, 0.51), (0.1, 0.102)):
            more = {"density": density, "realised_density": realised, "seed": 0}
            cell = PER_HEAD | {"clock": "device"}
            for impl, cost in (("triton", 1.2), ("flash4", 1.6)):
                time = dense * density * cost
                rows.append(result("attention_ms", time, tokens, impl, cell | {"rows_alike": 1}, name="random", **more))
            gate = {"name": "paper"}
            rows.append(result("selection_ms", 0.05, tokens, "triton", cell, **gate, **more))
    return rows


def maps() -> list[Result]:
    rows = []
    for tokens, factor in ((8192, 1), (32768, 16)):
        for impl, ms, memory in (("triton", 1.5, 80.0), ("pytorch", 30.0, 20000.0), ("flash", 2.0, 0.0)):
            cell = {"map": impl != "flash", "block_q": 64, "block_k": 64}
            failed = impl == "pytorch" and factor > 1
            more = {"samples": {"error": ["out of memory"]}} if failed else {}
            rows.append(result("attention_map_ms", None if failed else ms * factor, tokens, impl, cell, **more))
            rows.append(result("extra_memory_mib", None if failed else memory, tokens, impl, cell, **more))
    return rows


def test_figure_and_table_of_the_map_tell_which_was_made(tmp_path, drawn) -> None:
    other = [replace(r, cell=r.cell | {"form": "sum:2"}, value=5.0) for r in maps() if r.cell["impl"] == "triton"]
    report(tmp_path, maps() + other)
    labels = [t.get_text() for t in drawn["attention_map"].legends[0].get_texts()]
    assert labels[1:] == ["seerattn, triton", "plain PyTorch", "seerattn, triton sum:2"]
    assert {y for _, y in lines(drawn["attention_map"].axes[0])["seerattn, triton sum:2"]} == {5.0}
    table = by_title(maps() + other, "Attention with the map of blocks, ms")
    assert ["triton, with the map", "", "1.5 (1.33x)", "24 (1.33x)"] in table
    assert ["triton, with the map sum:2", "", "5 (0.40x)", "5 (6.40x)"] in table


def by_title(rows: list[Result], title: str) -> list[list[str]]:
    """The table of this title, as text."""
    (table,) = [t for t in section(rows, "speed").parts if t.title.startswith(f"{title}:")]
    assert table.title.endswith(": m, bfloat16, some GPU")
    return lines_of(table)


def models() -> list[Result]:
    rows = []
    for tokens, dense in ((8192, 0.25), (32768, 2.0)):
        layers = {"layers": 32}
        rows.append(result("ttft_s", dense, tokens, "flash", layers))
        rows.append(result("peak_memory_gib", 20.0, tokens, "flash", layers))
        rows.append(result("peak_memory_gib", 33.0, tokens, "flash", layers | {"work": "forward"}))
        rows.append(result("tokens_per_second", tokens / dense, tokens, "flash", layers | {"work": "forward"}))
        gate = {"name": "paper", "density": 0.1, "realised_density": 0.1, "seed": 0}
        rows.append(result("ttft_s", dense / 4, tokens, "triton", layers | PER_HEAD, **gate))
        rows.append(result("peak_memory_gib", 21.0, tokens, "triton", layers | PER_HEAD, **gate))
    return rows


def training() -> list[Result]:
    """Attention with its backward, and fine-tuning of models of 4 and of 8 layers; cuDNN has no memory for 32k."""
    rows = []
    for tokens, dense in ((8192, 8.0), (32768, 96.0)):
        cell = {"clock": "device"}
        rows.append(result("attention_training_ms", dense, tokens, "flash", cell))
        rows.append(result("attention_training_ms", dense / 2, tokens, "cudnn", cell))
        sparse = {"density": 0.1, "realised_density": 0.102, "seed": 0}
        cell = cell | PER_HEAD | {"rows_alike": 1}
        rows.append(result("attention_training_ms", dense / 8, tokens, "gluon", cell, name="random", **sparse))

        layer = {"work": "fine-tuning layer"}
        rows.append(result("finetune_layer_ms", dense, tokens, "flash", layer))
        gate = sparse | {"name": "paper"}
        for share, cost in ((0.1, 0.25), (1.0, 0.5)):
            cell = layer | PER_HEAD | {"target_share": share}
            rows.append(result("finetune_layer_ms", dense * cost, tokens, "gluon", cell, **gate))

        for layers in (4, 8):
            step = {"work": "fine-tuning step", "layers": layers}
            rows += steps(dense * layers, tokens, "flash", step)
            rows += steps(None if tokens > 8192 else dense * layers / 2, tokens, "cudnn", step)
            rows += steps(dense * layers / 4, tokens, "gluon", step | PER_HEAD | {"target_share": 0.1}, **gate)
    return rows


def steps(ms: float | None, tokens: int, impl: str, cell: dict, **more) -> list[Result]:
    """The three results of one kind of step."""
    values = {"finetune_step_ms": ms, "tokens_per_second": ms and 1e3 * tokens / ms, "peak_memory_gib": ms and 20.5}
    failed = {"samples": {"error": ["out of memory"]}} if ms is None else {}
    return [result(what, value, tokens, impl, cell, **failed, **more) for what, value in values.items()]


def report(tmp_path, rows):
    return write_report([written(tmp_path / "r.jsonl", rows)], tmp_path / "out")


def lines(axes) -> dict:
    return {line.get_label(): line.get_xydata() for line in axes.lines if len(line.get_xdata())}


def test_speed_up_figure_divides_dense_time_by_sparse_time_at_realised_sparsity(tmp_path, drawn) -> None:
    report(tmp_path, attention())
    assert set(drawn) == {"speedup", "breakdown"}
    panels = drawn["speedup"].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["8k tokens", "32k tokens"]
    assert panels[0].get_ylabel() == "speed-up over FlashAttention-2"
    for axes in panels:
        found = lines(axes)
        expected = [(1 - 0.51, 1 / (0.5 * 1.2)), (1 - 0.102, 1 / (0.1 * 1.2))]
        assert found["triton 64x64 per head"] == pytest.approx(np.array(expected))
        # The slower of two implementations stands in the tables alone.
        assert "flash-attn-4 64x64 per head" not in found
        ideal = found["ideal, 1 / (1 - sparsity)"]
        assert ideal[:, 1] == pytest.approx(1 / (1 - ideal[:, 0])) and ideal[-1, 0] == pytest.approx(1 - 0.102)
        level = [line for line in axes.lines if set(line.get_ydata()) == {2.0}]
        assert len(level) == 1
        assert "dense, cuDNN" in axes.get_legend_handles_labels()[1]


def test_breakdown_stacks_selection_under_the_fastest_sparse_attention(tmp_path, drawn) -> None:
    report(tmp_path, attention())
    first, second = drawn["breakdown"].axes
    for axes, dense in ((first, 2.0), (second, 24.0)):
        bars = [p for p in axes.patches if p.get_height()]
        assert [p.get_height() for p in bars[:2]] == [dense, dense / 2]
        assert [p.get_height() for p in bars[2:4]] == [0.05, 0.05]
        assert [(p.get_y(), p.get_height()) for p in bars[4:]] == [
            (0.05, pytest.approx(dense * 0.5 * 1.2)),
            (0.05, pytest.approx(dense * 0.1 * 1.2)),
        ]
        ticks = [label.get_text() for label in axes.get_xticklabels()]
        assert ticks == ["FlashAttention-2", "cuDNN", "49%", "90%"]
        assert f"{0.05 + dense * 0.1 * 1.2:.3g}" in [t.get_text() for t in axes.texts]


def test_figure_of_the_map_shows_time_and_memory_of_what_had_room(tmp_path, drawn) -> None:
    report(tmp_path, maps())
    times, memory = (lines(axes) for axes in drawn["attention_map"].axes)
    assert times["seerattn, triton"].tolist() == [[8192, 1.5], [32768, 24.0]]
    assert times["plain PyTorch"].tolist() == [[8192, 30.0]]
    assert set(memory) == {"seerattn, triton", "plain PyTorch"} and "FlashAttention-2 (no map)" in times


def test_ttft_figure_shows_seconds_speed_up_and_memory_of_prefills_alone(tmp_path, drawn) -> None:
    report(tmp_path, models())
    seconds, ratio, memory = (lines(axes) for axes in drawn["ttft"].axes)
    dense, sparse = "dense, FlashAttention-2", "gates paper, triton, sparsity 0.9"
    assert seconds[dense].tolist() == [[8192, 0.25], [32768, 2.0]]
    assert seconds[sparse].tolist() == [[8192, 0.0625], [32768, 0.5]]
    assert ratio[sparse].tolist() == [[8192, 4.0], [32768, 4.0]] and set(ratio[dense][:, 1]) == {1.0}
    assert memory[dense][:, 1].tolist() == [20.0, 20.0] and memory[sparse][:, 1].tolist() == [21.0, 21.0]


def test_figures_of_other_devices_stand_alone(tmp_path, drawn) -> None:
    rows = attention()
    other = [Result(**vars(r) | {"cell": r.cell | {"device": "another GPU"}, "value": r.value * 3}) for r in rows]
    report(tmp_path, rows + other)
    assert set(drawn) == {"speedup", "speedup-2", "breakdown", "breakdown-2"}
    assert "another GPU" in drawn["speedup-2"].get_suptitle()
    same, again = (lines(drawn[name].axes[0])["triton 64x64 per head"] for name in ("speedup", "speedup-2"))
    assert same == pytest.approx(again)


HEAD = ["", "sparsity", "8k", "32k"]


def test_speed_tables_match_written_out_ones() -> None:
    rows = attention() + maps() + models()
    assert by_title(rows, "Attention alone, ms")[:4] == [
        HEAD,
        ["FlashAttention-2", "", "2 (1.00x)", "24 (1.00x)"],
        ["cuDNN", "", "1 (2.00x)", "12 (2.00x)"],
        ["triton, random blocks, 64x64 per head", "0.5", "1.2 (1.67x)", "14.4 (1.67x)"],
    ]
    assert ["plain PyTorch, with the map", "", "30 (0.07x)", "out of memory"] in by_title(
        rows, "Attention with the map of blocks, ms"
    )
    forward = ["FlashAttention-2, plain forward, 32 layers", "", "32,768", "16,384"]
    assert forward in by_title(rows, "Tokens a second")
    first = ["gates paper, triton, 64x64 per head, 32 layers", "0.9", "0.0625 (4.00x)", "0.5 (4.00x)"]
    assert first in by_title(rows, "Time to first token, s")


def test_tables_of_training_match_written_out_ones() -> None:
    rows = training() + models()
    assert by_title(rows, "Attention, forward and backward, ms") == [
        HEAD,
        ["FlashAttention-2", "", "8 (1.00x)", "96 (1.00x)"],
        ["cuDNN", "", "4 (2.00x)", "48 (2.00x)"],
        ["gluon, random blocks, 64x64 per head", "0.9", "1 (8.00x)", "12 (8.00x)"],
    ]
    gates = "gates paper, gluon, 64x64 per head"
    assert by_title(rows, "Fine-tuning, attention of one layer with backward, ms") == [
        HEAD,
        ["FlashAttention-2", "", "8 (1.00x)", "96 (1.00x)"],
        [f"{gates}, 10% of the targets", "0.9", "2 (4.00x)", "24 (4.00x)"],
        [f"{gates}, 100% of the targets", "0.9", "4 (2.00x)", "48 (2.00x)"],
    ]
    # Speed-ups are over the same number of layers.
    assert by_title(rows, "Fine-tuning, a step without the optimizer, ms") == [
        HEAD,
        ["FlashAttention-2, 4 layers", "", "32 (1.00x)", "384 (1.00x)"],
        ["cuDNN, 4 layers", "", "16 (2.00x)", "out of memory"],
        [f"{gates}, 10% of the targets, 4 layers", "0.9", "8 (4.00x)", "96 (4.00x)"],
        ["FlashAttention-2, 8 layers", "", "64 (1.00x)", "768 (1.00x)"],
        ["cuDNN, 8 layers", "", "32 (2.00x)", "out of memory"],
        [f"{gates}, 10% of the targets, 8 layers", "0.9", "16 (4.00x)", "192 (4.00x)"],
    ]
    # Tokens and memory stand in one table with prefills and distillation, so their lines name the work.
    step = f"{gates}, fine-tuning step, 10% of the targets, 4 layers"
    assert by_title(rows, "Tokens a second")[1:4] == [
        ["FlashAttention-2, fine-tuning step, 4 layers", "", "256,000", "85,333"],
        ["cuDNN, fine-tuning step, 4 layers", "", "512,000", "out of memory"],
        [step, "0.9", "1,024,000", "341,333"],
    ]
    memory = by_title(rows, "Peak memory, GiB")
    assert memory[1:4] == [
        ["FlashAttention-2, fine-tuning step, 4 layers", "", "20.5", "20.5"],
        ["cuDNN, fine-tuning step, 4 layers", "", "20.5", "out of memory"],
        [step, "0.9", "20.5", "20.5"],
    ]
    assert ["FlashAttention-2, plain forward, 32 layers", "", "33", "33"] in memory


def test_training_draws_no_figure_of_prefills_or_attention_alone(tmp_path, drawn) -> None:
    report(tmp_path, training())
    assert drawn == {}
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Attention, forward and backward, ms", "Fine-tuning, a step without the optimizer, ms"):
        assert f"{title}: m, bfloat16, some GPU" in page


def test_figures_of_benchmarks_are_the_same_byte_for_byte(tmp_path) -> None:
    rows = attention() + maps() + models()
    first, second = report(tmp_path / "a", rows), report(tmp_path / "b", rows)
    figures = ("speedup", "breakdown", "attention_map", "ttft")
    names = ["report.html", "table.md", *(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))]
    assert [p.name for p in first] == names and all(p.stat().st_size > 500 for p in first)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_requests_and_tokens_that_run_together_are_compared_with_as_many() -> None:
    rows = []
    for n in (1, 4):
        served = {"at_once": n, "layers": 32}
        gates = {"name": "default", "density": 0.1, "realised_density": 0.1, "seed": 0}
        rows.append(result("serve_first_s", 8.0 * n, 32768, "flash", served))
        rows.append(result("serve_first_s", 2.0 * n * n, 32768, "gluon", served | PER_HEAD, **gates))
        rows.append(result("serve_tokens_per_second", 1000.0, 32768, "flash", served))
        rows.append(result("serve_tokens_per_second", 2500.0 * n, 32768, "gluon", served | PER_HEAD, **gates))
        decoded = {"batch": n, "page": 0}
        rows.append(result("decode_attention_ms", 0.04 * n, 32768, "flash", decoded))
        for page, lists in ((0, True), (16, False)):
            cell = decoded | {"page": page, "lists": lists}
            density = {"density": 0.1 if lists else None, "realised_density": 0.1}
            rows.append(result("decode_attention_ms", 0.01, 32768, "triton", cell, name="random", seed=0, **density))
    first = by_title(rows, "Serving, time to the first token, s")
    assert [line[-1] for line in first[1:]] == ["8 (1.00x)", "2 (4.00x)", "32 (1.00x)", "32 (1.00x)"]
    speed = by_title(rows, "Serving, tokens a second")
    assert [line[-1] for line in speed[1:]] == ["1,000 (1.00x)", "2,500 (2.50x)", "1,000 (1.00x)", "10,000 (10.00x)"]
    assert speed[-1][0] == "gates default, gluon, 64x64 per head, 4 at once, 32 layers"
    decoded = {line[0]: line[-1] for line in by_title(rows, "Attention of one token, ms")}
    assert decoded["triton, random blocks, 4 at a time"] == "0.01 (16.00x)"
    assert decoded["triton, all blocks, pages of 16, 1 at a time"] == "0.01 (4.00x)"
