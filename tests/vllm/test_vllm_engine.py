"""Requests of vLLM with gates: each gets what sparse `generate` gives it alone, however vLLM schedules it."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
import torch
from engines import BLOCK, GATE, PAGE, SPARSE, Made, alone, answers, chosen, engine, logprobs, make, prompts, told_lines
from tiny_models import tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.v1.attention import selector
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.scheduler import Scheduler

import seerattn
from seerattn import KeepAll, TopK
from seerattn.vllm import density

# vLLM has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["chosen"]

ROOT = Path(__file__).parents[2]
REFERENCE, GATES = ROOT / "assets/reference-model", ROOT / "assets/reference-gates/best"
BOOK = ROOT / "assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def book() -> list[list[int]]:
    with gzip.open(BOOK, "rt") as file:
        ids = AutoTokenizer.from_pretrained(REFERENCE)(file.read()[3000:12000])["input_ids"]
    return [ids[100:137], ids[500:1200], ids[:1500], ids[:2048]]


@pytest.fixture(scope="module")
def read_alone(book) -> list[tuple[list[int], float]]:
    """Answers and densities of the reference model with its shipped gates in transformers."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    dense = [alone(model, prompt) for prompt in book]
    gated, found = seerattn.attach(model, GATES, TopK(density=0.2, rule="row_share"), impl="sparse"), []
    for prompt in book:
        with seerattn.record_density(gated) as meter:
            found.append((alone(gated, prompt), meter.mean()))
    assert [answer for answer, _ in found[1:]] != dense[1:]
    return found


@pytest.mark.parametrize("budget", [4096, 500, 512])
def test_requests_give_the_tokens_of_sparse_generate_with_shipped_gates(book, read_alone, budget: int) -> None:
    """The last prompt begins like the one before it, which runs beside it or shortly before."""
    options = {"gates": str(GATES), "density": 0.2, "impl": "sparse"}
    with engine(REFERENCE, options, max_model_len=2304, max_num_batched_tokens=budget) as llm:
        assert answers(llm, book) == [answer for answer, _ in read_alone]
        whole = density.prompts()[-len(book) :]
        assert answers(llm, book) == [answer for answer, _ in read_alone]
        hits = density.prompts()[-len(book) :]
    assert [one.prompt for one in whole] == list(map(len, book))
    assert [one.cached for one in whole] == [0, 0, 0, 1408] and [one.cached for one in hits] == [0, 640, 1408, 1920]
    if budget == 4096:
        assert [one.density for one in whole[:3]] == [found for _, found in read_alone[:3]]


def test_rule_that_depends_on_the_length_is_told_that_of_the_whole_prompt(llama: Made) -> None:
    policy = TopK(density=0.4, sink_blocks=0)
    with seerattn.policy(llama.gated, policy):
        expected = [alone(llama.gated, prompt) for prompt in prompts()]
    more = {"max_num_batched_tokens": 10 * BLOCK, "max_num_seqs": 1, "enable_prefix_caching": False}
    with engine(llama.model, llama.options(policy), **more) as llm:
        assert answers(llm, prompts()) == expected


def test_compiled_model_gives_the_tokens_of_sparse_generate(llama: Made) -> None:
    with engine(llama.model, llama.options(), enforce_eager=False) as llm:
        assert answers(llm, prompts()) == [alone(llama.gated, prompt) for prompt in prompts()]


@pytest.mark.parametrize("budget", [4096, 100], ids=["one shot", "chunks"])
def test_all_blocks_kept_are_the_dense_output_of_the_engine(llama: Made, budget: int) -> None:
    """A second time all of them begin with pages that the first time left."""
    asked, more = prompts(), {"max_num_batched_tokens": budget}
    with engine(llama.model, None, **more) as llm:
        expected, likely = answers(llm, asked), logprobs(llm, asked)
    with engine(llama.model, llama.options(KeepAll()), **more) as llm:
        assert answers(llm, asked) == expected
        assert {one.density for one in density.prompts()[-5:]} == {1.0}
        # Attention of another kernel rounds otherwise: 6 decimals of fp32, and some for two layers.
        torch.testing.assert_close(logprobs(llm, asked), likely, atol=1e-4, rtol=0)
        assert max(one.cached for one in density.prompts()[-5:]) == 640


def test_without_options_the_engine_is_its_own_bit_for_bit(llama: Made) -> None:
    def found() -> tuple[type, torch.Tensor]:
        selector._cached_get_attn_backend.cache_clear()
        with engine(llama.model, None, max_num_batched_tokens=100) as llm:
            layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            return type(next(iter(layers.values())).impl), logprobs(llm, prompts())

    (kind, with_plugin), member = found(), AttentionBackendEnum.CPU_ATTN
    path = member.get_path()
    assert path.startswith("seerattn.")
    member.clear_override()
    try:
        stock, without = found()
    finally:
        register_backend(member, path)
        selector._cached_get_attn_backend.cache_clear()
    assert kind is stock is CPUAttentionBackendImpl and torch.equal(with_plugin, without)


@pytest.mark.parametrize("seed", range(2))
def test_request_does_not_depend_on_its_neighbours(llama: Made, seed: int) -> None:
    """Some begin while others are decoded."""
    draw = random.Random(seed)
    asked = prompts(tuple(draw.randint(2, 400) for _ in range(8)), seed=1000 * seed)
    expected = [alone(llama.gated, prompt, 2 + number) for number, prompt in enumerate(asked)]
    with engine(llama.model, llama.options(), max_num_seqs=3) as llm:
        order = list(range(len(asked)))
        for _ in range(2):
            draw.shuffle(order)
            found = answers(llm, [asked[i] for i in order], 9)
            assert [found[order.index(i)][: 2 + i] for i in range(len(asked))] == expected
            llm.reset_prefix_cache()


