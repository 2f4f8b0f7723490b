import itertools
import math
from dataclasses import replace

import pytest
import torch
from baseline_calls import CONTEXT, calls

from seerattn.methods.random import RandomSelector, hashed
from seerattn.selection import TokenBudget, TopK


def test_random_blocks_match_a_uniform_draw_without_replacement() -> None:
    q, k = calls(640, 640, heads=2)
    draws = 400
    counts = torch.zeros(10)
    for seed in range(draws):
        mask = RandomSelector(TokenBudget(tokens=4 * 64), seed).select(q, k, CONTEXT).to_mask()
        assert mask.sum(-1).amax() == 4
        counts += mask[0, :, 9].sum(0)
    # The first block and the diagonal are forced, two of the other eight are drawn.
    assert counts[0] == counts[9] == 2 * draws
    spread = math.sqrt(2 * draws * 0.25 * 0.75)
    assert (counts[1:9] - 2 * draws * 0.25).abs().max() < 4 * spread


def test_random_scores_are_uniform_and_independent_of_their_neighbours() -> None:
    heads, rows, columns = torch.arange(8)[:, None, None], torch.arange(64)[:, None], torch.arange(64)
    maps = torch.stack([hashed(key, heads, rows, columns) for key in ((0, 0), (0, 1), (1, 0))])
    n = maps.numel()
    histogram = torch.histc(maps, 64, 0, 1)
    chi_square = ((histogram - n / 64) ** 2 / (n / 64)).sum()
    assert abs(float(chi_square) - 63) < 5 * math.sqrt(2 * 63)
    centred = (maps - 0.5) * math.sqrt(12)
    for axis in range(4):
        product = centred.narrow(axis, 1, maps.shape[axis] - 1) * centred.narrow(axis, 0, maps.shape[axis] - 1)
        assert product.mean().abs() < 5 / math.sqrt(product.numel())


def test_random_blocks_depend_on_seed_layer_and_head_alone() -> None:
    q, k = calls(700, 700, batch=2)
    chosen = RandomSelector(TopK(density=0.4), 3).select(q, k, CONTEXT)
    mask = chosen.to_mask()
    again = RandomSelector(TopK(density=0.4), 3).select(q + 1, k * 2, CONTEXT).to_mask()
    assert torch.equal(mask, again) and torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert not torch.equal(mask, RandomSelector(TopK(density=0.4), 4).select(q, k, CONTEXT).to_mask())
    assert not torch.equal(mask, RandomSelector(TopK(density=0.4), 3).select(q, k, replace(CONTEXT, layer=0)).to_mask())


@pytest.mark.parametrize("cuts", [(0, 128, 192, 333), (0, 64, 333)])
def test_random_blocks_of_chunks_match_those_of_one_shot(cuts) -> None:
    selector = RandomSelector(TopK(density=0.5, length=333), 0, 32, 32)
    q, k = calls(333, 333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    for begin, end in itertools.pairwise(cuts):
        part = selector.select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        assert torch.equal(part, whole[:, :, begin // 32 : -(-end // 32), : part.shape[-1]])
