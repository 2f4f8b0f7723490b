"""Faults in continuous batching: whose request fails, and that nothing of its neighbours changes."""

import random
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace

import pytest
import torch
from batched_model import BLOCK, NEW, SPARSE, alone, config, greedy, model, prompts
from tiny_models import tiny_model, tokens
from torch import nn
from transformers.generation.continuous_batching.scheduler import Scheduler

import seerattn
from seerattn.hf import batching
from seerattn.hf.identity import transformers_model
from seerattn.hf.requests import BATCHING, Batching
from seerattn.hf.state import attachment_of

MARK = 7  # a token that only the request at fault has
SECONDS = 60


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers does so twice a batch, which takes longer than these models.
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def marked(length: int, at: int) -> list[int]:
    """A prompt with the mark at a place."""
    found = [token if token != MARK else MARK + 1 for token in tokens(length, seed=3).tolist()]
    return [*found[:at], MARK, *found[at + 1 :]]


def unmarked(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[token if token != MARK else MARK + 1 for token in prompt] for prompt in prompts(lengths)]


def run(gated: nn.Module, asked: list[list[int]], new: int = NEW, **options) -> list[tuple[list[int], str | None]]:
    """Tokens and errors of requests that run together."""
    found = gated.generate_batch(asked, greedy(new), config(**options))
    assert len(found) == len(asked)
    return [(output.generated_tokens, output.error) for output in found.values()]


def check_one_fails(gated: nn.Module, good: list[list[int]], bad: list[int], sentence: str, **options) -> None:
    expected = [(alone(gated, prompt), None) for prompt in good]
    for place in (0, len(good)):
        found = run(gated, [*good[:place], bad, *good[place:]], **options)
        _, error = found.pop(place)
        assert sentence in error and found == expected


def never_says_mark(gated: nn.Module) -> nn.Module:
    with torch.no_grad():
        # One of the other scores is above 0.
        transformers_model(gated).get_output_embeddings().weight[MARK] = 0
    return gated


def raise_at_mark(base: nn.Module, times: int = 1_000_000) -> Callable[[], int]:
    """Has forwards that see the mark fail, so many times; tells how often they did."""
    seen = 0

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal seen
        if bool((kwargs["input_ids"] == MARK).any()) and seen < times:
            seen += 1
            raise ArithmeticError("no product today")

    base.register_forward_pre_hook(hook, with_kwargs=True)
    return lambda: seen


@pytest.mark.parametrize("budget", [64, 4096], ids=["in chunks", "at once"])
def test_selector_that_fails_for_one_request_fails_that_one_alone(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from seerattn.hf import paged

    choose = paged._select

    def choose_or_fail(selector, request, layer, q, k, context):
        # In the second layer, and late in the prompt: what ran before is of no use any more.
        if request.prompt == 222 and layer == 1 and k.shape[2] > 200:
            raise ArithmeticError("no blocks today")
        return choose(selector, request, layer, q, k, context)

    monkeypatch.setattr(paged, "_select", choose_or_fail)
    check_one_fails(model(), prompts(), tokens(222).tolist(), "no blocks today", max_batch_tokens=budget)


@pytest.mark.parametrize("draws", [False, True])
def test_scores_that_are_not_finite_fail_their_request_alone(draws: bool) -> None:
    gated = model()
    with torch.no_grad():
        transformers_model(gated).get_input_embeddings().weight[MARK] = torch.nan
    good = unmarked((37, 130, 300))
    expected = [(alone(gated, prompt), None) for prompt in good]
    # As a server has it: all draw, some from the likeliest token alone.
    options = {"do_sample": True, "top_k": 1} if draws else {}
    found = gated.generate_batch([good[0], marked(150, 20), *good[1:]], greedy(**options), config(max_batch_tokens=96))
    outputs = [(output.generated_tokens, output.error) for output in found.values()]
    tokens_given, error = outputs.pop(1)
    assert "must be finite" in error and not tokens_given and outputs == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("budget", "at"), [(4096, 3), (64, 3), (64, 140)])
def test_forward_that_fails_fails_the_request_at_fault_alone(name: str, budget: int, at: int) -> None:
    gated, good = never_says_mark(model(name)), unmarked((1, 37, 130, 300))
    expected = [(alone(gated, prompt), None) for prompt in good]
    failures = raise_at_mark(transformers_model(gated))
    for place in (0, len(good)):
        found = run(gated, [*good[:place], marked(150, at), *good[place:]], max_batch_tokens=budget)
        _, error = found.pop(place)
        assert "no product today" in error and found == expected
    assert failures() >= 2


