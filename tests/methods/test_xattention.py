import math
from dataclasses import replace

import pytest
import torch
from baseline_calls import CONTEXT, calls, kept, products, profile, rows_of, softmax

from seerattn.methods.xattention import XAttention
from seerattn.methods.xattention import estimate as xattention
from seerattn.methods.xattention.estimate import XAttentionSelector, antidiagonal_scores, minimum_thresholds

CALLS = [(333, 333), (77, 333), (64, 320), (130, 200), (5, 5)]


def slow_scores(q, k, batch: int, head: int, stride: int, block: int) -> dict[int, list[float]]:
    """The score of every key block for every absolute query block, by loops over antidiagonals."""
    q_len, k_len = q.shape[2], k.shape[2]
    start, qk = k_len - q_len, products(q, k, batch, head)
    scores = {row: [0.0] * -(-k_len // block) for row in rows_of(q_len, k_len, block)}
    for group in range(start // stride, (k_len - 1) // stride + 1):
        logits = []
        for other in range(group + 1):
            total = 0.0
            for t in range(stride):
                i, j = group * stride + stride - 1 - t, other * stride + t
                if start <= i < k_len and j < k_len:
                    total += qk[i - start][j]
            logits.append(total * CONTEXT.scale / stride)
        for other, p in enumerate(softmax(logits)):
            scores[group * stride // block][other * stride // block] += p
    return scores


def slow_choice(scores: dict[int, list[float]], threshold: float) -> dict[int, set[int]]:
    chosen = {}
    for row, values in scores.items():
        keep = {0, row}
        mass, total = math.fsum(values[block] for block in keep), math.fsum(values)
        for block in sorted(range(1, row), key=lambda block: -values[block]):
            if mass >= threshold * total:
                break
            keep.add(block)
            mass += values[block]
        chosen[row] = keep
    return chosen


@pytest.mark.parametrize(("q_len", "k_len"), CALLS)
@pytest.mark.parametrize(("stride", "block"), [(8, 32), (16, 64), (32, 32), (1, 16)])
def test_antidiagonal_scores_match_fp64_loops(q_len, k_len, stride, block) -> None:
    q, k = calls(q_len, k_len, batch=2)
    scores = antidiagonal_scores(q, k, stride=stride, block=block, scale=CONTEXT.scale)
    for b, h in ((0, 0), (1, 3)):
        expected = torch.tensor(list(slow_scores(q, k, b, h, stride, block).values()), dtype=torch.float64)
        # A sum of at most block / stride probabilities, from products of up to 32 * 32 fp32 terms.
        assert torch.allclose(scores[b, h].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("q_len", "k_len"), CALLS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_xattention_blocks_match_fp64_loops(q_len, k_len, threshold) -> None:
    q, k = calls(q_len, k_len, batch=2)
    chosen = XAttentionSelector(threshold, 8, 32).select(q, k, CONTEXT).to_mask()
    for b, h in ((0, 0), (0, 2), (1, 3)):
        expected = slow_choice(slow_scores(q, k, b, h, 8, 32), threshold)
        assert kept(chosen[b, h], (k_len - q_len) // 32) == expected


def test_xattention_forced_blocks_count_before_others() -> None:
    q, k = calls(256, 256, heads=2)
    # Everything looks at the first block, which is kept anyway: nothing else is needed.
    k[:, :, :32], q[..., 0] = 0.0, 8.0
    k[:, :, :32, 0] = 8.0
    chosen = XAttentionSelector(0.9, 8, 32).select(q, k, CONTEXT)
    assert chosen.counts.amax() == 2


def test_xattention_with_threshold_one_keeps_blocks_that_rounding_loses() -> None:
    q, k = calls(333, 333)
    assert XAttentionSelector(1.0, 8, 32).select(q * 40, k, CONTEXT).density().amin() == 1


def test_xattention_does_not_depend_on_its_strips(monkeypatch) -> None:
    q, k = calls(333, 333, batch=2)
    whole = antidiagonal_scores(q, k, stride=8, block=32, scale=0.25)
    monkeypatch.setitem(xattention.STRIP_ELEMENTS, "cpu", 30_000)
    assert torch.allclose(antidiagonal_scores(q, k, stride=8, block=32, scale=0.25), whole, atol=1e-6)


def test_xattention_in_chunks_on_block_boundaries_matches_one_shot() -> None:
    selector = XAttentionSelector(0.8, 8, 32)
    q, k = calls(333, 333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    for begin, end in ((0, 96), (96, 256), (256, 333)):
        part = selector.select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        assert torch.equal(part, whole[:, :, begin // 32 : -(-end // 32), : part.shape[-1]])


def test_xattention_in_a_chunk_cut_elsewhere_differs_in_the_first_query_block_alone() -> None:
    selector = XAttentionSelector(0.8, 8, 32)
    q, k = calls(333, 333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    part = selector.select(q[:, :, 109:], k, CONTEXT).to_mask()
    assert torch.equal(part[:, :, 1:], whole[:, :, 4:])


def test_xattention_thresholds_are_by_layer_and_head() -> None:
    q, k = calls(333, 333)
    by_head = [0.1, 0.9, 0.5, 1.0]
    mask = XAttentionSelector([[0.3] * 4, by_head], 8, 32).select(q, k, CONTEXT).to_mask()
    for head, threshold in enumerate(by_head):
        alone = XAttentionSelector(threshold, 8, 32).select(q, k, CONTEXT).to_mask()
        assert torch.equal(mask[:, head], alone[:, head])


def test_xattention_plan_scales_thresholds_up_to_one(tmp_path) -> None:
    plan = profile([[0.8, 0.5]], stride=8, block=64)
    plan.save(tmp_path / "plan.json")
    method = XAttention(plan=tmp_path / "plan.json")
    selectors = method.selectors()
    assert selectors.densest == 2 and method.block_sizes == (64, 64) and str(method) == "xattention by head"
    for setting, expected in ((0.0, [0, 0]), (0.5, [0.4, 0.25]), (1.0, [0.8, 0.5]), (1.5, [0.9, 0.75]), (2.0, [1, 1])):
        assert selectors.at(setting)(0).threshold == [pytest.approx(expected)]
    assert selectors.settings == {"stride": 8, "plan": plan.digest}


def test_xattention_rejects_plans_of_others(tmp_path) -> None:
    plan, path = profile([[0.8, 0.5]], stride=8, block=64), tmp_path / "plan.json"
    damaged = {
        "moa": replace(plan, method="moa"),
        "threshold": replace(plan, rules=[[{"pattern": "a_shape"}] * 2]),
        "stride": replace(plan, made={"block": 64}),
        "block": replace(plan, made={"stride": 8, "block": 0}),
    }
    for named, rules in damaged.items():
        rules.save(path)
        with pytest.raises(ValueError, match=named):
            XAttention(plan=path).selectors()


def slow_threshold(q, k, batch: int, head: int, stride: int, block: int, coverage: float) -> float:
    k_len = k.shape[2]
    scores, qk = slow_scores(q, k, batch, head, stride, block), products(q, k, batch, head)
    above = total = 0.0
    for row, positions in rows_of(q.shape[2], k_len, block).items():
        mass = [0.0] * (row + 1)
        for i in positions:
            for j, p in enumerate(softmax([CONTEXT.scale * x for x in qk[i][: i + 1]])):
                mass[j // block] += p
        covering, covered = [], 0.0
        for index in sorted(range(row + 1), key=lambda index: -mass[index]):
            covering.append(index)
            covered += mass[index]
            if covered >= coverage * math.fsum(mass):
                break
        lowest = min(scores[row][index] for index in covering)
        above += math.fsum(x for x in scores[row] if x >= lowest)
        total += math.fsum(scores[row])
    return above / total


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_minimum_thresholds_match_fp64_loops(coverage) -> None:
    q, k = calls(200, 200, batch=2, heads=2, kv_heads=1)
    found = minimum_thresholds(q, k, scale=CONTEXT.scale, stride=8, block=32, coverage=coverage)
    expected = [max(slow_threshold(q, k, b, h, 8, 32, coverage) for b in range(2)) for h in range(2)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_xattention_rejects_bad_values() -> None:
    with pytest.raises(ValueError, match="stride"):
        XAttentionSelector(0.9, 24, 64)
    with pytest.raises(ValueError, match="threshold"):
        XAttentionSelector([[0.5], [1.5]])
    with pytest.raises(ValueError, match="threshold"):
        XAttentionSelector([[0.5] * 3]).select(*calls(130, 130), replace(CONTEXT, layer=0))
    with pytest.raises(ValueError, match="coverage"):
        minimum_thresholds(*calls(130, 130), scale=0.25, coverage=0)
