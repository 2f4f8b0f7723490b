"""What selectors keep of a cache is used while the cache holds what it was made of, and changes no choice.

The oracle of every call is the selector without a memory, on the keys that the cache holds and, where chunks follow
each other, on all queries so far.
"""

import copy
import gc
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import seerattn
from seerattn import AttnGateConfig, BlockIndices, GateSelector, Policy, Threshold, TokenBudget, TopK, TopP
from seerattn.hf import gate_cache
from seerattn.hf.state import attachment_of

BLOCK, LAYERS = 32, 2
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=4, init="normal")
SPARSE = TokenBudget(tokens=3 * BLOCK)


@dataclass
class Chosen:
    """One call of a selector: what it saw, what it had kept, and what it chose."""

    selector: GateSelector
    q: Tensor
    k: Tensor
    context: seerattn.AttentionContext
    known: int
    blocks: BlockIndices
    tokens: int  # that were un-rotated

    def alone(self, q: Tensor | None = None) -> BlockIndices:
        """What it chooses without a memory, of its own queries or of more that end with them."""
        return self.selector.select(self.q if q is None else q, self.k, replace(self.context, memory=None))


@pytest.fixture
def model() -> torch.nn.Module:
    return seerattn.attach(tiny_model("llama"), GATE, SPARSE, impl="reference").eval()


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Chosen]:
    """All calls of gates by models, in order."""
    gate_cache._tell_of_change.cache_clear()
    seen, select = [], GateSelector.select

    def watching(self, q, k, context):
        if context.memory is None:
            return select(self, q, k, context)
        known, unrotated = context.memory.known, []

        def counted(x, start):
            unrotated.append(x.shape[2])
            return context.unrotate(x, start)

        blocks = select(self, q, k, replace(context, unrotate=counted))
        # A copy: a static cache is written on.
        seen.append(Chosen(self, q, k.clone(), context, known, blocks, sum(unrotated)))
        return blocks

    monkeypatch.setattr(GateSelector, "select", watching)
    return seen


@torch.no_grad()
def run(model: torch.nn.Module, ids: Tensor, cache: DynamicCache | StaticCache, ends: list[int], **kwargs) -> None:
    """Gives a model the tokens behind those in the cache, up to each of some ends."""
    for end in ends:
        begin = int(cache.get_seq_length())
        model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **kwargs)


def cache_of(model: torch.nn.Module) -> DynamicCache:
    return DynamicCache(config=model.get_base_model().config)


def store_of(model: torch.nn.Module) -> gate_cache.GateCache:
    return attachment_of(model).gate_cache


def assert_as_alone(calls: list[Chosen], known: list[int]) -> None:
    """The calls chose as without a memory, of which they had so much."""
    assert [call.known for call in calls] == known
    for call in calls:
        alone = call.alone()
        assert torch.equal(call.blocks.indices, alone.indices) and torch.equal(call.blocks.q_start, alone.q_start)