def test_forward_that_fails_for_some_other_reason_once_fails_nobody() -> None:
    gated = model()
    asked = [*unmarked((37, 300)), marked(150, 20)]
    expected = [(alone(gated, prompt), None) for prompt in asked]
    failures = raise_at_mark(transformers_model(gated), times=1)
    assert run(gated, asked) == expected and failures() == 1


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
@pytest.mark.parametrize("seed", range(2))
def test_faults_among_many_requests_in_a_small_cache_change_no_answer(seed: int, scheduler: str) -> None:
    gated, draw = never_says_mark(model()), random.Random(seed)
    good = unmarked(tuple(draw.randint(20, 200) for _ in range(6)))
    asked = good + [marked(draw.randint(60, 200), draw.randint(1, 50)) for _ in range(2)]
    expected = {tuple(prompt): (alone(gated, prompt, 20), None) for prompt in good}
    raise_at_mark(transformers_model(gated))
    draw.shuffle(asked)
    found = run(gated, asked, 20, num_blocks=16, max_batch_tokens=100, scheduler_type=scheduler)
    for prompt, outcome in zip(asked, found):
        if MARK in prompt:
            assert "no product today" in outcome[1]
        else:
            assert outcome == expected[tuple(prompt)]


def test_policy_that_cannot_be_served_fails_the_requests_under_it_alone() -> None:
    gated, prompt = model(), prompts((130,))[0]
    expected = alone(gated, prompt)
    manager = gated.init_continuous_batching(greedy(), config())
    manager.start()
    try:
        for policy, is_served in ((SPARSE, True), (replace(SPARSE, last_rows_dense=1), False), (SPARSE, True)):
            seerattn.set_policy(gated, policy)
            output = manager.get_result(manager.add_request(prompt, max_new_tokens=NEW), timeout=SECONDS)
            assert (output.generated_tokens == expected) == (output.error is None) == is_served
    finally:
        manager.stop()


def test_those_who_wait_come_in_where_all_others_have_gone() -> None:
    """transformers shuts the door when it lacks room, and opens it at an answer: none comes of cancelled requests."""
    gated, prompt = model(), prompts((130,))[0]
    manager = gated.init_continuous_batching(greedy(), config())
    manager.start()
    try:
        first = manager.get_result(manager.add_request(prompt, max_new_tokens=1), timeout=SECONDS)
        assert first.error is None
        manager.batch_processor.scheduler.block_new_requests = True
        output = manager.get_result(manager.add_request(prompt, max_new_tokens=NEW), timeout=SECONDS)
        assert output is not None and output.generated_tokens == alone(gated, prompt)
    finally:
        manager.stop(hard_stop=True)


def test_a_device_that_does_not_answer_ends_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = model()
    raise_at_mark(transformers_model(gated))
    monkeypatch.setattr("seerattn.hf.faults._answers", lambda device: False)
    manager = gated.init_continuous_batching(greedy(), config())
    manager.start()
    try:
        for prompt in (*unmarked((37, 300)), marked(150, 20)):
            manager.add_request(prompt, max_new_tokens=200)
        outputs = [manager.get_result(timeout=SECONDS) for _ in range(3)]
        assert ["no product today" in output.error for output in outputs] == [True] * 3
        manager._generation_thread.join(SECONDS)
        assert not manager.is_running() and manager.background_thread_status.fatal_error is not None
    finally:
        manager.stop()


def test_model_without_gates_whose_selector_fails_is_isolated_too() -> None:
    class Failing:
        def select(self, q, k, context):
            raise ArithmeticError(f"no blocks of {BLOCK}")

    gated = seerattn.attach(tiny_model("llama", torch.float64), Failing(), impl="reference")
    found = run(gated, prompts((1, 130)), allow_block_sharing=False)
    assert found[0][1] is None and f"no blocks of {BLOCK}" in found[1][1]


def test_others_are_made_to_give_room_while_a_suspect_has_to_wait() -> None:
    class Full(Scheduler):
        """A scheduler that takes nobody in, and has no room for those who are."""

        def schedule_batch(self, *_: int) -> tuple:
            return (None if self.active_requests else [], False, 0, 0)

    scheduler = object.__new__(type("Aligned", (batching._Aligned, Full), {}))
    scheduler.active_requests, scheduler.waiting_requests = {"other": object()}, {"suspect": object()}
    scheduler.waiting_requests_order, scheduler.block_new_requests = deque(["suspect"]), True
    ours = Batching(attachment_of(model()), list, suspects=["suspect"])
    found = copy_context().run(lambda: BATCHING.set(ours) and scheduler._one_suspect_or_others(1, 1))
    assert found[0] is None, "which has transformers make room"
    assert [*scheduler.active_requests] == ["other"] and [*scheduler.waiting_requests] == ["suspect"]
    assert list(scheduler.waiting_requests_order) == ["suspect"]
