import math
from dataclasses import replace

import pytest
import torch
from baseline_calls import CONTEXT, calls, kept, products, softmax

from seerattn.methods.flexprefill import FlexPrefillSelector, root_js_divergence

# A sum of fp64 probabilities may exceed 1.
ROUNDING = 1e-12


def mixed_calls(q_len: int, k_len: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts; keys of the first KV head are nearly constant in a block, so that pooling predicts their attention,
    and some keys of the second attract most queries, so that it does not."""
    q, k = calls(q_len, k_len, batch=2)
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(2, -(-k_len // block), 32, generator=generator)
    k[:, 0] = centres.repeat_interleave(block, 1)[:, :k_len] + 0.05 * k[:, 0]
    q[:, :2] = q[:, :2, -1:] + 0.1 * q[:, :2]
    k[:, 1, 20::57, 0] = 8.0
    q[:, 2:, :, 0] = 6.0
    return q, k


def tokens_within(shares: list[float], gamma: float) -> int:
    """One more than the largest shares whose sum is at most gamma."""
    total, count = 0.0, 0
    for share in sorted(shares, reverse=True):
        total += share
        if total > gamma + ROUNDING:
            break
        count += 1
    return count + 1


def block_sums(shares: list[float], block: int) -> list[float]:
    return [math.fsum(shares[begin : begin + block]) for begin in range(0, len(shares), block)]


def mean(vectors: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(vectors) for column in zip(*vectors)]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b))


def slow_choice(q, k, batch: int, head: int, *, gamma, tau, min_budget, block, softcap=None):
    """FlexPrefill by loops: the blocks of each query block of a whole prompt or chunk, and whether it is aware."""
    q_len, k_len = q.shape[2], k.shape[2]
    start, columns = k_len - q_len, -(-k_len // block)
    rows = sorted({position // block for position in range(start, k_len)})
    if q_len <= max(2 * block, math.ceil(min_budget / block) * block):
        return {row: set(range(row + 1)) for row in rows}, None
    qk = products(q, k, batch, head)
    vertical, slash = [0.0] * k_len, [0.0] * k_len
    for i in range(k_len - block, k_len):
        logits = [x * CONTEXT.scale for x in qk[i - start][: i + 1]]
        if softcap:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        for j, p in enumerate(softmax(logits)):
            vertical[j] += p / block
            # The diagonal of this pair meets the last query at this key.
            slash[k_len - 1 - (i - j)] += p / block
    least = math.ceil(min_budget / block)
    count_v = min(max(tokens_within(vertical, gamma) // block + 1, least), columns)
    count_s = min(max(tokens_within(slash, gamma) // block + 1, least), columns)
    vertical_blocks, slash_blocks = block_sums(vertical, block), block_sums(slash, block)

    queries, keys = q[batch, head].double().tolist(), k[batch, head // (q.shape[1] // k.shape[1])].double().tolist()
    mean_k = [mean(keys[c * block : (c + 1) * block]) for c in range(columns)]
    last = mean(queries[-block:])
    predicted = softmax([dot(last, key) * CONTEXT.scale for key in mean_k])
    middle = [(a + b) / 2 for a, b in zip(predicted, vertical_blocks)]
    divergence = sum(
        0.5 * math.fsum(x * math.log(x / m) for x, m in zip(p, middle) if x > 0) for p in (predicted, vertical_blocks)
    )
    aware = math.sqrt(divergence) < tau
    if aware:
        count_v = count_s = least

    def largest(values: list[float], forced: int, count: int) -> list[int]:
        return sorted(range(columns), key=lambda c: (c != forced, -values[c]))[:count]

    keep_v = largest(vertical_blocks, 0, count_v)
    keep_s = [columns - 1 - c for c in largest(slash_blocks, columns - 1, count_s)]
    chosen = {row: {v for v in keep_v if v <= row} | {row - s for s in keep_s if s <= row} for row in rows}
    if aware:
        entries = []
        for row in rows:
            own = [i - start for i in range(max(row * block, start), min((row + 1) * block, k_len))]
            mean_q = mean([queries[i] for i in own])
            for c, p in enumerate(softmax([dot(mean_q, mean_k[c]) * CONTEXT.scale for c in range(row + 1)])):
                entries.append((p, row, c))
        total = 0.0
        for p, row, c in sorted(entries, key=lambda entry: -entry[0]):
            total += p
            if total > gamma * len(rows) + ROUNDING:
                break
            chosen[row].add(c)
    return chosen, aware


@pytest.mark.parametrize(("q_len", "k_len"), [(333, 333), (320, 320), (150, 333), (161, 200)])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("min_budget", [1, 70])
def test_flexprefill_matches_fp64_loops(q_len, k_len, gamma, min_budget) -> None:
    q, k = mixed_calls(q_len, k_len, 32)
    values = {"gamma": gamma, "tau": 0.2, "min_budget": min_budget, "block": 32}
    mask = FlexPrefillSelector(**values).select(q, k, CONTEXT).to_mask()
    kinds = set()
    for b, h in ((0, 0), (0, 3), (1, 1), (1, 2)):
        expected, aware = slow_choice(q, k, b, h, **values)
        kinds.add(aware)
        assert kept(mask[b, h], (k_len - q_len) // 32) == expected, (b, h, aware)
    assert kinds == {True, False}


def test_flexprefill_caps_the_attention_of_the_last_queries() -> None:
    q, k = mixed_calls(333, 333, 32)
    values = {"gamma": 0.8, "tau": 0.2, "min_budget": 1, "block": 32}
    mask = FlexPrefillSelector(**values).select(q, k, replace(CONTEXT, softcap=1.5)).to_mask()
    for h in range(4):
        expected, _ = slow_choice(q, k, 0, h, **values, softcap=1.5)
        assert kept(mask[0, h], 0) == expected
    assert not torch.equal(mask, FlexPrefillSelector(**values).select(q, k, CONTEXT).to_mask())


@pytest.mark.parametrize(
    ("min_budget", "tokens", "dense"), [(1, 64, True), (1, 65, False), (100, 128, True), (100, 129, False)]
)
def test_flexprefill_is_dense_up_to_two_blocks_or_its_minimum_in_whole_blocks(min_budget, tokens, dense) -> None:
    # Against earlier keys, as the forced blocks alone are all of so short a prompt.
    chosen = FlexPrefillSelector(0.0, 0.0, min_budget, 32).select(*calls(tokens, 800), CONTEXT)
    assert bool((chosen.density() == 1).all()) is dense


def test_flexprefill_with_gamma_one_keeps_blocks_that_rounding_loses() -> None:
    q, k = calls(333, 333)
    for tau in (0.0, 1.0):
        assert FlexPrefillSelector(1.0, tau, 1, 32).select(q * 40, k, CONTEXT).density().amin() == 1


def test_root_js_divergence_is_zero_for_equal_and_largest_for_disjoint() -> None:
    a = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    b = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.3, 0.7]])
    assert root_js_divergence(a, b).tolist() == pytest.approx([0, math.sqrt(math.log(2))], abs=1e-6)


@pytest.mark.parametrize("values", [{"gamma": 1.1}, {"gamma": -0.1}, {"tau": -1.0}, {"min_budget": 0}, {"block": 0}])
def test_flexprefill_rejects_values_out_of_range(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        FlexPrefillSelector(**values)
