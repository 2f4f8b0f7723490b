"""Answers of vLLM with a decode policy: each is that of sparse `generate`, however vLLM schedules it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engines import BLOCK, GATE, PAGE, SPARSE, Made, alone, answers, engine, logprobs, make, prompts, told_lines
from test_vllm_engine import GATES, REFERENCE, book
from tiny_models import tokens
from transformers import AutoModelForCausalLM
from vllm.v1.core.sched.scheduler import Scheduler

import seerattn
from seerattn import KeepAll, TokenBudget, TopK, TopP
from seerattn.vllm import backend, density

# vLLM has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["book"]

BUDGET = TokenBudget(tokens=3 * BLOCK)
LONG = 3 * BLOCK + 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"))


def written(made: Made, asked: list[list[int]], new: int, decode_policy=BUDGET, policy=SPARSE) -> list[list[int]]:
    """What transformers writes with the same policies."""
    with seerattn.policy(made.gated, policy, decode_policy=decode_policy):
        return [alone(made.gated, prompt, new) for prompt in asked]


def options(made: Made, decode_policy=BUDGET, policy=SPARSE, **more):
    return made.options(policy, decode_policy=decode_policy.to_dict(), **more)


@pytest.mark.parametrize("decode_policy", [BUDGET, TopK(density=0.3), TopP(p=0.5)], ids=lambda p: type(p).__name__)
def test_long_answers_are_those_of_sparse_generate(llama: Made, decode_policy) -> None:
    """They cross several blocks and pages; a second time all prompts begin with pages that the first time left."""
    asked = prompts((37, 130, 300, 1))
    expected, dense = (written(llama, asked, LONG, policy) for policy in (decode_policy, None))
    assert expected[2] != dense[2]
    with engine(llama.model, options(llama, decode_policy)) as llm:
        for _ in range(2):
            assert answers(llm, asked, LONG) == expected


def test_compiled_model_decodes_as_sparse_generate_does(llama: Made) -> None:
    asked = prompts((37, 300))
    with engine(llama.model, options(llama), enforce_eager=False) as llm:
        assert answers(llm, asked, LONG) == written(llama, asked, LONG)


@pytest.mark.parametrize("policy", [SPARSE, KeepAll()], ids=["sparse prompts", "whole prompts"])
def test_answers_do_not_depend_on_where_a_prompt_was_cut(llama: Made, policy) -> None:
    """Sparse prompts are cut at blocks, each alone; others anywhere, while others are decoded."""
    asked, is_sparse = prompts((37, 130, 300, 256)), policy == SPARSE
    expected = written(llama, asked, LONG, policy=policy)
    more = {"max_num_batched_tokens": 2 * BLOCK, "max_num_seqs": 1} if is_sparse else {"max_num_batched_tokens": 100}
    with engine(llama.model, options(llama, policy=policy), **more) as llm:
        for _ in range(2):
            assert answers(llm, asked, LONG) == expected


@pytest.fixture(scope="module")
def decoded_alone(book) -> list[tuple[list[int], float]]:
    """Answers of the reference model with its shipped gates in transformers, and what decoding them took."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    rules = {"policy": TopK(density=0.2, rule="row_share"), "decode_policy": TokenBudget(tokens=256)}
    gated, found = seerattn.attach(model, GATES, **rules, impl="sparse"), []
    for prompt in book:
        with seerattn.record_density(gated) as meter:
            found.append((alone(gated, prompt, 80), meter.decode.mean()))
    return found


@pytest.mark.parametrize("budget", [4096, 500, 512])
def test_answers_of_shipped_gates_are_those_of_sparse_generate(book, decoded_alone, budget: int) -> None:
    """The last prompt begins like the one before it, which runs beside it or shortly before."""
    asked = {"gates": str(GATES), "density": 0.2, "decode_tokens": 256, "impl": "sparse"}
    with engine(REFERENCE, asked, max_model_len=2304, max_num_batched_tokens=budget) as llm:
        for _ in range(2):
            assert answers(llm, book, 80) == [answer for answer, _ in decoded_alone]
            assert [one.decode_density for one in density.prompts()[-len(book) :]] == [
                read for _, read in decoded_alone
            ]


