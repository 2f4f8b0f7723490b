"""MoA against its definition written out: masking one attention value after the other, rules by loops, brute force."""

import dataclasses
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baseline_calls import CONTEXT, calls, kept, rows_of
from tiny_models import tiny_model, tokens
from torch import Tensor

import seerattn
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.moa import MoA
from seerattn.methods.moa import profile as moa_profile
from seerattn.methods.moa.profile import (
    Profile,
    SpanRule,
    area_density,
    block_influence,
    influence_by_distance,
    row_density,
    rule_space,
    short_rules,
)
from seerattn.methods.moa.spans import (
    Limit,
    MoaSelector,
    bound_limits,
    bounded_plans,
    bounded_selectors,
    pareto_choices,
    planned,
    programmes,
    solve,
    value,
)

LENGTHS = (512, 1024, 2048)


# Influence


def attention_inputs(tokens: int, heads: int, kv_heads: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, tokens, dim), (kv_heads, tokens, dim), (kv_heads, tokens, dim))
    q, k, v = (torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q * 2, k, v


def explicit_attention(q: Tensor, k: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Logits ``[H, T, T + 1]`` of one row, the sink last (-inf without)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q @ k.transpose(-1, -2) * scale)[0]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    sinks = torch.full((q.shape[1],), -torch.inf, dtype=logits.dtype) if sinks is None else sinks
    return torch.cat((logits, sinks[:, None, None].expand(*logits.shape[:2], 1)), -1)


def loss_of(attention: Tensor, v: Tensor) -> Tensor:
    """A loss that is not linear in the output of the attention ``[H, T, T + 1]``."""
    v = v.repeat_interleave(attention.shape[0] // v.shape[1], 1)[0]
    head = torch.randn(v.shape[-1], 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.arange(attention.shape[0] * attention.shape[1]) % 11
    return F.cross_entropy((attention[..., :-1] @ v @ head).flatten(0, 1), labels)


def masked(logits: Tensor, i: int, j: int) -> Tensor:
    """The attention of row ``i`` ``[H, T + 1]`` without key ``j``; nothing where no key is left."""
    without = logits[:, i].clone()
    without[:, j] = -torch.inf
    return without.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(133, 4, 2), (64, 2, 2), (65, 3, 1)])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_influence_matches_masking_every_attention_value(length: int, heads: int, kv_heads: int, extra: str) -> None:
    q, k, v = attention_inputs(length, heads, kv_heads)
    softcap = 2.0 if extra == "softcap" else None
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64) if extra == "sinks" else None
    logits = explicit_attention(q, k, 0.25, softcap, sinks)
    attention = logits.softmax(-1).requires_grad_()
    [slope] = torch.autograd.grad(loss_of(attention, v), attention)
    blocks = -(-length // 64)
    expected = torch.zeros(heads, blocks, blocks, dtype=torch.float64)
    allowed = torch.zeros_like(expected)
    changes = torch.zeros(heads, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            changes[:, i, j] = ((masked(logits, i, j) - attention[:, i].detach()) * slope[:, i]).sum(-1)
            expected[:, i // 64, j // 64] += changes[:, i, j].abs()
            if i > 0:
                # 1e-6 is added to 1 - A.
                left = 1 - attention[:, i, j].detach()
                allowed[:, i // 64, j // 64] += changes[:, i, j].abs() * 1.01e-6 / left

    values = v.repeat_interleave(heads // kv_heads, 1)
    output = (attention[..., :-1] @ values[0]).detach().requires_grad_()
    head = torch.randn(v.shape[-1], 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.arange(heads * length) % 11
    [grad] = torch.autograd.grad(F.cross_entropy((output @ head).flatten(0, 1), labels), output)
    found = block_influence(q, k, v, grad[None], scale=0.25, softcap=softcap, sinks=sinks)
    assert found.dtype == torch.float64
    assert ((found[0] - expected).abs() <= allowed + 1e-12).all() and allowed.max() < 1e-3 * expected.max()

    # Masking by a little: the slope of the loss on the way to the masked row.
    for i, j in ((length - 1, 3), (40, 40), (0, 0)):
        for head_index in range(heads):
            step = torch.zeros_like(attention)
            step[head_index, i] = masked(logits, i, j)[head_index] - attention[head_index, i].detach()
            with torch.no_grad():
                slope_there = (loss_of(attention + 1e-6 * step, v) - loss_of(attention - 1e-6 * step, v)) / 2e-6
            assert float(slope_there) == pytest.approx(float(changes[head_index, i, j]), rel=1e-4, abs=1e-9)


def test_influence_in_strips_matches_the_whole_and_fp32_stays_within_its_rounding(monkeypatch) -> None:
    q, k, v = attention_inputs(333, 4, 2)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = block_influence(q, k, v, grad, scale=0.25)
    single = block_influence(q.float(), k.float(), v.float(), grad.float(), scale=0.25)
    assert single.dtype == torch.float32
    # 1e3 roundings of fp32: a value is a difference of numbers about a thousand times as large, where 1 - A is small.
    assert (single - whole).abs().max() <= 1e3 * 2.0**-24 * whole.max()
    monkeypatch.setitem(moa_profile._STRIP_ELEMENTS, "cpu", 1)
    torch.testing.assert_close(block_influence(q, k, v, grad, scale=0.25), whole, rtol=1e-12, atol=0)
    rows = (
        torch.cat((q, q.flip(1))),
        torch.cat((k, k.flip(1))),
        torch.cat((v, v.flip(1))),
        torch.cat((grad, grad.flip(1))),
    )
    torch.testing.assert_close(block_influence(*rows, scale=0.25)[1], whole[0].flip(0), rtol=1e-12, atol=0)


def test_influence_by_distance_leaves_out_the_sink_block() -> None:
    influence = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(1, i + 1):
            expected[..., i - j] += influence[..., i, j]
    torch.testing.assert_close(influence_by_distance(influence), expected, rtol=1e-12, atol=0)


# Rules


def test_rule_space_is_the_published_one_at_2k_4k_8k() -> None:
    expected = []
    for alpha in range(-2048, 8192 + 1, 1024):
        for eighths in range(9):
            spans = [alpha + eighths * n // 8 for n in (2048, 8192, 16384)]
            if spans[0] > 0 and spans[1] <= 8192 and spans[2] <= 16384:
                expected.append((alpha, eighths / 8))
    space = rule_space((2048, 4096, 8192))
    assert [(rule.alpha, rule.beta) for rule in space] == expected and len(expected) == 48
    scaled = rule_space((512, 1024, 2048))
    assert [(4 * rule.alpha, rule.beta) for rule in scaled] == expected
    assert min(area_density(rule.band(8192), 8192) for rule in space) == pytest.approx(0.2471, abs=1e-4)
    assert min(rule.band(8192) for rule in short_rules((2048, 4096, 8192))) == 1


@pytest.mark.parametrize("length", [64, 333, 1000, 2048])
@pytest.mark.parametrize("rule", [SpanRule(128, 0.0), SpanRule(-256, 0.5), SpanRule(-256, 1 / 8), SpanRule(0, 1.0)])
def test_spans_and_densities_match_loops_over_blocks(rule: SpanRule, length: int) -> None:
    band = max(1, math.trunc((rule.alpha + rule.beta * length) / 64 + 1e-12))
    assert rule.band(length) == band
    blocks = math.ceil(length / 64)
    rows = [{j for j in range(i + 1) if j == 0 or i - j < band} for i in range(blocks)]
    assert row_density(band, length) == max(map(len, rows)) / blocks
    causal = blocks * (blocks + 1) / 2
    assert area_density(band, length) == pytest.approx(sum(map(len, rows)) / causal)
    q, k = calls(length, length, kv_heads=1)
    selected = MoaSelector((rule,)).select(q, k, CONTEXT)
    assert float(selected.density()) == pytest.approx(area_density(band, length))


# Selector


@pytest.mark.parametrize(("q_len", "k_len"), [(333, 333), (70, 333), (7, 7), (256, 512), (2, 130)])
def test_selector_keeps_the_sink_block_and_each_groups_band(q_len: int, k_len: int) -> None:
    rules = (SpanRule(64, 0.0), SpanRule(-64, 0.75))
    q, k = calls(q_len, k_len, batch=2)
    blocks = MoaSelector(rules).select(q, k, CONTEXT)
    assert blocks.num_heads == 2 and int(blocks.q_start[0]) == k_len - q_len
    for b, head in itertools.product(range(2), range(2)):
        span = rules[head].alpha + rules[head].beta * k_len
        expected = {
            row: {j for j in range(positions[-1] // 64 + 1) if j == 0 or (row - j) < max(1, int(span / 64))}
            for row, positions in rows_of(q_len, k_len, 64).items()
        }
        assert kept(blocks.to_mask()[b, head], (k_len - q_len) // 64) == expected


def test_selector_chooses_the_same_in_chunks_where_the_length_is_known() -> None:
    q, k = calls(333, 333)
    selector = MoaSelector((SpanRule(64, 0.0), SpanRule(0, 0.5)), length=333)
    whole = selector.select(q, k, CONTEXT).to_mask()
    assert torch.equal(whole, replace(selector, length=None).select(q, k, CONTEXT).to_mask())
    for begin, end in ((0, 128), (128, 192), (192, 333)):
        part = selector.select(q[:, :, begin:end], k[:, :, :end], CONTEXT).to_mask()
        assert torch.equal(part, whole[:, :, begin // 64 : -(-end // 64), : part.shape[-1]])


def test_selector_in_a_padded_batch_is_the_row_alone() -> None:
    model = tiny_model("llama", torch.float64)
    seerattn.attach(model, MoaSelector((SpanRule(64, 0.0), SpanRule(0, 0.4))), impl="reference")
    ids, mask = tokens(2, 333), torch.ones(2, 333, dtype=torch.long)
    mask[1, :95] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = model(ids[1:, 95:]).logits
    assert (padded[1:, 95:] - alone).abs().max() <= 1e-9
    dense = seerattn.detach(model)(ids[1:, 95:]).logits
    assert (alone - dense).abs().max() > 1e-3


def test_selector_rejects_another_number_of_heads() -> None:
    with pytest.raises(ValueError, match="rules"):
        MoaSelector((SpanRule(64, 0.0),)).select(*calls(70, 70), CONTEXT)


# Programme


def brute_force(cost: np.ndarray, limits: list[Limit], layers: np.ndarray) -> list[tuple[int, ...]]:
    """All choices that keep the limits and have two rules a layer."""
    units, rules = cost.shape
    return [
        choice
        for choice in itertools.product(range(rules), repeat=units)
        if all(len({r for r, at in zip(choice, layers) if at == layer}) <= 2 for layer in set(layers.tolist()))
        and all(limit.low <= sum(limit.values[u, r] for u, r in enumerate(choice)) <= limit.high for limit in limits)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_solve_matches_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = np.array([0, 0, 0, 1, 1])
    cost, weights = rng.exponential(size=(5, 4)) * 1e-7, rng.uniform(size=(5, 4))
    limits = [Limit(weights, 1.5, 2.2)]
    allowed = brute_force(cost, limits, layers)
    best = min(allowed, key=lambda choice: sum(cost[u, r] for u, r in enumerate(choice)))
    everything = [Limit(weights, -np.inf, np.inf)]
    assert len(allowed) < len(brute_force(cost, everything, layers)) < 4**5
    assert tuple(solve(cost, limits, layers)) == best
    free = [int(r) for r in cost.argmin(1)]
    if len(set(free[:3])) == 3:
        assert solve(cost, [], layers).tolist() != free
    assert solve(cost, [Limit(weights, 6.0, np.inf)], layers) is None


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_pareto_choices_are_on_the_front_of_brute_force_and_hold_its_ends(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    layers = np.array([0, 0, 1, 1, 1])
    costs = [rng.integers(0, 4, (5, 4)) / 4 if ties else rng.exponential(size=(5, 4)) for _ in range(3)]
    limits = [Limit(rng.uniform(size=(5, 4)), 1.5, 2.5)]
    steps: list[int] = []
    choices = pareto_choices(costs, limits, layers, steps.append)
    assert sum(steps) == programmes(3) == 28
    allowed = brute_force(costs[0], limits, layers)
    values = np.array([[sum(cost[u, r] for u, r in enumerate(choice)) for cost in costs] for choice in allowed])
    front = {
        choice
        for choice, row in zip(allowed, values)
        if not ((values <= row).all(1) & (values < row).any(1)).any()
    }  # fmt: skip
    found = {tuple(choice.tolist()) for choice in choices}
    assert found <= front and len(found) > 1
    assert [min(value(cost, choice) for choice in choices) for cost in costs] == pytest.approx(values.min(0))


# Plans


def made_plan(layers: int = 3, heads: int = 4, kv_heads: int = 2, lengths: tuple[int, ...] = LENGTHS) -> HeadRules:
    """Influence that falls off at a pace of each head's own, with one layer that has no full attention."""
    rng = np.random.default_rng(0)
    rules: list[list[dict]] = []
    for layer in range(layers):
        row = []
        for _ in range(heads if layer != 1 else 0):
            pace, size, floor = rng.uniform(0.5, 20), rng.exponential(), rng.uniform(0, 0.02)
            influence = [
                [float(size * (math.exp(-d / pace) + floor) * rng.uniform(0.5, 1.5)) for d in range(n // 64)]
                for n in lengths
            ]
            row.append({"alpha": 64.0, "beta": 0.5, "influence": influence})
        rules.append(row)
    model = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": 32}
    return HeadRules("moa", model, rules, {"lengths": list(lengths)})


def test_losses_are_the_influence_that_a_rule_masks_out_of_the_groups_worst_head() -> None:
    plan = made_plan()
    profile, rules = Profile.of(plan), rule_space(LENGTHS)
    assert profile.layers == (0, 2) and profile.unit_layers.tolist() == [0, 0, 1, 1]
    for i, length in enumerate(LENGTHS):
        found = profile.losses(rules)[i]
        expected = np.zeros((4, len(rules)))
        for unit, (layer, group) in enumerate(itertools.product((0, 2), (0, 1))):
            for r, rule in enumerate(rules):
                lost = [
                    sum(v for d, v in enumerate(plan.rules[layer][head]["influence"][i]) if d >= rule.band(length))
                    for head in (2 * group, 2 * group + 1)
                ]
                expected[unit, r] = max(lost)
        np.testing.assert_allclose(found, expected / expected.max(1).sum(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("density", [0.4, 0.5, 0.8])
def test_plans_keep_the_bound_at_all_lengths_and_two_rules_a_layer(density: float) -> None:
    plans = bounded_plans(Profile.of(made_plan()), density)
    assert len(plans) > 1
    for spans in plans:
        assert set(spans) == {0, 2} and all(len(set(rules)) <= 2 for rules in spans.values())
        for length in (*LENGTHS, 4096):
            bands = [rule.band(length) for rules in spans.values() for rule in rules]
            found = sum(row_density(band, length) for band in bands) / len(bands)
            assert 0.9 * density - 1e-6 <= found <= density + 1e-6
    assert bounded_plans(Profile.of(made_plan()), density) == plans


@pytest.mark.parametrize("density", [0.02, 0.0, 1.5])
def test_plans_reject_a_bound_that_no_rule_meets(density: float) -> None:
    with pytest.raises(ValueError, match="density must be"):
        bound_limits(LENGTHS, np.array([0, 0]), density)


@pytest.mark.parametrize("length", [None, 1024])
def test_density_rises_with_the_setting_and_stays_under_it(length: int | None) -> None:
    plan = made_plan()
    found_at = bounded_selectors(plan, length=length)
    q, k = calls(*(2 * [length or 2048]))

    def realised(bound: float) -> float:
        at = found_at.at(bound)
        assert at(1) is None and at(7) is None
        return float(torch.cat([at(layer).select(q, k, CONTEXT).density() for layer in (0, 2)]).mean())

    least = found_at.sparsest
    settings = [least, *(x for x in np.linspace(0.05, 0.95, 19).tolist() if x > least), found_at.densest]
    found = [realised(setting) for setting in settings]
    assert found == sorted(found) and len(set(found)) > 10
    assert all(density <= setting + 1e-6 for density, setting in zip(found, settings))
    assert max(setting - density for density, setting in zip(found, settings)) < 0.05
    assert found[0] == pytest.approx(area_density(1, length or 2048)) and found[-1] == 1.0
    again = bounded_selectors(plan, length=length)
    assert again.at(0.4)(0) == found_at.at(0.4)(0) and again.settings == found_at.settings
    # What exceeds the forced blocks is alike at all lengths.
    rules = [rule for layer in (0, 2) for rule in found_at.at(0.6)(layer).rules]

    def excess(n: int) -> float:
        forced = area_density(1, n)
        return (sum(area_density(rule.band(n), n) for rule in rules) / len(rules) - forced) / (1 - forced)

    reference = excess(length or 2048)
    assert all(0.9 * reference - 0.0201 <= excess(n) <= reference / 0.9 + 0.0201 for n in (*LENGTHS, 4096))


def test_density_is_spent_where_the_influence_is() -> None:
    plan = made_plan(layers=1)
    for head, size in ((0, 100.0), (1, 100.0), (2, 1e-3), (3, 1e-3)):
        plan.rules[0][head]["influence"] = [[size] * (n // 64) for n in LENGTHS]
    wide, narrow = bounded_selectors(plan).at(0.5)(0).rules
    assert wide.band(2048) > 10 * narrow.band(2048)


def test_selectors_reject_a_bound_below_the_forced_blocks_and_a_length_without_a_choice() -> None:
    selectors = bounded_selectors(made_plan())
    with pytest.raises(ValueError, match="density"):
        selectors.at(0.9 * selectors.sparsest)
    with pytest.raises(ValueError, match="length"):
        bounded_selectors(made_plan(), length=64)


def test_planned_selectors_have_the_rules_of_the_plan() -> None:
    plan = made_plan()
    plan.rules[2][2]["alpha"] = plan.rules[2][3]["alpha"] = 128.0
    at = planned(plan)
    assert at(1) is None
    assert at(2) == MoaSelector((SpanRule(64.0, 0.5), SpanRule(128.0, 0.5)))
    del plan.rules[0][0]["beta"]
    with pytest.raises(ValueError, match="alpha and beta"):
        planned(plan)


def test_profile_rejects_plans_without_one() -> None:
    plan = made_plan()
    with pytest.raises(ValueError, match="minference"):
        bounded_selectors(dataclasses.replace(plan, method="minference"))
    for damage in ({"lengths": [512, 1024]}, {"lengths": []}, {}, {"lengths": [1024, 512, 2048]}):
        if damage != {"lengths": [512, 1024]}:
            with pytest.raises(ValueError, match="whole profile"):
                bounded_selectors(dataclasses.replace(plan, made=damage))
    plan.rules[0][0]["influence"][1].pop()
    with pytest.raises(ValueError, match="whole profile"):
        bounded_selectors(plan)


def test_a_loaded_plan_gives_the_same_selectors_and_another_model_is_refused(tmp_path) -> None:
    plan = made_plan()
    plan.save(tmp_path / "plan.json")
    method, short = (MoA(plan=tmp_path / "plan.json", **length) for length in ({}, {"length": 1024}))
    assert method.selectors().at(0.3)(2) == bounded_selectors(plan).at(0.3)(2)
    assert short.selectors().at(0.3)(2) == bounded_selectors(plan, length=1024).at(0.3)(2)
    assert method.selectors().settings == {"plan": plan.digest, "length": 2048}
    method.check_model(tiny_model("llama", num_hidden_layers=3).config)
    with pytest.raises(ValueError, match="kv_heads"):
        method.check_model(tiny_model("llama", num_hidden_layers=3, num_key_value_heads=1).config)
