"""Traps of masks, caches and implementations: each was a silent wrong result before it was a test."""

import copy
import time
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers import StaticCache

import seerattn
from seerattn import AttnGateConfig, BlockIndices, KeepAll, TokenBudget, TopK, TopP
from seerattn.hf import attention, meters
from seerattn.hf.attention import IMPLEMENTATIONS
from seerattn.hf.capture import watch_attention
from seerattn.hf.meters import density_meters, record_time, time_meter
from seerattn.hf.state import attachment_of
from seerattn.methods.streaming import StreamingSelector

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=1, key_subblocks=1)
SPARSE = TopK(density=0.3, rule="row_share")


@pytest.fixture
def model() -> torch.nn.Module:
    return seerattn.attach(tiny_model("llama"), GATE, SPARSE, impl="reference").eval()


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[BlockIndices]:
    """The blocks that the op was called with."""
    calls, op = [], meters.block_sparse_attention

    def watching(q, k, v, blocks, **kwargs):
        calls.append(blocks)
        return op(q, k, v, blocks, **kwargs)

    monkeypatch.setattr(meters, "block_sparse_attention", watching)
    return calls


def test_sparse_prefill_rejects_a_finished_mask_and_dense_takes_it(model: torch.nn.Module) -> None:
    ids = tokens(1, 100)
    causal = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="2-D padding mask"):
        model(input_ids=ids, attention_mask=causal)
    plain = seerattn.detach(copy.deepcopy(model))
    seerattn.set_policy(model, None)
    assert torch.equal(model(input_ids=ids, attention_mask=causal).logits, plain(ids, attention_mask=causal).logits)


def test_sparse_prefill_rejects_packed_documents(model: torch.nn.Module) -> None:
    positions = torch.cat((torch.arange(60), torch.arange(40)))[None]
    with pytest.raises(ValueError, match="packed documents"):
        model(input_ids=tokens(1, 100), position_ids=positions, use_cache=False)


def test_chunked_prefill_rejects_positions_that_do_not_count_up(model: torch.nn.Module) -> None:
    cache = model(input_ids=tokens(1, 64), use_cache=True).past_key_values
    positions = torch.cat((torch.arange(64, 96), torch.arange(200, 232)))[None]
    with pytest.raises(ValueError, match="position_ids must count up"):
        model(input_ids=tokens(1, 64), position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize(
    ("policy", "warned"),
    [
        (TopK(density=0.3), True),
        (TopK(density=0.3, length=512), False),
        (TopK(density=0.3, rule="row_share"), False),
        (TopP(p=0.9), False),
    ],
)
def test_chunks_that_get_other_blocks_than_the_whole_prompt_are_told_once(
    model: torch.nn.Module, visited: list[BlockIndices], caplog: pytest.LogCaptureFixture, policy, warned: bool
) -> None:
    attention._warn_of_chunks.cache_clear()
    seerattn.set_policy(model, policy)
    model(input_ids=tokens(1, 512))
    assert not caplog.messages
    whole = [blocks.to_mask() for blocks in visited]
    visited.clear()
    cache = model(input_ids=tokens(1, 512)[:, :128], use_cache=True).past_key_values
    for piece in tokens(1, 512)[:, 128:].split(192, dim=1):
        model(input_ids=piece, past_key_values=cache)
    first = [blocks.to_mask() for blocks in visited[:2]]
    equal = all(torch.equal(part, mask[:, :, :4, :4]) for part, mask in zip(first, whole))
    assert equal != warned
    assert [("give its whole length" in message) for message in caplog.messages] == [True] * warned


def test_sparse_prefill_rejects_dropout() -> None:
    model = seerattn.attach(tiny_model("llama", attention_dropout=0.1), GATE, SPARSE, impl="reference").train()
    with pytest.raises(ValueError, match="dropout must be 0"):
        model(input_ids=tokens(1, 100))


def test_static_cache_gives_the_logits_of_a_dynamic_one(model: torch.nn.Module) -> None:
    ids = tokens(2, 200)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=300)
    pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in ids.split([128, 72], dim=1)]
    # 5e-5: fp32 softmax over buffers of different lengths.
    assert (torch.cat(pieces, 1) - model(input_ids=ids).logits).abs().max() < 5e-5


