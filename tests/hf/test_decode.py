"""Sparse decoding of models: lists of one sequence alone, whatever its cache went through, and attention to them.

The oracle of a list is the decoder without a memory, on the keys that the cache holds; of tokens it is the unpatched
model where every block is kept, and each sequence alone where some are.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

import seerattn
from seerattn import AttnGateConfig, KeepAll, Threshold, TokenBudget, TopK, TopP
from seerattn.gate_decode import GateDecoder
from seerattn.hf import attention, decode, gate_cache
from seerattn.hf.call import LayerCall
from seerattn.hf.capture import watch_attention
from seerattn.hf.state import attachment_of
from seerattn.selection.decode_blocks import DecodeBlocks

BLOCK, LAYERS, NEW = 32, 2, 70
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=4, init="normal")
PROMPTS, STEPS = TopK(density=0.3, rule="row_share"), TokenBudget(tokens=3 * BLOCK)


@dataclass
class Chosen:
    """One call of a decoder."""

    decoder: GateDecoder
    q: Tensor
    k: Tensor
    context: seerattn.AttentionContext
    known: int
    blocks: DecodeBlocks
    read: list[int]  # tokens that were un-rotated at once

    @property
    def lists(self) -> list[list[list[int]]]:
        return [[[n for n in row if n >= 0] for row in heads] for heads in self.blocks.indices.tolist()]

    def alone(self) -> DecodeBlocks:
        return self.decoder.select_token(self.q, self.k, replace(self.context, memory=None))


def gated(name: str = "llama", dtype: torch.dtype = torch.float32, impl: str = "reference", **options):
    options = {"policy": PROMPTS, "decode_policy": STEPS} | options
    return seerattn.attach(tiny_model(name, dtype), GATE, impl=impl, **options).eval()


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Chosen]:
    """All calls of decoders by models, in order."""
    gate_cache._tell_of_change.cache_clear()
    attention._log_unservable.cache_clear()
    seen, select = [], GateDecoder.select_token

    def watching(self, q, k, context):
        if context.memory is None:
            return select(self, q, k, context)
        known, read = context.memory.known, []

        def counted(x, start):
            read.append(x.shape[2])
            return context.unrotate(x, start)

        blocks = select(self, q, k, replace(context, unrotate=counted))
        seen.append(Chosen(self, q, k.clone(), context, known, blocks, read))
        return blocks

    monkeypatch.setattr(GateDecoder, "select_token", watching)
    return seen


def assert_as_alone(calls: list[Chosen]) -> None:
    assert calls
    for call in calls:
        alone = call.alone()
        assert torch.equal(call.blocks.indices, alone.indices) and torch.equal(call.blocks.counts, alone.counts)


def no_comparison(*args) -> None:
    raise AssertionError("keys were compared")


def write(model, ids: Tensor, **options) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(input_ids=ids, **options)


def padded(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """A batch of the first so many tokens of each row, padded on the left."""
    width, rows = max(lengths), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, one, n in zip(rows, ids, lengths):
        row[width - n :] = one[:n]
    return {"input_ids": rows, "attention_mask": (rows > 0).long()}


@torch.no_grad()
def run(model, ids: Tensor, cache, ends: list[int]) -> list[Tensor]:
    """Gives a model the tokens behind those in the cache, up to each of some ends; logits of the last tokens."""
    found = []
    for end in ends:
        begin = int(cache.get_seq_length())
        found.append(model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True).logits[:, -1])
    return found


NAMES = ["llama", "llama-yarn", "qwen3", "gemma2", "gpt-oss", "smollm3", "glm", "cohere", "nanochat", "gpt2"]


@pytest.mark.parametrize("name", NAMES)
def test_with_all_blocks_kept_every_model_writes_what_it_does_unpatched(name: str) -> None:
    ids, dtype = tokens(2, 70), torch.float32 if name == "gpt-oss" else torch.float64  # which has experts for no other
    model = gated(name, dtype, policy=None, decode_policy=KeepAll())
    with seerattn.record_density(model) as meter:
        found = write(model, ids)
    assert torch.equal(found, write(tiny_model(name, dtype), ids))
    assert meter.decode.mean() == 1.0 and meter.decode.layers and not meter.layers


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_with_all_blocks_kept_padded_rows_beams_and_static_caches_are_the_unpatched_model(options: dict) -> None:
    batch = padded(tokens(3, 90), [90, 41, 64])
    model = gated(dtype=torch.float64, policy=None, decode_policy=KeepAll())
    found, expected = (m.generate(**batch, max_new_tokens=40, do_sample=False, **options) for m in (
        model, tiny_model("llama", torch.float64)
    ))  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3", "glm", "gpt2"])
@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_a_padded_batch_are_written_as_each_alone(name: str, static: bool, calls: list[Chosen]) -> None:
    ids, lengths = tokens(3, 200), [200, 131, 37]
    model = gated(name, torch.float64)
    options = {"cache_implementation": "static"} if static else {}
    found = model.generate(**padded(ids, lengths), max_new_tokens=NEW, do_sample=False, **options)
    lists = [call.lists[0] for call in calls]
    assert len(lists) == 3 * (NEW - 1) * len(attachment_of(model).layers)
    del calls[:]
    for row, one, n in zip(found, ids, lengths):
        assert torch.equal(row[200 - n :], write(model, one[None, :n])[0])
    assert sorted(lists) == sorted(call.lists[0] for call in calls)


@pytest.mark.parametrize("policy", [STEPS, TopK(density=0.3), TopP(p=0.6), Threshold(threshold=0.1)], ids=str)
@pytest.mark.parametrize("prompt", [PROMPTS, None], ids=["sparse", "dense"])
def test_lists_are_those_without_a_memory_and_keys_are_read_once(calls: list[Chosen], prompt, policy) -> None:
    model = gated(policy=prompt, decode_policy=policy)
    write(model, tokens(2, 100))
    # The first token of the answer is that of the prompt.
    assert len(calls) == LAYERS * (NEW - 1)
    assert_as_alone(calls)
    for layer in range(LAYERS):
        for i, call in enumerate(calls[layer::LAYERS]):
            end = 101 + i
            assert call.k.shape[2] == end
            whole = (end - 1) // BLOCK * BLOCK
            before = {0: 96 if prompt is not None else 0}.get(i, (end - 2) // BLOCK * BLOCK)
            assert call.read == ([whole - before] if whole > before else []) + [1]


@pytest.mark.parametrize("policy", [PROMPTS, None], ids=["sparse", "dense"])
def test_a_prompt_in_chunks_and_one_that_is_padded_lead_to_the_lists_of_one_call(calls: list[Chosen], policy) -> None:
    model, ids = gated(policy=policy, dtype=torch.float64), tokens(2, 240)
    ends = [*range(201, 241)]
    run(model, ids, DynamicCache(config=model.get_base_model().config), [200, *ends])
    expected = [call.lists for call in calls]
    del calls[:]
    run(model, ids, DynamicCache(config=model.get_base_model().config), [64, 160, 200, *ends])
    assert [call.lists for call in calls] == expected
    del calls[:]
    static = StaticCache(config=model.get_base_model().config, max_cache_len=300)
    run(model, ids, static, [200, *ends])
    assert [call.lists for call in calls] == expected


def test_reordered_beams_and_answers_in_parallel_are_followed(
    calls: list[Chosen], caplog: pytest.LogCaptureFixture
) -> None:
    model = gated()
    write(model, tokens(2, 100), num_beams=3)
    assert_as_alone(calls)
    # The first step compares with what the prompt left; none reads a finished block again.
    assert all(sum(call.read) == 1 + BLOCK * ((call.k.shape[2] - 1) % BLOCK == 0) for call in calls[LAYERS:])
    del calls[:]
    torch.manual_seed(0)
    write(model, tokens(1, 100), do_sample=True, num_return_sequences=3)
    assert_as_alone(calls)
    assert not caplog.records


def test_after_a_crop_what_goes_on_otherwise_has_lists_of_its_own(calls: list[Chosen]) -> None:
    model, ids, other = gated(), tokens(2, 200), tokens(2, 200, seed=1)
    cache = DynamicCache(config=model.get_base_model().config)
    run(model, ids, cache, [100, *range(101, 150)])
    cache.crop(-60)
    del calls[:]
    run(model, other, cache, [90, *range(91, 150)])
    assert_as_alone(calls)


def test_a_second_turn_knows_the_keys_of_the_answer(calls: list[Chosen], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gated(), tokens(2, 400)
    cache, known = DynamicCache(config=model.get_base_model().config), []
    select = seerattn.GateSelector.select

    def watching(self, q, k, context):
        known.append(context.memory.known)
        return select(self, q, k, context)

    monkeypatch.setattr(seerattn.GateSelector, "select", watching)
    monkeypatch.setattr(gate_cache, "_held_to", no_comparison)
    run(model, ids, cache, [100, *range(101, 170), 300, *range(301, 330)])
    # The last step that finished a block was that of token 161, and no keys were compared.
    assert known == [0, 0, 161, 161]
    assert_as_alone(calls)
    again = [call for call in calls if call.k.shape[2] == 301]
    assert [call.read for call in again] == [[1]] * LAYERS


def test_a_copy_of_a_cache_is_compared_in_its_first_step_alone(
    calls: list[Chosen], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, compared = gated(), tokens(2, 200), []
    cache, held_to = DynamicCache(config=model.get_base_model().config), gate_cache._held_to
    run(model, ids, cache, [150])
    monkeypatch.setattr(gate_cache, "_held_to", lambda *args: compared.append(1) or held_to(*args))
    run(model, ids, copy.deepcopy(cache), [*range(151, 156)])
    assert len(compared) == LAYERS and [call.read for call in calls] == [[1]] * 5 * LAYERS


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}], ids=str)
def test_tokens_that_speculation_verifies_at_once_are_dense_and_single_ones_sparse(
    calls: list[Chosen], options: dict, visited: list[int]
) -> None:
    model, ids = gated(), tokens(1, 30).repeat(1, 4)
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", num_hidden_layers=1)
    out = write(model, ids, **options)
    assert out.shape[1] > 120 and visited == [1] * len(visited)
    if calls:
        assert_as_alone(calls)


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of each call of the decode op."""
    found, op = [], decode.decode_attention

    def watching(q, k, v, **kwargs):
        found.append(1)
        return op(q, k, v, **kwargs)

    monkeypatch.setattr(decode, "decode_attention", watching)
    return found


