"""Whole models: what a prefill and a training step do, how attention is clocked, what follows from it."""

import json
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.bench import crossover_decode as crossover_bench
from seerattn.bench import distill
from seerattn.bench.crossover import CrossoverBench, save_table
from seerattn.bench.distill import DistillBench
from seerattn.bench.model import SIZES, TINY, BenchModel, first_layer_only, random_model
from seerattn.bench.session import Session
from seerattn.bench.ttft import AttentionClock, TTFTBench, prefill
from seerattn.gate import AttnGate
from seerattn.gate_decode import GateDecoder
from seerattn.hf.attach import set_policy
from seerattn.ops import crossover, crossover_decode
from seerattn.results.file import ResultsFile
from seerattn.selection.policies import KeepAll, TopK

CPU = torch.device("cpu")
TOKENS = 150


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def session(**options) -> Session:
    return Session(CPU, ResultsFile(None), **options)


def test_prefill_gives_the_models_next_token_with_and_without_gates(input_ids) -> None:
    model = BenchModel(TINY, CPU, "reference")
    with torch.no_grad():
        logits = model.plain()(input_ids=input_ids).logits
    assert prefill(model.plain(), input_ids) == int(logits[0, -1].argmax())
    gated = model.gated("paper")
    assert model.gated("paper") is gated
    set_policy(gated, KeepAll())
    assert prefill(gated, input_ids) == int(logits[0, -1].argmax())
    set_policy(gated, TopK(density=0.3))
    with torch.no_grad():
        assert not torch.equal(gated(input_ids=input_ids).logits, logits)
        assert torch.equal(model.plain()(input_ids=input_ids).logits, logits)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As their makers count them.
    [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-3b", 3_212_749_824), ("llama-3.2-1b", 1_235_814_400)],
)
def test_shapes_have_the_parameters_of_the_models_that_they_are_named_for(name: str, parameters: int) -> None:
    model = random_model(SIZES[name], torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.num_hidden_layers == SIZES[name].whole and model.dtype == torch.bfloat16


def test_first_layer_only_is_a_model_of_one_layer_until_it_ends(input_ids) -> None:
    short, model = BenchModel(replace(TINY, layers=1), CPU).base, BenchModel(TINY, CPU).base
    short.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        whole = model(input_ids=input_ids).logits
        with first_layer_only(model):
            first = model(input_ids=input_ids).logits
        assert torch.equal(first, short(input_ids=input_ids).logits) and not torch.equal(first, whole)
        assert torch.equal(model(input_ids=input_ids).logits, whole)


def test_attention_clock_adds_up_the_calls_of_every_layer(input_ids) -> None:
    model, attend = BenchModel(TINY, CPU).base, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = slow
    try:
        clock = AttentionClock(CPU)
        with clock.installed("sdpa"):
            begin = time.perf_counter()
            prefill(model, input_ids)
            total = time.perf_counter() - begin
        inside = clock.take()
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    assert 2 * 0.05 <= inside <= total
    assert clock.take() == 0.0 and ALL_ATTENTION_FUNCTIONS["sdpa"] is attend


def test_ttft_rows_have_counted_densities_and_share_their_runs() -> None:
    sizes = {"contexts": [256, 130], "densities": [0.7, 0.4], "baselines": ["sdpa", "cudnn"], "gates": ["paper"]}
    rows = TTFTBench(**sizes, impl="reference", repeats=2).run(session(), TINY)
    assert [(r.what, r.context, r.method, r.density) for r in rows[:4]] == [
        ("ttft_s", 130, "dense", None),
        ("attention_share", 130, "dense", None),
        ("ttft_s", 256, "dense", None),
        ("attention_share", 256, "dense", None),
    ]
    # 3 and 4 rows of blocks, the same k in each, sink and diagonal kept: 1 + 2 + 2 of 6, and 1 + 2 + 2 + 2 of 10.
    counted = {(r.context, r.density): r.realised_density for r in rows[4:]}
    assert counted == {(130, 0.4): 5 / 6, (130, 0.7): 5 / 6, (256, 0.4): 0.7, (256, 0.7): 0.7}
    assert all(r.realised_density == 1.0 for r in rows[:4])
    for r in rows:
        assert r.n == 2 and len(r.samples["seconds"]) == 2 and r.model == "Llama of width 64"
        seconds, inside = r.samples["seconds"], r.samples["attention"]
        share = sorted(a / s for a, s in zip(inside, seconds))
        if r.what == "ttft_s":
            assert r.value == pytest.approx(sum(seconds) / 2, abs=2e-5)
        else:
            assert 0 < r.value < 1 and r.value == pytest.approx(sum(share) / 2, rel=0.02)


def test_ttft_of_a_prompt_in_chunks_stands_beside_that_of_one_call_and_chooses_alike() -> None:
    sizes = {"contexts": [256], "densities": [0.4], "baselines": ["sdpa"], "gates": ["default"]}
    rows = TTFTBench(**sizes, chunks=[64, 0, 512], impl="reference", repeats=2).run(session(), TINY)
    times = [r for r in rows if r.what == "ttft_s"]
    assert [(r.method, r.cell.get("chunk")) for r in times] == [("dense", None), ("gate", None), ("gate", 64)]
    assert times[1].realised_density == times[2].realised_density
    assert times[1].settings["length"] is None and times[2].settings["length"] == 256


def test_training_step_changes_the_gates_and_nothing_else(input_ids) -> None:
    model = BenchModel(TINY, CPU).gated("paper")
    before = {name: p.clone() for name, p in model.named_parameters()}
    gates = {id(p) for m in model.modules() if isinstance(m, AttnGate) for p in m.parameters()}
    inputs = {"input_ids": input_ids[:, :128], "position_ids": torch.arange(128)[None]}
    distill._training_step(model, inputs)()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if id(p) in gates} and len(changed) == 2