def no_comparison(*args) -> None:
    raise AssertionError("keys were compared")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "policy", [SPARSE, TopK(density=0.3, length=500), TopP(p=0.6), Threshold(threshold=0.1)], ids=str
)
def test_a_prompt_cut_anywhere_chooses_as_all_tokens_so_far_and_pools_each_key_once(
    model: torch.nn.Module, calls: list[Chosen], policy: Policy, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seerattn.set_policy(model, policy)
    monkeypatch.setattr(gate_cache, "_held_to", no_comparison)
    ids, draw = tokens(2, 500), random.Random(seed)
    # At least a block apart.
    ends = [2 * BLOCK * i + draw.randrange(BLOCK) for i in sorted(draw.sample(range(1, 7), 3))] + [500]
    run(model, ids, cache_of(model), ends)
    for layer in range(LAYERS):
        of_layer, begin = calls[layer::LAYERS], 0
        for i, (call, end) in enumerate(zip(of_layer, ends)):
            so_far = torch.cat([c.q for c in of_layer[: i + 1]], 2)
            expected = call.alone(so_far)
            assert call.known == begin and call.blocks.q_start.tolist() == [begin] * 2
            assert torch.equal(call.blocks.to_mask(), expected.to_mask()[:, :, begin // BLOCK :])
            # Queries of the cut block, and keys of its last sub-block of 8, once more.
            assert call.tokens == (end - begin + begin % BLOCK) + (end - begin + begin % 8)
            begin = end


def test_chunks_on_block_boundaries_give_the_logits_of_one_call(model: torch.nn.Module) -> None:
    model = model.double()
    ids, cache = tokens(2, 300), cache_of(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(4 * BLOCK, 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


CHANGES: dict[str, tuple[Callable, Callable, int]] = {
    "crop": (lambda cache: cache.crop(-92), lambda ids: ids, 100),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda ids: ids[[1, 0]], 192),
    "a beam twice": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), lambda ids: ids[[1, 1]], 192),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0), 192),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda ids: ids[[1]], 192),
    "moved": (lambda cache: [setattr(x, "keys", x.keys.clone()) for x in cache.layers], lambda ids: ids, 192),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_cache_does_with_its_rows_and_tokens_is_followed(
    model: torch.nn.Module, calls: list[Chosen], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, rows, known = CHANGES[name]
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [100, 192])
    change(cache)
    del calls[:]
    run(model, rows(ids), cache, [320, 400])
    # Cropped to 100 tokens the cut block begins before this call.
    first = [call for call in calls if call.known == known]
    assert_as_alone(first, [known] * LAYERS)
    assert [call.known for call in calls] == [known] * LAYERS + [320] * LAYERS
    assert not caplog.records


def test_nothing_is_known_of_a_cache_that_was_reset(model: torch.nn.Module, calls: list[Chosen]) -> None:
    """Versions of transformers before 5.23 zero the keys and count them on."""
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [192])
    cache.reset()
    del calls[:]
    run(model, tokens(2, 400, seed=1), cache, [320])
    assert_as_alone(calls, [0] * LAYERS)


def test_a_cache_that_was_cropped_and_went_on_otherwise_is_pooled_again_from_there(
    model: torch.nn.Module, calls: list[Chosen], caplog: pytest.LogCaptureFixture
) -> None:
    ids, other, cache = tokens(2, 400), tokens(2, 400, seed=1), cache_of(model)
    run(model, ids, cache, [256])
    cache.crop(-100)
    # Tokens one by one, and few at once, as speculation gives them, choose no blocks.
    run(model, other, cache, [157, 158, 163, 170])
    del calls[:]
    with caplog.at_level(logging.WARNING):
        run(model, other, cache, [400])
    assert_as_alone(calls, [156] * LAYERS)
    assert len(caplog.records) == 1 and "gate keys from there on are made again" in caplog.text


def test_a_cache_that_is_cropped_within_a_block_knows_the_queries_that_are_left(
    model: torch.nn.Module, calls: list[Chosen]
) -> None:
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [BLOCK * 6 + 20])
    first = calls[:]
    cache.crop(-9)
    run(model, ids, cache, [400])
    begin = BLOCK * 6 + 11
    for before, call in zip(first, calls[LAYERS:]):
        expected = call.alone(torch.cat((before.q[:, :, :begin], call.q), 2)).to_mask()[:, :, 6:]
        assert call.known == begin and torch.equal(call.blocks.to_mask(), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda keys: keys[:, :, 40].neg_(),
        lambda keys: keys[1, -1, 40].zero_(),
        lambda keys: keys[:, :, 40:].copy_(keys[:, :, 40:].roll(1, 2)),
    ],
)
def test_a_write_to_a_cache_is_noticed(model: torch.nn.Module, calls: list[Chosen], write: Callable) -> None:
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [256])
    write(cache.layers[0].keys)
    cache.layers[1].keys = cache.layers[1].keys.clone()
    del calls[:]
    run(model, ids, cache, [400])
    assert_as_alone(calls, [40, 256])


def test_a_second_turn_pools_answer_and_question_alone(model: torch.nn.Module, calls: list[Chosen]) -> None:
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [200, *range(201, 215)])
    del calls[:]
    run(model, ids, cache, [400])
    # The block of the answer is pooled from the question on, as nobody saw the queries of the answer.
    assert_as_alone(calls, [200] * LAYERS)
    assert all(call.tokens == (400 - 214) + (400 - 200) for call in calls)