def test_all_keys_read_are_the_dense_answers_of_the_engine(llama: Made) -> None:
    asked = prompts()
    with engine(llama.model, llama.options(), max_num_batched_tokens=4096) as llm:
        expected, likely = answers(llm, asked, LONG), logprobs(llm, asked)
    with engine(llama.model, options(llama, KeepAll())) as llm:
        assert answers(llm, asked, LONG) == expected
        assert {one.decode_density for one in density.prompts()[-6:]} == {1.0}
        # Attention of another kernel rounds otherwise: 6 decimals of fp32, and some for two layers.
        torch.testing.assert_close(logprobs(llm, asked), likely, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt-oss"])
def test_families_decode_as_sparse_generate_does(tmp_path: Path, name: str) -> None:
    """Layers with a window beside full ones, soft caps, sinks."""
    made = make(tmp_path, name, **({"tie_word_embeddings": False} if name == "gemma3" else {}))
    asked = prompts((130, 300))
    expected = written(made, asked, 40)
    assert written(made, asked, 40, None) != expected
    with engine(made.model, options(made)) as llm:
        assert answers(llm, asked, 40) == expected


@pytest.mark.parametrize("seed", range(2))
def test_answer_does_not_depend_on_its_neighbours(llama: Made, seed: int) -> None:
    """Some begin while others are decoded."""
    draw = random.Random(seed)
    asked = prompts(tuple(draw.randint(2, 400) for _ in range(8)), seed=1000 * seed)
    lengths = [12 * number + 3 for number in range(8)]
    expected = [written(llama, [prompt], new)[0] for prompt, new in zip(asked, lengths)]
    with engine(llama.model, options(llama), max_num_seqs=3) as llm:
        order = list(range(len(asked)))
        for _ in range(2):
            draw.shuffle(order)
            found = answers(llm, [asked[i] for i in order], max(lengths))
            assert [found[order.index(i)][: lengths[i]] for i in range(len(asked))] == expected
            llm.reset_prefix_cache()


@pytest.mark.parametrize("caches", [False, True], ids=["all again", "from pages"])
def test_answers_that_made_room_for_others_go_on_as_if_they_had_not(llama: Made, monkeypatch, caches: bool) -> None:
    """What was written is read again: all of it, or what no page of the cache holds."""
    preempted, unwatched, several = [], Scheduler._preempt_request, []

    def watched(self, request, *rest, **more):
        preempted.append(request.num_computed_tokens - request.num_prompt_tokens)
        unwatched(self, request, *rest, **more)

    decode = backend.GatedBuilder._decode

    def asked_for(self, request, row):
        several.append(row.end - row.begin)
        return decode(self, request, row)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    monkeypatch.setattr(backend.GatedBuilder, "_decode", asked_for)
    asked, expected, read = prompts((200, 180, 190, 100)), [], []
    for prompt in asked:
        with seerattn.policy(llama.gated, SPARSE, decode_policy=BUDGET), seerattn.record_density(llama.gated) as meter:
            expected.append(alone(llama.gated, prompt, 120))
        read.append(meter.decode.mean())
    more = {"block_size": BLOCK, "max_model_len": 416, "num_gpu_blocks_override": 31, "enable_prefix_caching": caches}
    with engine(llama.model, options(llama), **more) as llm:
        assert answers(llm, asked, 120) == expected
    # What was read again is counted once.
    assert {one.prompt: one.decode_density for one in density.prompts()[-4:]} == dict(zip(map(len, asked), read))
    assert max(preempted) > BLOCK and max(several) > 1


@pytest.mark.parametrize("dense_up_to", [0, 340])
def test_auto_leaves_tokens_to_the_engine_that_would_read_all_or_are_faster_dense(
    llama: Made, monkeypatch, dense_up_to: int
) -> None:
    """And prompts that are too short to gain; what they lack of gate keys the first token makes that needs them."""
    monkeypatch.setattr("seerattn.vllm.backend.prefer_dense", lambda *, k_len, **_: True)
    for place in ("seerattn.hf.dense_steps", "seerattn.vllm.decoding"):
        monkeypatch.setattr(f"{place}.prefer_dense_decode", lambda *, keys, **_: keys <= dense_up_to)
    asked, rows = prompts((37, 130, 300)), []
    expected, counted = [], []
    for prompt in asked:
        rules = {"policy": None, "decode_policy": BUDGET, "impl": "auto"}
        with seerattn.policy(llama.gated, **rules), seerattn.record_density(llama.gated) as meter:
            expected.append(alone(llama.gated, prompt, LONG))
        counted.append(meter.decode.mean())
    choose = backend.GatedImpl._select_tokens

    def watched(self, q, layer, kv_cache, step, logits):
        rows.append((self.gate.layer, step.asked.start))
        return choose(self, q, layer, kv_cache, step, logits)

    monkeypatch.setattr(backend.GatedImpl, "_select_tokens", watched)
    with engine(llama.model, options(llama, impl="auto")) as llm:
        assert answers(llm, asked, LONG) == expected
    # The first token behind a prompt that fits has so many keys before it.
    assert min(start for _, start in rows) == max(BUDGET.tokens, dense_up_to)
    assert [one.decode_density for one in density.prompts()[-3:]] == counted


def test_no_key_of_an_answer_is_pooled_twice(llama: Made, monkeypatch) -> None:
    """Each finished block once, by the token behind it, and from its pages alone."""
    spans: list[tuple[int, int]] = []
    unwatched, kv_heads = seerattn.gate_selector.pool, 2

    def watched(x, context, *, start, **rest):
        if x.shape[1] == kv_heads and context.layer == 1:
            spans.append((start, start + x.shape[2]))
        return unwatched(x, context, start=start, **rest)

    monkeypatch.setattr("seerattn.gate_selector.pool", watched)
    first = tokens(300).tolist()
    with engine(llama.model, options(llama)) as llm:
        answer = answers(llm, [first], 100)[0]
        # Prompts keep whole gate keys, decoded tokens those of whole blocks.
        step = GATE.k_size
        begin, ends = 300 // step * step, range(320, 400, BLOCK)
        assert spans == [(0, 300), *zip((begin, *ends), ends)]
        spans.clear()
        answers(llm, [first + answer + tokens(40, seed=4).tolist()], 1)
        # A second turn finds the gate keys of the answer on its pages.
        assert spans == [(max(ends), 440)] and max(ends) == 3 * PAGE


def test_policy_of_the_folder_decodes_unless_another_one_or_none_is_named(llama: Made, tmp_path: Path) -> None:
    asked = prompts((130, 300))
    sparse, dense = written(llama, asked, 40), written(llama, asked, 40, None)
    gated = seerattn.attach(
        AutoModelForCausalLM.from_pretrained(llama.model, dtype=torch.float32),
        llama.gates,
        SPARSE,
        decode_policy=BUDGET,
    )
    gated.save_pretrained(tmp_path)
    named = {"gates": str(tmp_path), "impl": "sparse"}
    for more, expected in (({}, sparse), ({"decode_policy": None}, dense)):
        with engine(llama.model, named | more) as llm:
            assert answers(llm, asked, 40) == expected != [sparse, dense][expected == sparse]


def test_densities_of_answers_are_told_where_it_is_asked_for(llama: Made) -> None:
    with engine(llama.model, options(llama, log=True)) as llm, told_lines() as told:
        answers(llm, prompts((300,)), 9)
        (counted,) = density.prompts()[-1:]
        # vLLM tells with the next forward which requests it is done with.
        answers(llm, prompts((256,)), 1)
    answer = f"request {counted.name}: 8 decoded tokens, density {counted.decode_density:.4f}"
    assert [line for line in told if "decoded" in line] == [answer]