def test_without_a_policy_no_step_asks_for_anything_and_a_context_decides_for_itself(
    calls: list[Chosen], visited: list[int]
) -> None:
    ids, plain = tokens(2, 100), tiny_model("llama")
    dense = write(plain, ids)
    model = gated(policy=None, decode_policy=None)
    assert torch.equal(write(model, ids), dense) and not attachment_of(model).decodes
    with seerattn.policy(model, None, decode_policy=STEPS):
        sparse = write(model, ids)
    assert len(calls) == len(visited) == LAYERS * (NEW - 1) and not torch.equal(sparse, dense)
    del calls[:], visited[:]
    assert torch.equal(write(model, ids), dense) and not calls
    seerattn.set_policy(model, None, decode_policy=STEPS)
    with seerattn.policy(model, None):
        assert torch.equal(write(model, ids), dense) and not calls
    with model.disable_adapter():
        assert torch.equal(write(model, ids), dense) and not calls
    assert torch.equal(write(model, ids), sparse)
    seerattn.set_policy(model, None)
    del calls[:], visited[:]
    assert torch.equal(write(model, ids), dense) and not calls and not visited


def test_auto_decodes_as_the_unpatched_model_while_it_would_read_everything(
    visited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", lambda **_: False)
    ids = tokens(1, 60)
    model = gated(policy=None, impl="auto")
    with seerattn.record_density(model) as meter:
        found = write(model, ids, max_new_tokens=3 * BLOCK - 60 + 1)
    assert torch.equal(found, write(tiny_model("llama"), ids, max_new_tokens=3 * BLOCK - 60 + 1))
    assert not visited and meter.decode.mean() == 1.0
    write(model, ids, max_new_tokens=3 * BLOCK - 60 + 2)
    assert len(visited) == LAYERS


def test_the_meter_tells_prompts_and_decoded_tokens_apart(calls: list[Chosen]) -> None:
    ids = tokens(3, 120)
    model = gated(decode_policy=TopP(p=0.5))
    with seerattn.record_density(model) as meter:
        model.generate(**padded(ids, [120, 77, 50]), max_new_tokens=NEW, do_sample=False)
    for layer in range(LAYERS):
        of_layer = [call for call in calls if call.context.layer == layer]
        counted = sum(call.blocks.counts.sum(0) for call in of_layer)
        causal = sum(-(-call.k.shape[2] // BLOCK) for call in of_layer)
        expected = (counted.double() / causal).repeat_interleave(2)
        assert torch.allclose(meter.decode.by_head()[layer], expected)
    with seerattn.record_density(model) as prompts:
        model(**padded(ids, [120, 77, 50]))
    assert meter.mean() == prompts.mean()
    with pytest.raises(ValueError, match="at least one token that was decoded by a policy"):
        prompts.decode.mean()


def test_who_captures_prompts_sees_a_model_that_decodes_dense(calls: list[Chosen]) -> None:
    model, ids = gated(), tokens(1, 100)
    with watch_attention(model, lambda call: None):
        found = write(model, ids)
    assert torch.equal(found, write(tiny_model("llama"), ids)) and not calls


def test_sliding_layers_and_layers_without_a_gate_decode_as_they_did(visited: list[int]) -> None:
    model = seerattn.attach(tiny_model("gemma2"), GATE, PROMPTS, decode_policy=STEPS, impl="reference").eval()
    write(model, tokens(1, 100))
    assert len(visited) == NEW - 1
    del visited[:]
    form = {"impl": "reference", "decode_policy": STEPS}
    config = seerattn.SeerConfig(gate=GATE.to_dict(), layers=[1], decode_policy=STEPS.to_dict())
    assert config.decode_policy == STEPS.to_dict()
    model = seerattn.attach(tiny_model("llama"), GATE, PROMPTS, layers=[1], **form).eval()
    write(model, tokens(1, 100))
    assert len(visited) == NEW - 1


def test_a_folder_of_gates_keeps_the_decode_policy(tmp_path) -> None:
    model, ids = gated(), tokens(1, 100)
    model.save_pretrained(str(tmp_path))
    loaded = seerattn.attach(tiny_model("llama"), tmp_path, impl="reference").eval()
    assert torch.equal(write(loaded, ids), write(model, ids))
    assert loaded.active_peft_config.decode_policy == STEPS.to_dict()
    dense = seerattn.attach(tiny_model("llama"), tmp_path, PROMPTS, decode_policy=KeepAll(), impl="reference").eval()
    assert dense.active_peft_config.decode_policy == KeepAll().to_dict()
    twin = copy.deepcopy(model)
    assert torch.equal(write(twin, ids), write(model, ids))
    with pytest.raises(ValueError, match="last_rows_dense of a decode_policy"):
        seerattn.SeerConfig(decode_policy=TopP(p=0.5, last_rows_dense=2).to_dict())


CHANGES: dict[str, tuple[Callable, str]] = {
    "a mask that weighs keys": (
        lambda n: {"attention_mask": torch.linspace(-1, 0, n)[None, None, None]},
        "must hide keys or show them",
    ),
    "a mask of every head": (lambda n: {"attention_mask": torch.zeros(1, 4, 1, n)}, r"must be \[B, 1, 1, 121\]"),
    "positions that nobody can tell": (lambda n: {"position_ids": torch.tensor([[n + 50]])}, "must count up by one"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_that_cannot_be_followed_is_rejected_and_runs_dense_under_auto(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, text = CHANGES[name]
    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", lambda **_: False)
    # Those of models whose attention is not given them.
    monkeypatch.setattr(LayerCall, "positions", lambda self, row, k_len, slots: iter([torch.arange(k_len)[None]]))
    ids, logits = tokens(1, 121), []
    for impl in ("reference", "auto", None):
        model = gated(policy=None, impl=impl) if impl else tiny_model("llama")
        config = (model.get_base_model() if impl else model).config
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=ids[:, :120], past_key_values=cache)
            call = {"input_ids": ids[:, 120:], "past_key_values": cache} | change(121)
            if impl == "reference":
                with pytest.raises(ValueError, match=text):
                    model(**call)
                continue
            with caplog.at_level(logging.WARNING):
                logits.append(model(**call).logits)
    assert torch.equal(*logits)
    assert len(caplog.records) == 1 and "a call runs dense" in caplog.text


def test_frequencies_that_depend_on_the_length_decode_dense_under_auto() -> None:
    ids = tokens(1, 60)
    model = seerattn.attach(tiny_model("llama-dynamic"), GATE, None, decode_policy=TokenBudget(tokens=32)).eval()
    assert torch.equal(write(model, ids, max_new_tokens=20), write(tiny_model("llama-dynamic"), ids, max_new_tokens=20))
    with (
        pytest.raises(ValueError, match="must not depend on the length"),
        seerattn.policy(model, None, decode_policy=STEPS, impl="reference"),
    ):
        write(model, ids, max_new_tokens=20)


def test_selectors_decode_by_what_is_attached_with_them(visited: list[int]) -> None:
    @dataclass(frozen=True)
    class Last:
        def select_token(self, q, k, context):
            last = torch.full((q.shape[0], k.shape[1], 1), (k.shape[2] - 1) // 64, dtype=torch.int32)
            return DecodeBlocks(last, torch.ones_like(last[..., 0]), 64)

    model, ids = tiny_model("llama"), tokens(1, 200)
    dense = write(model, ids)
    seerattn.attach(model, lambda layer: None, decode_policy=lambda layer: Last() if layer else None, impl="sparse")
    found = write(model, ids, generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False))
    assert len(visited) == NEW - 1 and not torch.equal(found, dense)
    seerattn.attach(model, lambda layer: None, decode_policy=Last(), impl="sparse")
    write(model, ids)
    assert len(visited) == (NEW - 1) * (1 + LAYERS)
    with pytest.raises(ValueError, match="must be a DecodeSelector"):
        seerattn.attach(model, lambda layer: None, decode_policy=STEPS)
    seerattn.attach(model, lambda layer: None)
    assert torch.equal(write(model, ids), dense)