def test_a_static_cache_is_followed_without_a_comparison(
    model: torch.nn.Module, calls: list[Chosen], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(2, 400)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=512)
    with monkeypatch.context() as patch:
        patch.setattr(gate_cache, "_held_to", no_comparison)
        run(model, ids, cache, [128, 256, 352])
    run(model, ids, cache, [353, 354])  # decoded, then compared
    run(model, ids, cache, [400])
    assert_as_alone(calls, [0, 0, 128, 128, 256, 256, 352, 352])
    cache.reset()
    del calls[:]
    run(model, tokens(2, 400, seed=1), cache, [128, 256])
    assert_as_alone(calls, [0, 0, 128, 128])


def test_inference_mode_compares_keys_and_knows_as_much(model: torch.nn.Module, calls: list[Chosen]) -> None:
    ids, cache = tokens(2, 400), cache_of(model)
    with torch.inference_mode():
        run(model, ids, cache, [128, 256, 400])
        assert_as_alone(calls, [0, 0, 128, 128, 256, 256])


def test_rows_of_a_padded_batch_are_remembered_one_by_one(model: torch.nn.Module, calls: list[Chosen]) -> None:
    ids, cache, lengths = tokens(3, 300), cache_of(model), torch.tensor([300, 250, 120])
    real = torch.arange(300, 0, -1) <= lengths[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for begin, end in [(0, 160), (160, 237), (237, 300)]:
            model(
                input_ids=ids[:, begin:end], attention_mask=real[:, :end].long(), past_key_values=cache, use_cache=True,
                position_ids=positions[:, begin:end],
            )  # fmt: skip
    # The last row has no token in the first chunk.
    rows, known = [(0, 1), (0, 1, 2), (0, 1, 2)], [(0, 0), (160, 110, 0), (237, 187, 57)]
    assert [call.known for call in calls] == [n for chunk in known for n in chunk * LAYERS]
    queries: dict[tuple[int, int], Tensor] = {}
    for call, row in zip(calls, [row for chunk in rows for row in chunk * LAYERS]):
        key, begin = (call.context.layer, row), call.known
        queries[key] = torch.cat((queries[key], call.q), 2) if key in queries else call.q
        assert torch.equal(call.blocks.to_mask(), call.alone(queries[key]).to_mask()[:, :, begin // BLOCK :])


def test_rows_that_are_padded_on_the_right_are_compared_and_known(model: torch.nn.Module, calls: list[Chosen]) -> None:
    ids, cache = tokens(2, 300), cache_of(model)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[1, 96:128] = False  # the first turn of the second row is shorter
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for begin, end in [(0, 128), (128, 300)]:
            model(
                input_ids=ids[:, begin:end], attention_mask=real[:, :end].long(), past_key_values=cache, use_cache=True,
                position_ids=positions[:, begin:end],
            )  # fmt: skip
    assert_as_alone(calls, [0, 0] * LAYERS + [128, 96] * LAYERS)


def test_a_row_of_which_other_slots_are_real_than_before_is_noticed(
    model: torch.nn.Module, calls: list[Chosen]
) -> None:
    """As many as before, so that lengths tell nothing."""
    ids, cache, real = tokens(2, 300), cache_of(model), torch.ones(2, 300, dtype=torch.bool)
    real[1, 96:128] = False
    with torch.no_grad():
        for begin, end in [(0, 128), (128, 300)]:
            model(
                input_ids=ids[:, begin:end], attention_mask=real[:, :end].long(), past_key_values=cache, use_cache=True,
                position_ids=(real.cumsum(1) - 1)[:, begin:end],
            )  # fmt: skip
            real[1, 64:128] = real[1, 64:128].flip(0)
    assert_as_alone(calls, [0, 0] * LAYERS + [128, 64] * LAYERS)


def test_a_copy_of_a_cache_is_held_to_what_is_known_of_others(model: torch.nn.Module, calls: list[Chosen]) -> None:
    """As of a prompt that many questions share."""
    ids, prompt = tokens(2, 400), cache_of(model)
    run(model, ids, prompt, [192])
    del calls[:]
    for seed in (1, 2):
        question = torch.cat((ids[:, :192], tokens(2, 208, seed=seed)), 1)
        run(model, question, copy.deepcopy(prompt), [400])
    assert_as_alone(calls, [192] * 2 * LAYERS)
    del calls[:]
    stranger = cache_of(model)
    with seerattn.policy(model, None):
        run(model, tokens(2, 192, seed=3), stranger, [192])
    run(model, ids, stranger, [400])
    assert_as_alone(calls, [0] * LAYERS)


def test_nothing_outlives_its_cache_and_copies_of_a_model_begin_empty(model: torch.nn.Module) -> None:
    cache, store = cache_of(model), store_of(model)
    run(model, tokens(2, 200), cache, [200])
    assert store.nbytes(cache) > 0
    twin = copy.deepcopy(model)
    assert store_of(twin) is not store and store_of(twin).nbytes(cache) == 0
    assert len(pickle.loads(pickle.dumps(store))._caches) == 0
    del cache
    gc.collect()
    assert len(store._caches) == 0


def test_nothing_is_kept_without_a_cache_a_gate_or_a_policy(model: torch.nn.Module, calls: list[Chosen]) -> None:
    cache = cache_of(model)
    with torch.no_grad():
        model(input_ids=tokens(2, 200), use_cache=False)
    seerattn.set_policy(model, None)
    run(model, tokens(2, 200), cache, [200])
    assert not calls and store_of(model).nbytes(cache) == 0
    streaming = seerattn.attach(tiny_model("llama"), lambda layer: Streaming(), impl="reference").eval()
    cache = DynamicCache(config=streaming.config)
    run(streaming, tokens(2, 200), cache, [100, 200])
    assert store_of(streaming).nbytes(cache) == 0


class Streaming:
    """A selector of a user, which knows nothing of memories."""

    def select(self, q: Tensor, k: Tensor, context: seerattn.AttentionContext) -> BlockIndices:
        sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": 64, "block_k": 64}
        return BlockIndices.dense(batch=q.shape[0], heads=q.shape[1], **sizes)


def test_another_policy_goes_on_with_the_same_gate_keys(model: torch.nn.Module, calls: list[Chosen]) -> None:
    """Gate keys do not depend on the policy, and a turn that ran dense is caught up with."""
    ids, cache = tokens(2, 400), cache_of(model)
    run(model, ids, cache, [128])
    with seerattn.policy(model, None):
        run(model, ids, cache, [192])
    with seerattn.policy(model, TopP(p=0.5)):
        run(model, ids, cache, [320])
    run(model, ids, cache, [400])
    assert_as_alone(calls, [0, 0, 128, 128, 320, 320])


def test_state_is_one_gate_key_in_so_many_tokens_and_a_mark_of_each(model: torch.nn.Module) -> None:
    """Of this form 1 / 8 of the keys, where both are fp32; a block that is not finished adds its queries."""
    cache, n = cache_of(model), 8 * BLOCK
    run(model, tokens(2, n), cache, [n])
    keys = cache.layers[0].keys
    expected = keys.nbytes // 8 + keys.nbytes * gate_cache.MARKS // (keys.shape[1] * keys.shape[3])
    assert store_of(model).nbytes(cache) == LAYERS * expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 2 * BLOCK},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generation_over_two_turns_writes_what_it_writes_without_a_memory(
    model: torch.nn.Module, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model.double()
    texts = []
    for forgetting in (False, True):
        if forgetting:
            monkeypatch.setattr("seerattn.hf.attention.recall_of", lambda *args: None)
        ids, cache = tokens(1, 6 * BLOCK).repeat(1, 2), {}
        for turn in range(2):
            told = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **told, **options, **cache)
            ids = torch.cat((out.sequences, tokens(1, 3 * BLOCK, seed=turn)), 1)
            # Beams leave a cache of all of them, and not every way takes one of an earlier turn.
            cache = {} if options else {"past_key_values": out.past_key_values}
        texts.append(ids)
    assert torch.equal(*texts)