@pytest.mark.parametrize("budget", [500, 512])
def test_cut_changes_the_list_of_the_block_that_it_cuts_alone(llama: Made, chosen, budget: int) -> None:
    prompt = prompts((1000,))
    with engine(llama.model, llama.options()) as llm:
        answers(llm, prompt, 1)
    (whole,) = [one.rows() for one in chosen if one.layer == 0]
    chosen.clear()
    with engine(llama.model, llama.options(), max_num_batched_tokens=budget) as llm:
        answers(llm, prompt, 1)
    parts = [one for one in chosen if one.layer == 0]
    assert [(one.start, one.end) for one in parts] == [(0, budget), (budget, 1000)]
    cut = (budget - 1) // BLOCK
    for number, part in enumerate(parts):
        for row, mask in part.rows().items():
            # The first part saw some of its queries; the second one knows all of them.
            if number or row != cut or budget % BLOCK == 0:
                assert torch.equal(mask, whole[row][:, : mask.shape[1]])


def test_no_key_is_pooled_twice_whoever_read_it_and_decoded_ones_when_they_are_needed(
    llama: Made, chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[int, int]] = []
    unwatched, step, kv_heads = seerattn.gate_selector.pool, GATE.k_size, 2

    def watched(x, context, *, start, **rest):
        if x.shape[1] == kv_heads and context.layer == 1:
            spans.append((start, start + x.shape[2]))
        return unwatched(x, context, start=start, **rest)

    monkeypatch.setattr("seerattn.gate_selector.pool", watched)
    first = tokens(700).tolist()
    with engine(llama.model, llama.options(), max_num_batched_tokens=500) as llm:
        answer = answers(llm, [first], 100)[0]
        # Keys of the gate key that the cut left unfinished are read once more.
        assert spans == [(0, 500), (500 // step * step, 700)]
        spans.clear()
        answers(llm, [first[:650] + tokens(50, seed=3).tolist()], 1)
        assert spans == [(640, 700)]
        spans.clear()
        chosen.clear()
        second = first + answer + tokens(40, seed=4).tolist()
        answers(llm, [second], 1)
        # Pages of 768 tokens are found, of which 700 // step gate keys were made.
        assert spans == [(700 // step * step, 840)]
    (found,) = [one.rows() for one in chosen if one.layer == 0]
    chosen.clear()
    with engine(llama.model, llama.options()) as llm:
        answers(llm, [second], 1)
    (whole,) = [one.rows() for one in chosen if one.layer == 0]
    assert min(found) == 768 // BLOCK and all(torch.equal(mask, whole[row]) for row, mask in found.items())


def test_requests_that_make_room_for_others_go_on_as_if_they_had_not(llama: Made, monkeypatch) -> None:
    preempted, unwatched = [], Scheduler._preempt_request

    def watched(self, request, *rest, **options):
        preempted.append(request.num_computed_tokens - request.num_prompt_tokens)
        unwatched(self, request, *rest, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    asked, expected, densities = prompts((200, 180, 190, 100)), [], []
    for prompt in asked:
        with seerattn.record_density(llama.gated) as meter:
            expected.append(alone(llama.gated, prompt, 60))
        densities.append(meter.mean())
    more = {"block_size": BLOCK, "max_model_len": 288, "num_gpu_blocks_override": 20, "enable_prefix_caching": False}
    with engine(llama.model, llama.options(), **more) as llm:
        assert answers(llm, asked, 60) == expected
    # What was read again is counted once.
    assert {one.prompt: one.density for one in density.prompts()[-4:]} == dict(zip(map(len, asked), densities))
    # One of them was writing its answer: what it had written is read again, as it was written.
    assert max(preempted) > 0


def test_auto_reads_prompts_densely_that_are_too_short_to_gain_however_they_are_cut(llama: Made, monkeypatch) -> None:
    monkeypatch.setattr("seerattn.vllm.backend.prefer_dense", lambda *, k_len, **_: k_len < 200)
    asked = prompts((130, 300, 190, 700))
    expected = []
    for prompt in asked:
        with seerattn.policy(llama.gated, None if len(prompt) < 200 else SPARSE):
            expected.append(alone(llama.gated, prompt))
    more = {"max_num_batched_tokens": 2 * BLOCK, "max_num_seqs": 1}
    with engine(llama.model, llama.options(impl="auto"), **more) as llm:
        assert answers(llm, asked) == expected
    assert [one.density == 1 for one in density.prompts()[-4:]] == [True, False, True, False]


def test_densities_are_told_where_it_is_asked_for(llama: Made) -> None:
    with engine(llama.model, llama.options(log=True), max_num_batched_tokens=100) as llm, told_lines() as told:
        answers(llm, prompts((300,)), 1)
        answers(llm, prompts((300,)), 1)
    counted = density.prompts()[-2:]
    assert [one.cached for one in counted] == [0, 256]
    for line, one, found in zip(told, counted, ("", f", {2 * PAGE} of them from the cache"), strict=True):
        assert line == f"request {one.name}: 300 prompt tokens{found}, density {one.density:.4f}"