def test_distillation_hours_follow_from_the_speed_at_the_recipes_length(monkeypatch) -> None:
    monkeypatch.setattr(distill, "RECIPE", (500, 16, 256))
    size = replace(TINY, whole=32)
    bench = DistillBench(contexts=[256, 128, 256], baselines=["sdpa"], gates=["paper"], repeats=2)
    rows = bench.run(session(), size)
    place = [(r.what, r.context, r.cell["work"]) for r in rows]
    speed = "tokens_per_second"
    assert place == [
        (speed, 128, "forward"),
        (speed, 256, "forward"),
        (speed, 128, "distill"),
        (speed, 256, "distill"),
        ("distill_hours", 256, "distill"),
    ]
    for r in rows[:4]:
        assert r.value == pytest.approx(r.context / (sum(r.samples["seconds"]) / 2), rel=0.01)
    # 2 layers were run, 32 are asked for.
    expected = 500 * 16 * 256 / rows[3].value / 3600 * 16
    assert rows[4].value == pytest.approx(expected, abs=0.005) and rows[4].cell["layers"] == 2


def test_crossover_table_holds_the_measured_times_and_the_ops_read_it(tmp_path, monkeypatch) -> None:
    sizes = {"contexts": [200, 130], "densities": [0.5, 1.0], "gates": "paper", "impl": "reference", "keys": [900, 300]}
    bench = session()
    table = CrossoverBench(baselines=["sdpa", "flash", "cudnn"], **sizes).run(bench, TINY.shape)
    assert [row["tokens"] for row in table["rows"]] == [130, 200]
    rows = list(bench.file._by_key.values())
    assert [row["tokens"] for row in table["decode_rows"]] == [300, 900]
    for row in table["decode_rows"]:
        of = [r for r in rows if r.context == row["tokens"]]
        by_what = {what: [r for r in of if r.what == what] for what in ("decode_attention_ms", "decode_select_ms")}
        attention = by_what["decode_attention_ms"]
        assert row["dense_ms"] == min(r.value for r in attention if r.method == "dense")
        assert row["overhead_ms"] == by_what["decode_select_ms"][0].value
        assert row["sparse_ms"] == {str(r.density): r.value for r in attention if r.method == "random"}
        assert list(row["sparse_ms"]) == ["0.05", "0.1", "0.2", "0.5"]
    for row in table["rows"]:
        of = [r for r in rows if r.context == row["tokens"]]
        assert row["dense_ms"] == min(r.value for r in of if r.method == "dense")
        assert row["overhead_ms"] == next(r.value for r in of if r.what == "selection_ms")
        assert row["sparse_ms"] == {str(r.density): r.value for r in of if r.method == "random"}
        assert list(row["sparse_ms"]) == ["0.5", "1.0"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = crossover.table_path("Some GPU / 80GB")
    save_table(table | {"device": "Some GPU / 80GB"}, path)
    read = crossover.load_table("Some GPU / 80GB")
    assert [vars(row) for row in read.rows] == json.loads(path.read_text())["rows"] == table["rows"]
    assert (read.shape, read.host_ms) == (
        (1, TINY.shape.heads, TINY.shape.kv_heads, TINY.shape.head_dim),
        table["host_ms"],
    )
    assert table["host_ms"] == next(r.value for r in rows if r.what == "host_ms") > 0
    decoding = crossover_decode.load_decode_table("Some GPU / 80GB")
    assert [vars(row) for row in decoding.rows] == table["decode_rows"] and decoding.shape == read.shape
    assert decoding.host_ms == table["decode_host_ms"] == next(r.value for r in rows if r.what == "decode_host_ms") > 0


def test_a_length_that_is_not_measured_in_full_is_not_in_the_table(monkeypatch) -> None:
    bench = session()
    # The host, dense attention, selection and sparse attention of the first length, dense attention of the second.
    late = Mock(side_effect=[False] * 5 + [True] * 9)
    monkeypatch.setattr(Session, "out_of_time", property(lambda _: late()))
    sizes = {"contexts": [130, 200], "densities": [0.5], "gates": "paper", "impl": "reference", "keys": [300]}
    table = CrossoverBench(baselines=["sdpa"], **sizes).run(bench, TINY.shape)
    assert [row["tokens"] for row in table["rows"]] == [130] and len(bench.left_out) == 2 + 7
    # The host's time without rows would say nothing, nor would rows without it.
    assert not {"decode_rows", "decode_host_ms"} & table.keys()


@pytest.mark.parametrize("broken", ["choice", "attention"])
def test_what_a_token_reads_is_not_timed_where_it_is_wrong(broken: str, monkeypatch) -> None:
    bench, select, attend = session(), GateDecoder.select_token, crossover_bench.decode_attention

    def other_blocks(*args):
        blocks = select(*args)
        # The block in the middle of the list is exchanged for another one.
        indices = blocks.indices.clone()
        indices[..., 2] = indices[..., 1] + 1
        return replace(blocks, indices=indices)

    if broken == "choice":
        monkeypatch.setattr(GateDecoder, "select_token", other_blocks)
    else:
        monkeypatch.setattr(crossover_bench, "decode_attention", lambda *args, **call: attend(*args, **call) * 1.01)
    assert not crossover_bench.decode_rows(bench, TINY.shape, [300], ["sdpa"], "default")
    timed = {(row.what, row.method) for row in bench.file._by_key.values()}
    assert timed == {("decode_attention_ms", "dense")} | (
        {("decode_attention_ms", "random")} if broken == "choice" else {("decode_select_ms", "gate")}
    )
    assert len(bench.failures) == 1
