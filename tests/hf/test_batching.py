"""Continuous batching with gates: a request gets what sparse `generate` gives it alone, whatever runs beside it."""

import copy
import logging
import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from batched_model import BLOCK, DTYPES, NEW, PAGE, SPARSE, alone, batch, config, greedy, model, prompts
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousBatchingManager

import seerattn
from seerattn import KeepAll, TokenBudget, TopK
from seerattn.hf import batching, paged
from seerattn.hf.capturing import Capture, capturing
from seerattn.hf.meters import record_time
from seerattn.hf.paged import PAGED
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import AttentionContext, LastRowsDense

SAME_K = TopK(density=0.4, sink_blocks=0)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers does so twice a batch, which takes longer than these models.
    monkeypatch.setattr("gc.collect", lambda *_: 0)


FAMILIES = ["llama", "phi3", "smollm3", "glm", "gemma3", "gemma2", "gpt-oss"]


@pytest.mark.parametrize("budget", [100, 4096], ids=["in chunks", "at once"])
@pytest.mark.parametrize("name", FAMILIES)
def test_requests_of_a_batch_give_the_tokens_of_sparse_generate(name: str, budget: int) -> None:
    gated, asked = model(name), prompts()
    with seerattn.record_density(gated) as single:
        expected = [alone(gated, prompt) for prompt in asked]
    with seerattn.record_density(gated) as together:
        found = batch(gated, asked, max_batch_tokens=budget)
    assert found == expected
    assert together.mean() == single.mean() < 0.9
    with seerattn.policy(gated, None):
        assert [alone(gated, prompt) for prompt in asked] != expected


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("seed", range(2))
def test_request_does_not_depend_on_its_neighbours(seed: int, scheduler: str) -> None:
    gated, draw = model(), random.Random(seed)
    asked = prompts([draw.randint(2, 400) for _ in range(8)], seed=1000 * seed)
    expected = [alone(gated, prompt) for prompt in asked]
    for budget in (BLOCK, draw.randint(BLOCK, 300)):
        draw.shuffle(order := list(range(len(asked))))
        found = batch(gated, [asked[i] for i in order], max_batch_tokens=budget, scheduler_type=scheduler)
        assert found == [expected[i] for i in order]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt-oss"])
def test_without_a_policy_and_with_every_block_a_batch_is_that_of_the_unpatched_model(name: str) -> None:
    plain, gated, asked = tiny_model(name, DTYPES.get(name, torch.float64)), model(name), prompts()
    expected = batch(plain, asked)
    assert expected == [alone(plain, prompt) for prompt in asked]
    for policy in (None, KeepAll()):
        with seerattn.policy(gated, policy):
            assert batch(gated, asked) == expected
    seerattn.set_policy(gated, None)
    assert batch(gated, asked) == expected


@pytest.mark.parametrize("name", ["llama", "phi3", "glm"])
def test_parts_of_a_prompt_that_runs_dense_need_no_mask_where_a_kernel_knows_their_place(
    name: str, monkeypatch
) -> None:
    gated, asked, without = model(name, policy=None), prompts(), []
    expected = [alone(gated, prompt) for prompt in asked]
    attend = paged._ends_with_keys
    monkeypatch.setattr(paged, "_ends_with_keys", lambda q, *others: without.append(q.shape[2]) or attend(q, *others))
    # As on a GPU.
    monkeypatch.setattr(paged, "_needs_no_mask", lambda dense, q, k, window, _: 1 < q.shape[2] < k.shape[2])
    assert batch(gated, asked, max_batch_tokens=100) == expected and len(without) > 4


