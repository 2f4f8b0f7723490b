import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from baseline_calls import CONTEXT, calls, kept, products, rows_of, softmax
from tiny_models import tiny_model, tokens

from seerattn import attach, detach
from seerattn.methods.a_shape import ShapeSelector
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.lines import keep_best, last_query_scores, lines_to_blocks, token_density
from seerattn.methods.mean_pooled import MeanPooledSelector
from seerattn.methods.method import Method
from seerattn.methods.minference import MInference
from seerattn.methods.minference.patterns import Estimate, HeadRule, PatternSelector
from seerattn.methods.vertical_slash import VerticalSlash
from seerattn.selection import TokenBudget

VERTICAL_SLASH = HeadRule("vertical_slash", 40, 140)
RULES = (
    VERTICAL_SLASH,
    HeadRule("a_shape", 20, 70),
    HeadRule("block_sparse", tokens=100),
    HeadRule("vertical_slash", 5, 10, scale=0.5),
)
SHAPES = [(333, 333, 64, 64), (333, 333, 32, 64), (70, 333, 64, 32), (150, 200, 32, 16), (20, 90, 16, 128)]
SINKS = torch.tensor([0.5, 9.0, -1.0, 4.0])


def slow_scores(q, k, batch: int, head: int, *, softcap=None, sink=None, last=64) -> tuple[list[float], list[float]]:
    """Sums of the last queries' attention by key and by offset."""
    q_len, k_len = q.shape[2], k.shape[2]
    qk = products(q, k, batch, head)
    vertical, slash = [0.0] * k_len, [0.0] * k_len
    for i in range(max(k_len - last, k_len - q_len), k_len):
        logits = [x * CONTEXT.scale for x in qk[i - (k_len - q_len)][: i + 1]]
        if softcap is not None:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        for j, p in enumerate(softmax(logits + ([] if sink is None else [sink]))[: i + 1]):
            vertical[j] += p
            slash[i - j] += p
    return vertical, slash


def slow_lines(rule: HeadRule, factor: float, vertical, slash) -> tuple[set[int], set[int]]:
    """Columns and offsets of a head."""
    factor *= rule.scale
    if rule.pattern == "a_shape":
        return set(range(math.ceil(rule.columns * factor))), set(range(math.ceil(rule.offsets * factor)))
    chosen = []
    for scores, size, least, forced in ((vertical, rule.columns, 30, 30), (slash, rule.offsets, 50, 100)):
        size = max(size, least)
        forced = min(forced, size)
        if factor > 1:
            total = math.floor(size * factor)
        else:
            free = math.floor((size - forced) * factor)
            forced = math.ceil(forced * factor)
            total = forced + free
        order = sorted(range(len(scores)), key=lambda place: (place >= forced, -scores[place], place))
        chosen.append(set(order[:total]) | set(range(min(forced, len(scores)))))
    return chosen[0], chosen[1]


