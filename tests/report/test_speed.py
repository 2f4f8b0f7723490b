"""Figures and tables of the benchmarks, from results written by hand."""

from dataclasses import replace

import numpy as np
import pytest

from seerattn.report import style, write_report
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

HERE = {"device": "some GPU", "dtype": "bfloat16"}
PER_HEAD = {"block_q": 64, "block_k": 64, "mask_heads": 32, "share": "head"}


def result(what: str, value: float | None, context: int, impl: str, cell: dict | None = None, **more) -> Result:
    values = {"n": 3, "unit": "runs", "model": "m", "selector": "dense", "text": "random", "realised_density": 1.0}
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
                rows.append(
                    result("attention_ms", time, tokens, impl, cell | {"rows_alike": 1}, selector="random", **more)
                )
            gate = {"selector": "gate", "gates": "paper"}
            rows.append(result("selection_ms", 0.05, tokens, "triton", cell, **gate, **more))
    return rows


def pooled() -> list[Result]:
    rows = []
    for tokens, factor in ((8192, 1), (32768, 16)):
        for impl, ms, memory in (("triton", 1.5, 80.0), ("pytorch", 30.0, 20000.0), ("flash", 2.0, 0.0)):
            cell = {"map": impl != "flash", "block_q": 64, "block_k": 64}
            failed = impl == "pytorch" and factor > 1
            more = {"samples": {"error": ["out of memory"]}} if failed else {}
            rows.append(result("pooled_ms", None if failed else ms * factor, tokens, impl, cell, **more))
            rows.append(result("extra_memory_mib", None if failed else memory, tokens, impl, cell, **more))
    return rows


def test_pooled_figure_and_table_tell_which_map_was_made(tmp_path, drawn) -> None:
    other = [replace(r, cell=r.cell | {"form": "sum:2"}, value=5.0) for r in pooled() if r.cell["impl"] == "triton"]
    report(tmp_path, pooled() + other)
    (legend,) = drawn["pooled"].legends
    assert [t.get_text() for t in legend.get_texts()][:3] == [
        "seerattn, triton",
        "plain PyTorch",
        "seerattn, triton sum:2",
    ]
    assert [p.get_height() for p in drawn["pooled"].axes[0].patches].count(5.0) == 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| triton, with the map |  | 1.5 (1.33x) | 24 (1.33x) |\n" in table
    assert "| triton, with the map sum:2 |  | 5 (0.40x) | 5 (6.40x) |\n" in table


def models() -> list[Result]:
    rows = []
    for tokens, dense in ((8192, 0.25), (32768, 2.0)):
        layers = {"layers": 32}
        rows.append(result("ttft_s", dense, tokens, "flash", layers))
        rows.append(result("peak_memory_gib", 20.0, tokens, "flash", layers))
        rows.append(result("peak_memory_gib", 33.0, tokens, "flash", layers | {"work": "forward"}))
        rows.append(result("tokens_per_second", tokens / dense, tokens, "flash", layers | {"work": "forward"}))
        gate = {"selector": "gate", "gates": "paper", "density": 0.1, "realised_density": 0.1, "seed": 0}
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
        rows.append(result("attention_training_ms", dense / 8, tokens, "gluon", cell, selector="random", **sparse))

        layer = {"work": "fine-tuning layer"}
        rows.append(result("finetune_layer_ms", dense, tokens, "flash", layer))
        gate = sparse | {"selector": "gate", "gates": "paper"}
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
    path = tmp_path / "r.jsonl"
    file = ResultsFile(path)
    for row in rows:
        file.append(row)
    return write_report([path], tmp_path / "out")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    figures = {}
    monkeypatch.setattr(style, "save", lambda figure, folder, name: figures.update({name: figure}) or [])
    return figures


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


def test_pooled_figure_shows_time_and_memory_and_what_ran_out_of_it(tmp_path, drawn) -> None:
    report(tmp_path, pooled())
    times, memory = drawn["pooled"].axes
    assert sorted(p.get_height() for p in times.patches) == [1.5, 2.0, 24.0, 30.0, 32.0]
    assert sorted(p.get_height() for p in memory.patches) == [80.0, 80.0, 20000.0]
    assert [t.get_text() for t in memory.texts].count("out of memory") == 1
    assert [t.get_text() for t in memory.texts].count("0") == 2
    (legend,) = drawn["pooled"].legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "seerattn, triton",
        "plain PyTorch",
        "FlashAttention-2 (no map)",
    ]


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