@pytest.mark.parametrize("impl", ["auto", "sparse"])
def test_auto_decides_by_the_whole_prompt_however_it_is_cut(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter_than_200(*, k_len: int, **_) -> bool:
        return k_len < 200

    for module in ("attention", "paged"):
        monkeypatch.setattr(f"seerattn.hf.{module}.prefer_dense", shorter_than_200)
    gated, asked = model(impl=impl), prompts()
    with seerattn.record_density(gated) as single:
        expected = [alone(gated, prompt) for prompt in asked]
    with seerattn.record_density(gated) as together:
        assert batch(gated, asked, max_batch_tokens=70) == expected
    assert together.mean() == single.mean()


def test_policy_that_needs_the_length_is_told_that_of_the_whole_prompt() -> None:
    gated, asked = model(policy=SAME_K), prompts()
    expected = [alone(gated, prompt) for prompt in asked]
    assert batch(gated, asked, max_batch_tokens=70) == expected


@pytest.mark.parametrize(("name", "budget"), [("llama", 400), ("llama", 70), ("qwen3", 150)])
def test_answers_read_the_blocks_that_generate_reads(name: str, budget: int) -> None:
    gated, asked = model(name), prompts()
    dense = [alone(gated, prompt, 40) for prompt in asked]
    with seerattn.policy(gated, SPARSE, decode_policy=TokenBudget(tokens=3 * BLOCK)):
        with seerattn.record_density(gated) as single:
            expected = [alone(gated, prompt, 40) for prompt in asked]
        with seerattn.record_density(gated) as together:
            found = batch(gated, asked, new=40, max_batch_tokens=budget)
    assert found == expected != dense
    assert together.decode.mean() == single.decode.mean() < 0.9 and together.mean() == single.mean()


def test_requests_that_make_room_for_others_go_on_as_if_they_had_not() -> None:
    gated, asked = model(), prompts((200, 180, 190, 100))
    expected = [alone(gated, prompt, 60) for prompt in asked]
    assert batch(gated, asked, 60, num_blocks=18, allow_block_sharing=False) == expected


def test_several_answers_to_one_prompt_are_alike_where_nothing_is_drawn() -> None:
    gated, prompt = model(policy=KeepAll()), prompts((130,))[0]
    one = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    found = gated.generate_batch([prompt], greedy(**one), config())
    # transformers 5.17 hands back the first one alone.
    assert len(found) in (1, 3) and all(output.generated_tokens == alone(gated, prompt) for output in found.values())


class Seen(NamedTuple):
    """A selector of all blocks that tells of every call."""

    calls: list[tuple[int, int]]

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        self.calls.append((q.shape[2], k.shape[2]))
        shape = {"batch": 1, "heads": q.shape[1], "block_q": BLOCK, "block_k": BLOCK}
        return BlockIndices.dense(q_len=q.shape[2], k_len=k.shape[2], device=q.device, **shape)


def test_any_selector_serves_and_sees_chunks_that_begin_on_blocks() -> None:
    seen = Seen([])
    plain, gated = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    seerattn.attach(gated, seen, impl="reference")
    asked = prompts((300, 90, 150))
    with torch.no_grad():
        assert batch(gated, asked, max_batch_tokens=150, allow_block_sharing=False) == batch(plain, asked)
    # The query block of a model without gates is 64.
    assert {(k - q) % 64 for q, k in seen.calls} == {0} and len({k - q for q, k in seen.calls}) > 1


@pytest.mark.parametrize("length", [200, 192], ids=["a rest", "whole pages"])
def test_equal_beginnings_are_shared_and_change_nothing(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, starts = model(), []
    unwatched = batching.Batching.mask

    def watched(self, number, row):
        starts.append(row.start)
        return unwatched(self, number, row)

    monkeypatch.setattr("seerattn.hf.requests.Batching.mask", watched)
    first = tokens(length).tolist()
    asked = [first, first, first[:130] + tokens(70, seed=9).tolist()]
    expected = [alone(gated, prompt) for prompt in asked]
    manager = gated.init_continuous_batching(greedy(), config(max_batch_tokens=1024))
    manager.start()
    try:
        for number, (prompt, answer) in enumerate(zip(asked, expected)):
            starts.clear()
            name = manager.add_request(prompt, max_new_tokens=NEW)
            output = manager.get_result(name, timeout=60)
            assert output.error is None and output.generated_tokens == answer
            assert {start % BLOCK for start in starts} == {0}
            assert min(starts) >= (128 if number else 0) and (number or min(starts) == 0)
    finally:
        manager.stop()


def test_second_turn_reads_no_page_that_was_decoded() -> None:
    """Decoded tokens attended to everything: another request whose prompt holds them does not."""
    gated = model()
    manager = gated.init_continuous_batching(greedy(), config())
    manager.start()
    try:
        for seed in range(3):
            first = tokens(130, seed=seed).tolist()
            name = manager.add_request(first, max_new_tokens=100)
            answer = manager.get_result(name, timeout=60).generated_tokens
            second = first + answer + tokens(40, seed=50 + seed).tolist()
            name = manager.add_request(second, max_new_tokens=NEW)
            assert manager.get_result(name, timeout=60).generated_tokens == alone(gated, second)
    finally:
        manager.stop()


def test_requests_with_policies_of_their_own_share_no_pages_and_are_counted_apart() -> None:
    gated, prompt = model(), tokens(200).tolist()
    policies = [SPARSE, replace(SPARSE, density=0.2), None, SAME_K, KeepAll()]
    expected, densities = [], []
    for policy in policies:
        with seerattn.policy(gated, policy), seerattn.record_density(gated) as meter:
            expected.append(alone(gated, prompt))
        densities.append(meter.mean() if meter.layers else None)
    manager = gated.init_continuous_batching(greedy(), config())
    meters = [seerattn.DensityMeter() for _ in policies]
    for number, (policy, meter) in enumerate(zip(policies, meters)):
        batching.choose_for(manager, f"{number}", policy, meter)
        manager.add_request(prompt, request_id=f"{number}", max_new_tokens=NEW)
    manager.start()
    found = {}
    while len(found) < len(policies):
        output = manager.get_result(timeout=60)
        assert output.error is None
        found[output.request_id] = output.generated_tokens
    manager.stop()
    assert [found[f"{number}"] for number in range(len(policies))] == expected
    assert [meter.mean() if meter.layers else None for meter in meters] == densities
    assert len({tuple(answer) for answer in expected}) > 2


def test_request_with_a_policy_of_its_own_is_decoded_as_the_model_decodes() -> None:
    gated, prompt, few = model(), tokens(200).tolist(), TokenBudget(tokens=3 * BLOCK)
    with seerattn.policy(gated, KeepAll(), decode_policy=few):
        expected = alone(gated, prompt, 40)
    with seerattn.policy(gated, KeepAll()):
        assert alone(gated, prompt, 40) != expected
    seerattn.set_policy(gated, SPARSE, decode_policy=few)
    manager = gated.init_continuous_batching(greedy(40), config())
    batching.choose_for(manager, "own", KeepAll(), seerattn.DensityMeter())
    manager.add_request(prompt, request_id="own", max_new_tokens=40)
    manager.start()
    try:
        assert manager.get_result("own", timeout=60).generated_tokens == expected
    finally:
        manager.stop()


def test_policy_that_changes_while_a_manager_lives_holds_for_the_requests_after_it() -> None:
    gated, prompt = model(), tokens(200).tolist()
    sparse = alone(gated, prompt)
    manager = gated.init_continuous_batching(greedy(), config())
    manager.start()
    try:
        for policy in (SPARSE, KeepAll(), SPARSE):
            seerattn.set_policy(gated, policy)
            name = manager.add_request(prompt, max_new_tokens=NEW)
            assert manager.get_result(name, timeout=60).generated_tokens == alone(gated, prompt)
    finally:
        manager.stop()
    seerattn.set_policy(gated, KeepAll())
    assert alone(gated, prompt) != sparse


def test_manager_that_is_kept_serves_again_and_goes_with_the_gates() -> None:
    plain, gated, asked = tiny_model("llama", torch.float64), model(), prompts()
    expected = [alone(gated, prompt) for prompt in asked]
    for _ in range(2):
        found = gated.generate_batch(asked, greedy(), config(), persistent_manager=True)
        assert [output.generated_tokens for output in found.values()] == expected
    with seerattn.policy(gated, KeepAll()):
        found = gated.generate_batch(asked, greedy(), config(), persistent_manager=True)
    assert [output.generated_tokens for output in found.values()] == [alone(plain, prompt) for prompt in asked]
    base = seerattn.detach(gated)
    assert not hasattr(base, "_cached_continuous_batching_manager")
    assert batch(base, asked) == [alone(plain, prompt) for prompt in asked]


def test_the_model_is_as_before_once_a_manager_ends() -> None:
    gated, asked = model(), prompts((130,))
    base = gated.get_base_model()
    expected = alone(gated, asked[0])
    manager = gated.init_continuous_batching(greedy(), config())
    assert base.config._attn_implementation == PAGED["sdpa"]
    # Forwards beside a manager are those of the model.
    assert alone(gated, asked[0]) == expected
    manager.start()
    manager.stop()
    assert base.config._attn_implementation == "seer_attention" and alone(gated, asked[0]) == expected
    assert "init_continuous_batching" not in seerattn.detach(gated).__dict__


def test_manager_that_was_not_made_by_the_model_is_refused() -> None:
    gated = model().get_base_model()
    with pytest.raises(ValueError, match=r"not supported for continuous batching|seer_attention"):
        ContinuousBatchingManager(gated, greedy(), config())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("llama", {PAGE: 48}, "multiples of the query block"),
        ("llama", {"max_batch_tokens": 16}, "at least a query block"),
        ("llama", {"scheduler_type": "none"}, "scheduler_type must be one of"),
        ("phi3-longrope", {}, "does not depend on the longest text"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(name: str, options: dict, sentence: str) -> None:
    gated = model(name)
    before = gated.get_base_model().config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        gated.init_continuous_batching(greedy(), config(**options))
    assert gated.get_base_model().config._attn_implementation == before


class Needy(Seen):
    """A selector that says that chunks get other blocks than one call, and cannot be told the length."""

    needs_length = True


@pytest.mark.parametrize(
    ("selector", "sentence"),
    [
        (LastRowsDense(Seen([]), 1), "last_rows_dense must be 0"),
        (Needy([]), "must choose in chunks as in one call"),
    ],
)
def test_what_chunks_would_change_is_refused_before_anything_runs(selector, sentence: str) -> None:
    gated = model(policy=replace(SPARSE, last_rows_dense=1))
    with pytest.raises(ValueError, match="last_rows_dense must be 0"):
        gated.init_continuous_batching(greedy(), config())
    plain = seerattn.attach(tiny_model("llama", torch.float64), selector)
    with pytest.raises(ValueError, match=sentence):
        plain.init_continuous_batching(greedy(), config())


def test_attention_that_is_watched_or_timed_is_refused() -> None:
    gated = model()
    with record_time(gated), pytest.raises(ValueError, match="forwards of its own"):
        gated.init_continuous_batching(greedy(), config())
    with capturing(Capture()), pytest.raises(ValueError, match="forwards of its own"):
        gated.init_continuous_batching(greedy(), config())


def test_copies_and_models_that_loaded_their_gates_have_batches_of_their_own(tmp_path) -> None:
    gated, prompt = model(), prompts((200, 300))
    expected, twin = [alone(gated, one) for one in prompt], copy.deepcopy(gated)
    seerattn.set_policy(twin, KeepAll())
    dense = [alone(twin, one) for one in prompt]
    assert batch(twin, prompt) == dense != expected and batch(gated, prompt) == expected
    gated.save_pretrained(tmp_path)
    loaded = tiny_model("llama", torch.float64)
    loaded.load_adapter(str(tmp_path))
    seerattn.set_policy(loaded, SPARSE, impl="reference")
    assert batch(loaded, prompt) == expected
    assert "init_continuous_batching" not in seerattn.detach(loaded).__dict__


def test_what_a_manager_cannot_have_is_switched_off_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    gated = model()
    batching._tell_what_is_off.cache_clear()
    with caplog.at_level(logging.WARNING, "seerattn"):
        for _ in range(2):
            asked = config(use_cuda_graph=True, use_async_batching=True, max_blocks_per_request=8)
            manager = gated.init_continuous_batching(greedy(), asked)
            gated.get_base_model().config._attn_implementation = "seer_attention"
    assert caplog.text.count("runs without CUDA graphs") == 1
    assert "use_cuda_graph, use_async_batching, max_blocks_per_request" in caplog.text
    assert not any(manager.continuous_batching_config.cuda_graph_booleans)
    assert asked.use_cuda_graph is True and manager.continuous_batching_config.max_blocks_per_request == 0
