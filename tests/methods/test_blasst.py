"""BLASST against a walk over the blocks in fp64."""

import math
from dataclasses import replace

import pytest
import torch
from baseline_calls import CONTEXT, calls, kept, products, rows_of

from seerattn.methods import blasst
from seerattn.methods.blasst import Blasst, BlasstSelector, SkippingSelector


def walked(q, k, head: int, threshold: float, block_q: int, block_k: int, softcap, sink) -> dict[int, set[int]]:
    """The blocks of each query block that an online softmax in order would not skip, in fp64."""
    q_len, k_len = q.shape[2], k.shape[2]
    scores = products(q, k, 0, head)
    found = {}
    for row, places in rows_of(q_len, k_len, block_q).items():
        met = dict.fromkeys(places, -math.inf if sink is None else sink)
        found[row] = {0} | {place // block_k for place in places}
        for block in range(places[-1] // block_k + 1):
            needed = False
            for place in places:
                values = [
                    scores[place - (k_len - q_len)][key] * CONTEXT.scale
                    for key in range(block * block_k, min((block + 1) * block_k, place + 1))
                ]
                if softcap is not None:
                    values = [softcap * math.tanh(value / softcap) for value in values]
                if not values:
                    continue
                met[place] = max(met[place], *values)
                needed |= max(values) - met[place] >= math.log(threshold)
            if needed:
                found[row].add(block)
    return found


@pytest.mark.parametrize(
    ("q_len", "k_len", "block_q", "block_k"), [(150, 150, 32, 32), (70, 211, 32, 16), (5, 99, 64, 32)]
)
@pytest.mark.parametrize("threshold", [1.0, 0.3, 0.01])
@pytest.mark.parametrize(("softcap", "sink"), [(None, None), (2.0, None), (None, 1.5)])
def test_blasst_keeps_what_an_online_softmax_would_not_skip(
    q_len, k_len, block_q, block_k, threshold, softcap, sink, monkeypatch
) -> None:
    monkeypatch.setitem(blasst._STRIP_ELEMENTS, "cpu", 1)
    q, k = calls(q_len, k_len)
    sinks = None if sink is None else torch.full((q.shape[1],), sink)
    context = replace(CONTEXT, softcap=softcap, sinks=sinks)
    mask = BlasstSelector(threshold, block_q, block_k).select(q, k, context).to_mask()
    for head in range(q.shape[1]):
        wanted = walked(q, k, head, threshold, block_q, block_k, softcap, sink)
        assert kept(mask[0, head], (k_len - q_len) // block_q) == wanted


def test_strips_change_nothing(monkeypatch) -> None:
    q, k = calls(333, 333, batch=2)
    whole = BlasstSelector(0.1, 32, 32).select(q, k, CONTEXT).to_mask()
    monkeypatch.setitem(blasst._STRIP_ELEMENTS, "cpu", 2 * 4 * 32 * 333 * 2)
    assert torch.equal(BlasstSelector(0.1, 32, 32).select(q, k, CONTEXT).to_mask(), whole)


def test_skipping_as_attention_goes_lists_every_block_and_runs_at_equal_time_alone() -> None:
    q, k = calls(150, 211)
    blocks = SkippingSelector(0.1, 32, 16).select(q, k, CONTEXT)
    assert blocks.skip_threshold == 0.1 and (blocks.density() == 1).all()
    lists, kernel = Blasst(), Blasst(kernel=True)
    assert (lists.budgets, kernel.budgets) == (("density", "time"), ("time",))
    # Records from before there was a choice are found again.
    assert lists.settings() == {} and kernel.settings() == {"kernel": True}
    assert str(lists) != str(kernel)
    assert kernel.selectors().at(0.3)(0) == SkippingSelector(0.3, 64, 64)


def test_blasst_rejects_a_threshold_that_is_none() -> None:
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            BlasstSelector(threshold)
        with pytest.raises(ValueError, match="threshold"):
            SkippingSelector(threshold)
