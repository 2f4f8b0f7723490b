"""Budgets from curves, against sums and choices that are written out."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattn.data.windows import Window
from seerattn.eval.tasks.map_recall import RecallMeter
from seerattn.gate_selector import GateSelector
from seerattn.methods.gate.budgets import BudgetCalibrator, budget_lengths, check_ladder, share_densities
from seerattn.methods.oracle import OracleSelector
from seerattn.ops.attention_map import attention_map
from seerattn.selection import AttentionContext, TopK
from seerattn.selection.map_form import MASS, MapForm

CONTEXT = AttentionContext(layer=0, scale=32**-0.5, softcap=None, unrotate=lambda x, start: x.float())
TOKENS, SQUARED = 500, MapForm("sum", 2)


def calls(layers: int = 2, windows: int = 2, tokens: int = TOKENS):
    """Heads of which each is sharper than the one before, over keys that are alike within 32 tokens."""
    g = torch.Generator().manual_seed(0)
    sharp = torch.tensor([0.1, 0.5, 1.0, 3.0])[:, None, None]
    for layer in range(layers):
        for _ in range(windows):
            q, k = (torch.randn(1, heads, -(-tokens // 32), 32, generator=g) for heads in (4, 2))
            q, k = (x.repeat_interleave(32, 2)[:, :, :tokens] for x in (q, k))
            q, k = (x + torch.randn(x.shape, generator=g) / 2 for x in (q * sharp, k))
            yield q, k, replace(CONTEXT, layer=2 * layer + 1)


def gained(scores: Tensor, gain: Tensor, k: int, sinks: int = 1) -> float:
    """1 less the mean square over rows of what the best ``k`` blocks of each miss; row by row, 32 x 32 blocks."""
    total = 0.0
    for i in range(len(scores)):
        forced = {i, *range(min(sinks, i + 1))}
        others = sorted((j for j in range(i + 1) if j not in forced), key=lambda j: (-float(scores[i, j]), j))
        kept = [*forced, *others][: max(k, len(forced))]
        total += 1 - (1 - sum(float(gain[i, j]) for j in kept)) ** 2
    return total / len(scores)


def test_lengths_double_up_to_the_context() -> None:
    assert budget_lengths(8192) == (2048, 4096, 8192)
    assert budget_lengths(5000) == (2048, 4096, 5000)
    assert budget_lengths(1000) == (1000,)


@pytest.mark.parametrize("sinks", [1, 2])
@pytest.mark.parametrize("gain", [None, MASS])
def test_curves_are_one_less_the_squared_miss_of_the_best_blocks_at_every_length_alone(gain, sinks) -> None:
    calibrator = BudgetCalibrator(
        SQUARED, lengths=(128, TOKENS), gain=gain, block_q=32, block_k=32, sink_blocks=sinks
    )  # fmt: skip
    for call in calls():
        calibrator.see(*call)
    for length in (128, TOKENS):
        found, cost = calibrator.curves(length)
        n, expected = -(-length // 32), {1: 0.0, 3: 0.0}
        least = sinks + 1
        assert len(cost) == n - least + 1
        for q, k, context in calls():
            q, k = q[:, :, :length], k[:, :, :length]  # a prefix is a call of its own
            maps = [
                attention_map(q, k, form=form, block_q=32, block_k=32, scale=CONTEXT.scale).map[0]
                for form in (SQUARED, gain or SQUARED)
            ]
            values = [[gained(*heads, number, sinks) for number in range(least, n + 1)] for heads in zip(*maps)]
            expected[context.layer] += torch.tensor(values, dtype=torch.float64) / 2
        assert list(found) == [1, 3]
        for layer in found:
            assert torch.allclose(found[layer], expected[layer], atol=1e-5)
        area = n * (n + 1) / 2
        written = [sum(min(i + 1, number) for i in range(n)) / area for number in range(least, n + 1)]
        assert cost.tolist() == pytest.approx(written)


def test_no_other_numbers_of_blocks_hold_more_at_the_same_mean() -> None:
    """Every combination of three heads at six costs, curves with dents in them."""
    g = torch.Generator().manual_seed(1)
    cost = torch.tensor([0.1, 0.25, 0.4, 0.55, 0.8, 1.0], dtype=torch.float64)
    for _ in range(20):
        gain = torch.rand(3, 6, generator=g).double().cumsum(-1)
        combinations = [
            (float(cost[list(c)].mean()), float(gain[range(3), list(c)].sum()))
            for c in itertools.product(range(6), repeat=3)
        ]
        for density in (0.15, 0.3, 0.5, 0.7, 0.95):
            found = share_densities(gain, cost, density)
            assert float(found.mean()) == pytest.approx(density, abs=1e-12)
            # What mixtures of two combinations with this mean can hold at most: the hull of all of them.
            best = max(
                a[1] + (b[1] - a[1]) * (density - a[0]) / (b[0] - a[0])
                for a in combinations
                for b in combinations
                if a[0] <= density <= b[0] and a[0] < b[0]
            )
            # A head between two of its costs holds what lies between.
            reached = 0.0
            for head, value in enumerate(found.tolist()):
                hull = _hull(cost.tolist(), gain[head].tolist())
                reached += max(
                    y0 + (y1 - y0) * (value - x0) / (x1 - x0)
                    for (x0, y0), (x1, y1) in itertools.pairwise(hull)
                    if x0 - 1e-9 <= value <= x1 + 1e-9
                )
            assert reached == pytest.approx(best, abs=1e-9)


def _hull(x: list[float], y: list[float]) -> list[tuple[float, float]]:
    """Upper hull of points of ascending x, by leaving out whatever lies below a line between two others."""
    points = list(zip(x, y))
    below = {
        p
        for p in points
        for a, b in itertools.combinations(points, 2)
        if a[0] < p[0] < b[0] and p[1] < a[1] + (b[1] - a[1]) * (p[0] - a[0]) / (b[0] - a[0])
    }
    return [p for p in points if p not in below]


def test_a_mean_below_the_forced_blocks_and_curves_that_end_early_are_served() -> None:
    cost = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    full = torch.ones(2, 3, dtype=torch.float64)
    assert share_densities(full, cost, 0.1).tolist() == [0.2, 0.2]
    # Nothing is gained beyond the forced blocks: what is to be spent is spent alike.
    assert share_densities(full, cost, 0.6).tolist() == pytest.approx([0.6, 0.6])
    only = torch.ones(2, 1, dtype=torch.float64)
    assert share_densities(only, cost[2:], 0.5).tolist() == [1, 1]


def test_budgets_hold_more_of_the_map_than_equal_heads_at_the_same_realised_density() -> None:
    calibrator = BudgetCalibrator(SQUARED, lengths=(256, TOKENS), block_q=32, block_k=32)
    for call in calls():
        calibrator.see(*call)
    # Of 16 rows with 5 and with 7 blocks each: what equal heads can realise.
    ladder = (70 / 136, 91 / 136)
    budgets = calibrator.budgets(ladder, text="words")
    assert (budgets.target, budgets.gain, budgets.text, budgets.windows) == ("sum:2", "sum:2", "words", 2)
    assert budgets.heads == (0, 4, 0, 4) and budgets.lengths == (256, TOKENS)
    for density in ladder:
        policies = {heads: TopK(density=density, heads=heads) for heads in ("calibrated", "equal")}
        selectors = {
            name: lambda layer, policy=policy: OracleSelector(policy, 32, 32, target=SQUARED, budgets=budgets)
            for name, policy in policies.items()
        }
        meter = RecallMeter(selectors, block_q=32, block_k=32, target=SQUARED)
        for call in calls():
            meter.see(*call)
        realised, recall = (
            {name: meter.table(name, quantity)[1] for name in selectors} for quantity in ("density", "target_recall")
        )
        # One of 8 heads lies between two numbers of blocks, at most 1 / 8 of the area apart.
        assert abs(float(realised["calibrated"].mean()) - density) < 0.02
        assert float(recall["calibrated"].mean()) > float(recall["equal"].mean()) + 0.005
        # Each head realises its own density.
        asked = torch.tensor(budgets.at(density, TOKENS)[1])
        assert torch.allclose(realised["calibrated"][0, 0].float(), asked, atol=0.06)


def test_gates_choose_by_their_scores_and_share_what_a_group_sees(model, gate_folders, documents) -> None:
    """One number of blocks in every row holds on a window what the curve says."""
    windows = [Window(i, ids[:400]) for i, ids in enumerate(documents[:2])]
    for folder in gate_folders:
        gates = model.gates(folder).gates
        calibrator = BudgetCalibrator(gates, lengths=(256, 400))
        model.observe(windows, calibrator.see)
        curves, cost = calibrator.curves(400)
        for i in range(0, len(cost), 2):
            policy = TopK(density=float(cost[i]))
            missed: dict[int, list[Tensor]] = {}

            def see(q: Tensor, k: Tensor, context: AttentionContext, policy=policy, gates=gates, missed=missed) -> None:
                kept = GateSelector(gates[context.layer], policy).select(q, k, context).to_mask()
                target = next(iter(gates.values())).config.target
                true = attention_map(q, k, form=target, **context.logits).map
                true = true.unflatten(1, (kept.shape[1], -1)).mean(2)
                missed.setdefault(context.layer, []).append((true * ~kept).sum(-1).double())

            model.observe(windows, see)
            for layer, rows in missed.items():
                expected = 1 - torch.cat(rows).square().mean((0, 2))
                assert torch.allclose(curves[layer][:, i], expected, atol=1e-5)


def test_lengths_that_cannot_be_cut_or_were_not_seen_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths"):
        BudgetCalibrator(SQUARED, lengths=(256, 128))
    for lengths in ((100, TOKENS), (128, 1024)):
        calibrator = BudgetCalibrator(SQUARED, lengths=lengths, block_q=32, block_k=32)
        with pytest.raises(ValueError, match="lengths"):
            for call in calls():
                calibrator.see(*call)
            calibrator.budgets()


@pytest.mark.parametrize("ladder", [(), (0.5, 0.5), (0.7, 0.5), (0.0, 0.5), (0.5, 1.0)])
def test_a_ladder_that_is_none_is_refused(ladder) -> None:
    with pytest.raises(ValueError, match="ladder"):
        check_ladder(ladder)