def slow_blocks(rule: HeadRule, factor: float, q, k, batch: int, head: int, block_q: int, block_k: int):
    """The key blocks of each absolute query block."""
    q_len, k_len = q.shape[2], k.shape[2]
    start, expected = k_len - q_len, {}
    if rule.pattern == "block_sparse":
        count = math.ceil(rule.tokens * rule.scale * factor / block_k)
        keys = k[batch, head // (q.shape[1] // k.shape[1])].double()
        for row, positions in rows_of(q_len, k_len, block_q).items():
            mean = q[batch, head, positions[0] - start : positions[-1] + 1 - start].double().mean(0)
            blocks = range(positions[-1] // block_k + 1)
            score = [float(mean @ keys[b * block_k : (b + 1) * block_k].mean(0)) for b in blocks]
            forced = {i // block_k for i in positions}
            others = sorted(set(blocks) - forced, key=lambda b: -score[b])
            expected[row] = forced | set(others[: max(0, count - len(forced))])
        return expected
    columns, offsets = slow_lines(rule, factor, *slow_scores(q, k, batch, head))
    for row, positions in rows_of(q_len, k_len, block_q).items():
        pairs = ((i, j) for i in positions for j in range(i + 1))
        on_lines = {j // block_k for i, j in pairs if j in columns or i - j in offsets}
        expected[row] = on_lines | {i // block_k for i in positions}
    # A column's block is kept by the whole row of blocks, also by queries before the column.
    for row, positions in rows_of(q_len, k_len, block_q).items():
        expected[row] |= {c // block_k for c in columns if c // block_k <= positions[-1] // block_k and c < k_len}
    return expected


@pytest.mark.parametrize(("q_len", "k_len"), [(333, 333), (70, 333), (64, 64), (5, 200), (40, 40)])
@pytest.mark.parametrize("variant", ["plain", "softcap", "sinks"])
def test_scores_of_the_last_queries_match_fp64_loops(q_len, k_len, variant) -> None:
    q, k = calls(q_len, k_len, batch=2)
    values = {"softcap": 1.5} if variant == "softcap" else {}
    context = replace(CONTEXT, **values, sinks=SINKS if variant == "sinks" else None)
    found = last_query_scores(q, k, context)
    # Rounding of a logit in fp32, times two for the sum that divides, and of a sum of 64 terms.
    logit = float(q.abs().max() * k.abs().max()) * 32 * CONTEXT.scale
    relative = torch.finfo(torch.float32).eps * (2 * logit + 64)
    for b in range(2):
        for h in range(4):
            slow = slow_scores(q, k, b, h, **values, sink=float(SINKS[h]) if variant == "sinks" else None)
            for got, expected in zip(found, slow):
                expected = torch.tensor(expected, dtype=torch.float64)
                assert got.shape == (2, 4, k_len)
                assert ((got[b, h] - expected).abs() <= relative * expected + 1e-9).all()


def test_scores_in_strips_of_kv_heads_match_those_in_one_piece(monkeypatch) -> None:
    q, k = calls(100, 200, heads=8, kv_heads=4)
    context = replace(CONTEXT, sinks=torch.randn(8, generator=torch.Generator().manual_seed(1)))
    whole = last_query_scores(q, k, context)
    monkeypatch.setattr("seerattn.methods.lines.STRIP_ELEMENTS", 2 * 64 * 200 * 3)
    for a, b in zip(whole, last_query_scores(q, k, context)):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
@pytest.mark.parametrize("factor", [0.11, 0.5, 1.0, 1.6])
def test_minference_matches_fp64_loops_over_tokens(q_len, k_len, block_q, block_k, factor) -> None:
    q, k = calls(q_len, k_len, batch=2)
    chosen = PatternSelector(RULES, factor, block_q, block_k).select(q, k, CONTEXT)
    assert int(chosen.q_start[0]) == k_len - q_len
    mask = chosen.to_mask()
    for b in range(2):
        for h, rule in enumerate(RULES):
            expected = slow_blocks(rule, factor, q, k, b, h, block_q, block_k)
            assert kept(mask[b, h], (k_len - q_len) // block_q) == expected, (b, rule)


def test_one_rule_serves_all_heads() -> None:
    q, k = calls(1000, 1000)
    one, each = (PatternSelector((VERTICAL_SLASH,) * n, 0.1).select(q, k, CONTEXT) for n in (1, 4))
    assert torch.equal(one.to_mask(), each.to_mask())
    assert len({tuple(row.flatten().tolist()) for row in one.to_mask()[0]}) == 4


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
def test_a_shape_heads_match_the_a_shape_selector(q_len, k_len, block_q, block_k) -> None:
    q, k = calls(q_len, k_len)
    rule = HeadRule("a_shape", 40, 90)
    mask = PatternSelector((rule,), 0.5, block_q, block_k).select(q, k, CONTEXT).to_mask()
    expected = ShapeSelector(45, 20, 0, block_q, block_k).select(q, k, CONTEXT).to_mask()
    assert torch.equal(mask, expected.repeat_interleave(4 // expected.shape[1], 1))


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
def test_block_sparse_heads_match_mean_pooling(q_len, k_len, block_q, block_k) -> None:
    q, k = calls(q_len, k_len)
    rule = HeadRule("block_sparse", tokens=6 * block_k)
    mask = PatternSelector((rule,), 0.5, block_q, block_k).select(q, k, CONTEXT).to_mask()
    policy = TokenBudget(tokens=3 * block_k, sink_blocks=0)
    assert torch.equal(mask, MeanPooledSelector(policy, block_q, block_k).select(q, k, CONTEXT).to_mask())


def test_keep_best_breaks_ties_by_place_and_stops_at_everything() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 2.0]], [[1.0, 1.0, 1.0, 1.0]]]).transpose(0, 1)
    assert keep_best(scores, torch.tensor([1, 2])).int().tolist() == [[[0, 1, 0, 0], [1, 1, 0, 0]]]
    assert keep_best(scores, torch.tensor([0, 9])).int().tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1]]]


@pytest.mark.parametrize(("q_len", "k_len"), [(150, 150), (40, 150), (1, 30)])
def test_density_of_the_lines_alone_matches_loops(q_len, k_len) -> None:
    generator = torch.Generator().manual_seed(3)
    columns, offsets = (torch.rand(2, 3, k_len, generator=generator) < 0.08 for _ in range(2))
    start = k_len - q_len
    expected = torch.zeros(2, 3, q_len, k_len, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            for i in range(start, k_len):
                for j in range(i + 1):
                    expected[b, h, i - start, j] = columns[b, h, j] or offsets[b, h, i - j]
    pairs = sum(i + 1 for i in range(start, k_len))
    assert torch.allclose(token_density(columns, offsets, q_len=q_len), expected.sum((-1, -2)).double() / pairs)


@pytest.mark.parametrize(("q_len", "k_len", "block_q", "block_k"), SHAPES)
def test_each_single_line_becomes_just_the_blocks_that_it_crosses(q_len, k_len, block_q, block_k) -> None:
    start, rows = k_len - q_len, rows_of(q_len, k_len, block_q)
    none = torch.zeros(1, 1, k_len, dtype=torch.bool)
    for place in (0, 1, 15, 16, 17, 31, 32, 63, 64, 65, 88, k_len - 1):
        line = none.clone()
        line[..., place] = True
        sizes = {"q_len": q_len, "block_q": block_q, "block_k": block_k}
        crossed = {row: {(i - place) // block_k for i in positions if i >= place} for row, positions in rows.items()}
        assert kept(lines_to_blocks(none, line, **sizes)[0, 0], start // block_q) == crossed
        columns = lines_to_blocks(line, none, **sizes)[0, 0]
        assert kept(columns, start // block_q) == {row: {place // block_k} for row in rows}


def test_blocks_in_strips_of_rows_match_those_in_one_piece(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    columns, offsets = (torch.rand(1, 2, 333, generator=generator) < 0.02 for _ in range(2))
    sizes = {"q_len": 300, "block_q": 32, "block_k": 16}
    whole = lines_to_blocks(columns, offsets, **sizes)
    monkeypatch.setattr("seerattn.methods.lines.STRIP_ELEMENTS", 100)
    assert torch.equal(whole, lines_to_blocks(columns, offsets, **sizes))


def test_finer_key_blocks_cover_less_beside_the_lines() -> None:
    q, k = calls(1000, 1000)
    densities = [float(PatternSelector((VERTICAL_SLASH,), 0.2, 64, b).select(q, k, CONTEXT).density().mean())
                 for b in (64, 32, 16)]  # fmt: skip
    estimate = Estimate.of(q, k, CONTEXT, block_q=64, block_k=64)
    tokens_alone = float(token_density(*estimate.lines([VERTICAL_SLASH] * 4, 0.2), q_len=1000).mean())
    assert densities == sorted(densities, reverse=True) and len(set(densities)) == 3
    assert 0 < tokens_alone < densities[-1]


PLAN = HeadRules(
    "minference",
    {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 32},
    [[rule.to_dict() for rule in RULES], [], [VERTICAL_SLASH.to_dict()] * 4],
    {"variant": "paper"},
)
NAMES = ["plan", "shipped", "columns"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Method]:
    folder = tmp_path_factory.mktemp("plans")
    PLAN.save(folder / "plan.json")
    replace(PLAN, rules=[[HeadRule("vertical_slash", 3500, 100).to_dict()] * 4] * 3).save(folder / "columns.json")
    return {
        "plan": MInference(plan=folder / "plan.json", block_q=32, block_k=32),
        "shipped": VerticalSlash(block_q=32, block_k=32),
        "columns": MInference(plan=folder / "columns.json"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_larger_factors_keep_supersets_from_the_forced_floor_to_everything(made, name) -> None:
    selectors, (q, k) = made[name].selectors(), calls(1000, 1000)
    octaves = range(round(math.log2(selectors.sparsest)), round(math.log2(selectors.densest)) + 1)
    factors = [2.0 ** (octave + part) for octave in octaves for part in (0, 0.3, 0.6)][:-2]
    masks = [selectors.at(factor)(0).select(q, k, CONTEXT).to_mask() for factor in factors]
    assert all((a & ~b).sum() == 0 for a, b in pairwise(masks))
    assert masks[-1].equal(masks[-1].new_ones(masks[-1].shape[-2:]).tril().expand_as(masks[-1]))
    diagonal = torch.eye(masks[0].shape[-1], dtype=torch.bool)
    first = diagonal.clone()
    first[:, 0] = True
    for head, rule in enumerate(RULES if name == "plan" else [VERTICAL_SLASH] * 4):
        # The nearest offset of the first query of a block is its own; one more reaches into the block before.
        assert torch.equal(masks[0][0, head], diagonal if rule.pattern == "block_sparse" else first)
    assert len({round(float(mask.float().mean()), 6) for mask in masks}) > 8


def test_plan_has_its_rules_by_layer_and_leaves_out_layers_without(made) -> None:
    method = made["plan"]
    selectors = method.selectors()
    at = selectors.at(0.25)
    assert at(0).rules == RULES and at(0).factor == 0.25 and at(1) is None
    assert at(2).rules == (VERTICAL_SLASH,) * 4
    assert (str(method), selectors.scale, method.block_sizes) == ("minference", "log", (32, 32))
    assert json.loads(json.dumps(dict(selectors.settings))) == {"plan": PLAN.digest, "variant": "paper"}


def test_vertical_slash_has_its_sizes_in_every_head() -> None:
    selectors = VerticalSlash(columns=512, offsets=2048).selectors()
    assert selectors.at(1.0)(5).rules == (HeadRule("vertical_slash", 512, 2048),)
    assert dict(selectors.settings) == {"columns": 512, "offsets": 2048}


def test_plan_rejects_rules_and_models_that_are_not_its_own(made, tmp_path) -> None:
    path = tmp_path / "plan.json"
    damaged = {"moa": replace(PLAN, method="moa"), "alpha": replace(PLAN, rules=[[{"alpha": 1}] * 4, [], []])}
    for named, rules in damaged.items():
        rules.save(path)
        method = MInference(plan=path)
        with pytest.raises(ValueError, match=named):
            method.check_model(tiny_model("llama", num_hidden_layers=3).config)
        with pytest.raises(ValueError, match=named):
            method.selectors().at(1.0)(0)
    with pytest.raises(ValueError, match="query heads"):
        made["plan"].selectors().at(1.0)(0).select(*calls(64, 64, heads=6), CONTEXT)


@pytest.mark.parametrize("name", ["plan", "shipped"])
def test_row_of_a_padded_batch_matches_the_row_alone(made, name) -> None:
    model = tiny_model("llama", torch.float64)
    plain = tiny_model("llama", torch.float64)
    at = made[name].selectors().at(0.001 if name == "shipped" else 0.3)
    attach(model, lambda layer: at(0), impl="reference")
    try:
        ids = tokens(2, 333)
        mask = torch.ones_like(ids)
        mask[1, :110] = 0
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padded = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}
            together = model(**padded).logits
            alone = model(input_ids=ids[1:, 110:]).logits
            first = model(input_ids=ids[:1]).logits
            dense = plain(input_ids=ids[1:, 110:]).logits
    finally:
        detach(model)
    assert float((together[1:, 110:] - alone).abs().max()) < 1e-10
    assert float((together[:1] - first).abs().max()) < 1e-10
    assert float((alone - dense).abs().max()) > 1e-2


@pytest.mark.parametrize("rule", [*RULES, HeadRule("a_shape", 1, 1, scale=2.0)], ids=str)
def test_rule_survives_json(rule) -> None:
    assert HeadRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "dense"}, "pattern"),
        ({"pattern": "a_shape", "columns": 4}, "offsets of a_shape"),
        ({"pattern": "vertical_slash", "columns": 4.5, "offsets": 3}, "columns of vertical_slash"),
        ({"pattern": "vertical_slash", "columns": "4", "offsets": 3}, "columns of vertical_slash"),
        ({"pattern": "block_sparse", "tokens": 64, "columns": 3}, "columns of block_sparse"),
        ({"pattern": "a_shape", "columns": 4, "offsets": 3, "scale": 0}, "scale"),
        ({"pattern": "a_shape", "columns": 4, "offsets": 3, "scale": math.inf}, "scale"),
        ({"columns": 4, "offsets": 3}, "pattern"),
        ({"pattern": "a_shape", "columns": 4, "offsets": 3, "n_last": 3}, "n_last"),
    ],
)
def test_rule_rejects_sizes_that_its_pattern_cannot_have(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        HeadRule.from_dict(values)


@pytest.mark.parametrize(
    "values", [{"rules": ()}, {"rules": RULES, "factor": 0.0}, {"rules": RULES, "factor": math.nan}]
)
def test_minference_rejects_no_rules_and_factors_that_are_none(values) -> None:
    with pytest.raises(ValueError, match="rules and factor"):
        PatternSelector(**values)