def test_speed_tables_match_written_out_ones(tmp_path) -> None:
    report(tmp_path, attention() + pooled() + models())
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "### Attention alone, ms: m, bfloat16, some GPU\n\n"
        "|  | sparsity | 8k | 32k |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| FlashAttention-2 |  | 2 (1.00x) | 24 (1.00x) |\n"
        "| cuDNN |  | 1 (2.00x) | 12 (2.00x) |\n"
        "| triton, random blocks, 64x64 per head | 0.5 | 1.2 (1.67x) | 14.4 (1.67x) |\n"
    ) in table
    assert "| plain PyTorch, with the map |  | 30 (0.07x) | out of memory |\n" in table
    assert "| FlashAttention-2, plain forward, 32 layers |  | 32,768 | 16,384 |\n" in table
    assert "| gates paper, triton, 64x64 per head, 32 layers | 0.9 | 0.0625 (4.00x) | 0.5 (4.00x) |\n" in table


def test_tables_of_training_match_written_out_ones(tmp_path) -> None:
    report(tmp_path, training() + models())
    table = (tmp_path / "out" / "table.md").read_text()
    head = "|  | sparsity | 8k | 32k |\n| --- | ---: | ---: | ---: |\n"
    attention = (
        "### Attention, forward and backward, ms: m, bfloat16, some GPU\n\n"
        f"{head}"
        "| FlashAttention-2 |  | 8 (1.00x) | 96 (1.00x) |\n"
        "| cuDNN |  | 4 (2.00x) | 48 (2.00x) |\n"
        "| gluon, random blocks, 64x64 per head | 0.9 | 1 (8.00x) | 12 (8.00x) |\n"
    )
    layer = (
        "### Fine-tuning, attention of one layer with backward, ms: m, bfloat16, some GPU\n\n"
        f"{head}"
        "| FlashAttention-2 |  | 8 (1.00x) | 96 (1.00x) |\n"
        "| gates paper, gluon, 64x64 per head, 10% of the targets | 0.9 | 2 (4.00x) | 24 (4.00x) |\n"
        "| gates paper, gluon, 64x64 per head, 100% of the targets | 0.9 | 4 (2.00x) | 48 (2.00x) |\n"
    )
    # Speed-ups are over the same number of layers.
    step = (
        "### Fine-tuning, a step without the optimizer, ms: m, bfloat16, some GPU\n\n"
        f"{head}"
        "| FlashAttention-2, 4 layers |  | 32 (1.00x) | 384 (1.00x) |\n"
        "| cuDNN, 4 layers |  | 16 (2.00x) | out of memory |\n"
        "| gates paper, gluon, 64x64 per head, 10% of the targets, 4 layers | 0.9 | 8 (4.00x) | 96 (4.00x) |\n"
        "| FlashAttention-2, 8 layers |  | 64 (1.00x) | 768 (1.00x) |\n"
        "| cuDNN, 8 layers |  | 32 (2.00x) | out of memory |\n"
        "| gates paper, gluon, 64x64 per head, 10% of the targets, 8 layers | 0.9 | 16 (4.00x) | 192 (4.00x) |\n"
    )
    assert all(f"{whole}\n" in table for whole in (attention, layer, step))
    # Tokens and memory stand in one table with prefills and distillation, so their lines name the work.
    speed = (
        "| FlashAttention-2, fine-tuning step, 4 layers |  | 256,000 | 85,333 |\n"
        "| cuDNN, fine-tuning step, 4 layers |  | 512,000 | out of memory |\n"
        "| gates paper, gluon, 64x64 per head, fine-tuning step, 10% of the targets, 4 layers | 0.9 "
        "| 1,024,000 | 341,333 |\n"
    )
    memory = (
        "| FlashAttention-2, fine-tuning step, 4 layers |  | 20.5 | 20.5 |\n"
        "| cuDNN, fine-tuning step, 4 layers |  | 20.5 | out of memory |\n"
        "| gates paper, gluon, 64x64 per head, fine-tuning step, 10% of the targets, 4 layers | 0.9 | 20.5 | 20.5 |\n"
    )
    assert f"### Tokens a second: m, bfloat16, some GPU\n\n{head}{speed}" in table
    assert f"### Peak memory, GiB: m, bfloat16, some GPU\n\n{head}{memory}" in table
    assert "| FlashAttention-2, plain forward, 32 layers |  | 33 | 33 |\n" in table


def test_training_draws_no_figure_of_prefills_or_attention_alone(tmp_path, drawn) -> None:
    report(tmp_path, training())
    assert drawn == {}
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Attention, forward and backward, ms", "Fine-tuning, a step without the optimizer, ms"):
        assert f"{title}: m, bfloat16, some GPU" in page


def test_figures_of_benchmarks_are_the_same_byte_for_byte(tmp_path) -> None:
    rows = attention() + pooled() + models()
    first, second = report(tmp_path / "a", rows), report(tmp_path / "b", rows)
    figures = ("speedup", "breakdown", "pooled", "ttft")
    names = ["report.html", "table.md", *(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))]
    assert [p.name for p in first] == names and all(p.stat().st_size > 500 for p in first)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