def test_padding_of_a_plain_forward_is_not_ignored(model: torch.nn.Module) -> None:
    """Without position_ids the rows' positions are shifted, which must not shift their blocks."""
    ids = tokens(2, 100)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :37] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits[1:, 37:]
    alone = model(input_ids=ids[1:, 37:]).logits
    assert (padded - alone).abs().max() < 1e-4
    assert (padded - model(input_ids=ids).logits[1:, 37:]).abs().max() > 1e-2


def test_recorded_density_matches_the_blocks_that_the_op_visits(
    model: torch.nn.Module, visited: list[BlockIndices]
) -> None:
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, :50] = 0
    with seerattn.record_density(model) as meter:
        model(input_ids=tokens(2, 130), attention_mask=mask)
        model(input_ids=tokens(1, 90, seed=1))
    causal = sum(n * (n + 1) // 2 for n in (5, 3, 3))
    for layer in (0, 1):
        counted = sum(blocks.counts.sum((0, 2)) for blocks in visited[layer::2])
        assert torch.allclose(meter.by_head()[layer], counted.double() / causal)
    assert 0.3 < meter.mean() < 1
    assert not density_meters(attachment_of(model))


def test_decode_and_other_layers_are_not_counted() -> None:
    model = seerattn.attach(tiny_model("llama"), GATE, SPARSE, impl="reference", layers=[1]).eval()
    with seerattn.record_density(model) as meter:
        model.generate(tokens(1, 1), max_new_tokens=3, do_sample=False)
        assert meter.layers == []
        with pytest.raises(ValueError, match="at least one prefill"):
            meter.mean()
        model.generate(tokens(1, 100), max_new_tokens=3, do_sample=False)
    assert meter.layers == [1]


def test_auto_runs_short_and_nearly_dense_prompts_dense_and_says_so(visited: list[BlockIndices]) -> None:
    model = seerattn.attach(tiny_model("llama", max_position_embeddings=4096), GATE, TopK(density=0.1)).eval()
    short, long = tokens(1, 200), tokens(1, 3000)
    with seerattn.record_density(model) as meter:
        model(input_ids=short)
    assert not visited and meter.mean() == 1.0
    seerattn.set_policy(model, KeepAll())
    model(input_ids=long)
    assert not visited
    seerattn.set_policy(model, TopK(density=0.1))
    with seerattn.record_density(model) as meter:
        model(input_ids=long)
    assert len(visited) == 2 and meter.mean() < 0.2


def test_density_over_dense_and_sparse_calls_is_the_share_of_all_their_causal_blocks() -> None:
    shared = AttnGateConfig(block_q=32, block_k=32, share="kv_group")
    model = seerattn.attach(tiny_model("llama", max_position_embeddings=4096), shared, TokenBudget(tokens=64)).eval()
    lengths, padded = (100, 300), torch.ones(2, 300, dtype=torch.long)
    padded[0, :200] = 0
    with seerattn.record_density(model) as meter:
        seerattn.set_policy(model, KeepAll(), impl="auto")
        model(input_ids=tokens(2, 300), attention_mask=padded)  # dense
        seerattn.set_policy(model, TokenBudget(tokens=64), impl="reference")
        model(input_ids=tokens(1, 640))
    rows = [-(-n // 32) for n in lengths]
    dense = sum(n * (n + 1) // 2 for n in rows)
    expected = (dense + 1 + 2 * 19) / (dense + 20 * 21 // 2)
    for density in meter.by_head().values():
        assert density.tolist() == pytest.approx([expected] * len(density))


def test_policy_and_implementation_change_on_a_loaded_model(
    model: torch.nn.Module, visited: list[BlockIndices]
) -> None:
    ids = tokens(1, 200)
    for policy in (KeepAll(), TokenBudget(tokens=64), SPARSE):
        seerattn.set_policy(model, policy)
        model(input_ids=ids)
        assert model.active_peft_config.policy == policy.to_dict()
    kept = [int(blocks.counts.sum()) for blocks in visited[::2]]
    assert kept[0] == 4 * 7 * 8 // 2 and kept[1] == 4 * (1 + 2 * 6)
    with pytest.raises(ValueError, match="impl must be one of"):
        seerattn.set_policy(model, KeepAll(), impl="magic")


def test_gradients_reach_the_model_through_sparse_attention(model: torch.nn.Module) -> None:
    model.get_base_model().requires_grad_(True)
    ids = tokens(1, 100)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in model.get_base_model().model.layers)


def test_names_of_the_implementations_do_not_wake_other_dispatchers() -> None:
    assert not any(word in name for name in IMPLEMENTATIONS.values() for word in ("flash", "sdpa", "flex", "/"))


def test_impl_sparse_is_never_dense_and_impl_auto_is_where_that_is_faster(visited: list[BlockIndices]) -> None:
    model = seerattn.attach(tiny_model("llama"), GATE, SPARSE, impl="sparse").eval()
    ids = tokens(1, 100)
    sparse = model(input_ids=ids).logits
    assert len(visited) == 2
    seerattn.set_policy(model, SPARSE, impl="auto")
    dense = model(input_ids=ids).logits
    assert len(visited) == 2
    seerattn.set_policy(model, SPARSE, impl="reference")
    torch.testing.assert_close(model(input_ids=ids).logits, sparse, rtol=0, atol=0)
    assert (dense - sparse).abs().max() > 1e-2


def test_thresholds_run_dense_once_the_selection_says_that_it_is_nearly_full(
    visited: list[BlockIndices], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def prefer_dense(**call):
        asked.append((call["density"], call.get("selected", False)))
        return call.get("selected", False)

    monkeypatch.setattr(attention, "prefer_dense", prefer_dense)
    model = seerattn.attach(tiny_model("llama"), GATE, seerattn.Threshold(threshold=0.0), impl="auto").eval()
    plain = seerattn.detach(copy.deepcopy(model))
    ids = tokens(1, 100)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not visited
    assert asked == [(0.0, False), (1.0, True), (1.0, True)]


@pytest.mark.parametrize("told", [True, False])
def test_auto_asks_a_selector_that_tells_its_density_for_no_blocks_where_dense_is_faster(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    class Streaming:
        def select(self, q, k, context):
            chosen.append(context.layer)
            return StreamingSelector(TopK(density=0.9)).select(q, k, context)

    if told:
        Streaming.expected_density = lambda self: 0.9
    monkeypatch.setattr(attention, "prefer_dense", lambda **call: call["density"] > 0.5)
    model, ids = tiny_model("llama"), tokens(1, 200)
    plain = model(input_ids=ids).logits
    seerattn.attach(model, Streaming(), impl="auto")
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert chosen == ([] if told else [0, 1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers whose hook made a call for selectors."""
    layers, of = [], attention.LayerCall

    def watching(state, *args):
        layers.append(state.layer)
        return of(state, *args)

    monkeypatch.setattr(attention, "LayerCall", watching)
    return layers


@pytest.mark.parametrize("policy", [TopK(density=0.1), None])
def test_only_the_first_layer_of_a_dense_forward_asks_and_no_layer_of_a_decode_step(calls: list[int], policy) -> None:
    plain, ids = tiny_model("llama").eval(), tokens(2, 100)
    padded = torch.ones(2, 100, dtype=torch.long)
    padded[0, :30] = 0
    model = seerattn.attach(copy.deepcopy(plain), GATE, policy).eval()
    for kwargs in ({}, {"attention_mask": padded}):
        assert torch.equal(model(input_ids=ids, **kwargs).logits, plain(input_ids=ids, **kwargs).logits)
    assert calls == [0, 0]
    found, expected = (m(input_ids=ids, use_cache=True).past_key_values for m in (model, plain))
    calls.clear()
    step = [m(input_ids=ids[:, :1], past_key_values=c).logits for m, c in ((model, found), (plain, expected))]
    assert torch.equal(*step) and calls == []


def test_who_looks_on_sees_every_layer_of_a_dense_forward(calls: list[int]) -> None:
    model, ids = seerattn.attach(tiny_model("llama"), GATE, TopK(density=0.1)).eval(), tokens(1, 100)
    with seerattn.record_density(model) as meter:
        model(input_ids=ids)
    with record_time(model) as times:
        model(input_ids=ids)
    seen = []
    with watch_attention(model, lambda call: seen.append(call.context.layer)):
        model(input_ids=ids)
    assert meter.layers == seen == [0, 1] and calls == [0, 1] * 3
    assert len(times._spans["attention"]) == 2
    model(input_ids=ids)
    assert calls[6:] == [0]


def test_layers_that_expect_to_keep_much_run_dense_and_the_others_do_not(
    visited: list[BlockIndices], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def prefer_dense(**call):
        asked.append((call["density"], call["shape"]))
        return call["density"] > 0.5

    monkeypatch.setattr(attention, "prefer_dense", prefer_dense)
    model = tiny_model("llama", num_hidden_layers=4)
    seerattn.attach(model, lambda layer: StreamingSelector(TopK(density=0.3 if layer in (1, 3) else 0.9)))
    model(input_ids=tokens(2, 200))
    assert len(visited) == 2 and calls == [0, 1, 3]
    config = model.config
    sizes = (2, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert asked == [(0.9, sizes), (0.3, sizes)]


@dataclass(frozen=True)
class Slow:
    """Streaming that takes its time."""

    seconds: float

    def select(self, q, k, context):
        time.sleep(self.seconds)
        return StreamingSelector(TopK(density=0.5)).select(q, k, context)


def test_times_of_layers_add_up_for_each_forward_and_sequence() -> None:
    model, ids = tiny_model("llama"), tokens(2, 200)
    seerattn.attach(model, lambda layer: Slow(0.02 * (layer + 1)), impl="sparse")
    with record_time(model) as meter, torch.no_grad():
        begin = time.perf_counter()
        model(input_ids=ids)
        model(input_ids=ids[:1])
        wall = 1e3 * (time.perf_counter() - begin)
    model(input_ids=ids)
    index, attention = meter.times()
    # Two layers of 20 and 40 ms: of two sequences each has half. A sleep is never short, and never longer than all.
    assert index[0] >= 30 and index[1] >= 60
    assert all(each > 0 for each in attention) and len(index) == len(attention) == 2
    assert 2 * (index[0] + attention[0]) + index[1] + attention[1] < wall


def test_dense_attention_is_timed_where_nothing_selects() -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        seerattn.attach(model, lambda layer: None)
        with record_time(model) as meter:
            assert torch.equal(model(input_ids=ids).logits, plain)
    index, attention = meter.times()
    assert index == [0.0] and len(attention) == 1 and attention[0] > 0


def test_layers_of_which_some_select_are_timed_together() -> None:
    model, ids = tiny_model("llama"), tokens(1, 200)
    seerattn.attach(model, lambda layer: Slow(0.02) if layer else None, impl="sparse")
    with record_time(model) as meter, torch.no_grad():
        for _ in range(3):
            model(input_ids=ids)
    index, attention = meter.times()
    assert len(index) == len(attention) == 3 and min(index) >= 20
    assert time_meter(attachment_of(model)) is None


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "cohere"])
def test_generation_with_a_static_cache_gives_the_tokens_of_the_unpatched_model(name: str) -> None:
    ids, options = tokens(2, 70), {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    plain = tiny_model(name, torch.float64)
    gated = seerattn.attach(tiny_model(name, torch.float64), GATE, KeepAll(), impl="reference")
    assert torch.equal(gated.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
