"""Policies against brute force on rows of scores."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from seerattn.selection import KeepAll, Policy, Threshold, TokenBudget, TopK, TopP, policy_from_dict
from seerattn.selection.block_indices import causal_block_mask, forced_block_mask, num_query_blocks
from seerattn.selection.policies import rows_k

BLOCK = 64
CALLS = [(0, 1), (0, 65), (0, 1000), (256, 700), (100, 300), (999, 1)]


def random_scores(q_start: int, q_len: int, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    shape = (num_query_blocks(q_start, q_len, BLOCK), -(-(q_start + q_len) // BLOCK))
    causal = causal_block_mask(q_start, q_len, *shape, BLOCK, BLOCK)[0]
    forced = forced_block_mask(q_start, q_len, *shape, BLOCK, BLOCK)[0]
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, heads, *shape, generator=g) * 3
    return scores.masked_fill(~causal, -math.inf), causal, forced


def select(policy: Policy, scores: Tensor, q_start: int, q_len: int, **kwargs) -> Tensor:
    call = {"q_start": q_start, "q_len": q_len, "block_q": BLOCK, "block_k": BLOCK}
    return policy.select(scores, **call, **kwargs).to_mask()


def best(row: Tensor, forced: Tensor, causal: Tensor, k: int) -> set[int]:
    """The forced blocks, then the best others, until ``k`` blocks are kept."""
    keep = set(forced.nonzero().flatten().tolist())
    others = [j for j in row.argsort(descending=True).tolist() if bool(causal[j]) and j not in keep]
    return keep | set(others[: max(0, k - len(keep))])


@pytest.mark.parametrize(("q_start", "q_len"), CALLS)
def test_token_budget_keeps_forced_and_then_the_best_blocks_of_each_row(q_start, q_len) -> None:
    scores, causal, forced = random_scores(q_start, q_len)
    mask = select(TokenBudget(tokens=250), scores, q_start, q_len)
    for h in range(2):
        for i in range(mask.shape[2]):
            expected = best(scores[0, h, i], forced[i], causal[i], 4)
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [64, 1000, 4096, 8192])
def test_top_k_realises_the_density_that_is_nearest_for_one_k_in_all_rows(density, length) -> None:
    scores, causal, _ = random_scores(0, length)
    call = {"q_start": 0, "q_len": length, "block_q": BLOCK, "block_k": BLOCK}
    realised = TopK(density=density, sink_blocks=0).select(scores, **call).density()
    sizes = causal.sum(-1)
    reachable = torch.tensor([float(sizes.clamp(max=k).sum()) for k in range(1, len(sizes) + 1)]) / sizes.sum()
    nearest = reachable[(reachable - density).abs().argmin()]
    assert torch.allclose(realised.float(), nearest.expand(1, 2), atol=1e-6)


def test_same_k_is_within_one_block_of_the_continuous_solution() -> None:
    for blocks in (16, 64, 128, 512, 2048):
        for density in (0.1, 0.5, 0.9):
            continuous = (1 - math.sqrt(1 - density)) * blocks
            assert abs(rows_k(blocks * BLOCK, BLOCK, BLOCK, density) - continuous) <= 1.0


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (64, 128)])
def test_same_k_realises_the_nearest_density_of_all_numbers(block_q, block_k) -> None:
    for tokens in (1, 63, 64, 65, 1000, 2048, 3000):
        rows = [min((i + 1) * block_q, tokens) for i in range(-(-tokens // block_q))]
        causal = [-(-end // block_k) for end in rows]
        for hundredths in range(1, 101):
            distance = {
                k: abs(Fraction(sum(min(c, k) for c in causal), sum(causal)) - Fraction(hundredths / 100))
                for k in range(1, max(causal) + 1)
            }
            # Densities are fp32.
            found = distance[rows_k(tokens, block_q, block_k, hundredths / 100)]
            assert found <= min(distance.values()) + Fraction(2**-23)


def test_row_share_does_not_depend_on_the_length_of_the_prompt() -> None:
    policy = TopK(density=0.3, rule="row_share")
    scores, _, _ = random_scores(0, 1024)
    short = select(policy, scores[:, :, :8, :8], 0, 512)
    assert torch.equal(select(policy, scores, 0, 1024)[:, :, :8, :8], short)


def test_top_k_with_a_declared_length_selects_alike_in_chunks_and_in_one_shot() -> None:
    policy = TopK(density=0.3, length=1024)
    scores, _, _ = random_scores(0, 1024)
    whole = select(policy, scores, 0, 1024)
    for begin in range(0, 16, 4):
        part = select(policy, scores[:, :, begin : begin + 4, : begin + 4], begin * BLOCK, 4 * BLOCK)
        assert torch.equal(part, whole[:, :, begin : begin + 4, : begin + 4])


@pytest.mark.parametrize(("q_start", "q_len"), CALLS)
@pytest.mark.parametrize("forced_scored", [True, False])
def test_threshold_keeps_what_exceeds_it_among_the_scored_blocks(q_start, q_len, forced_scored) -> None:
    scores, causal, forced = random_scores(q_start, q_len)
    mask = select(Threshold(threshold=0.05), scores, q_start, q_len, forced_scored=forced_scored)
    scored = causal if forced_scored else causal & ~forced
    p = scores.double().masked_fill(~scored, -math.inf).softmax(-1).nan_to_num(0)
    assert torch.equal(mask, (p > 0.05) | forced)


def test_score_threshold_compares_raw_scores() -> None:
    scores, causal, forced = random_scores(0, 1000)
    mask = select(Threshold(threshold=1.5, on="score"), scores, 0, 1000)
    assert torch.equal(mask, (scores > 1.5) & causal | forced)


@pytest.mark.parametrize(("q_start", "q_len"), CALLS)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(q_start, q_len) -> None:
    scores, _, _ = random_scores(q_start, q_len)
    mask = select(TopP(p=0.7, sink_blocks=0), scores, q_start, q_len)
    p = scores.double().softmax(-1)
    diagonal = forced_block_mask(q_start, q_len, *scores.shape[2:], BLOCK, BLOCK, sink_blocks=0)[0]
    for h in range(2):
        for i in range(scores.shape[2]):
            held, expected = 0.0, set(diagonal[i].nonzero().flatten().tolist())
            for j in p[0, h, i].argsort(descending=True).tolist():
                if held >= 0.7:
                    break
                expected.add(j)
                held += float(p[0, h, i, j])
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == expected


def test_knobs_may_differ_by_layer_and_head() -> None:
    scores, _, _ = random_scores(0, 1000)
    for make, values in (
        (lambda v: TopK(density=v), (0.2, 0.6)),
        (lambda v: TopK(density=v, rule="row_share"), (0.2, 0.6)),
        (lambda v: Threshold(threshold=v), (0.01, 0.2)),
        (lambda v: TopP(p=v), (0.3, 0.9)),
    ):
        together = select(make([[0.5, 0.5], list(values)]), scores, 0, 1000, layer=1)
        for h, value in enumerate(values):
            alone = select(make(value), scores[:, h : h + 1], 0, 1000)
            assert torch.equal(together[:, h : h + 1], alone)


def test_last_rows_dense_and_sink_blocks_are_kept_and_counted() -> None:
    scores, causal, _ = random_scores(0, 1000)
    policy = TokenBudget(tokens=64, sink_blocks=2, last_rows_dense=3)
    built = policy.select(scores, q_start=0, q_len=1000, block_q=BLOCK, block_k=BLOCK)
    mask = built.to_mask()[0, 0]
    assert torch.equal(mask[-3:], causal[-3:])
    assert bool(mask[1:, :2].all())
    assert float(built.density()[0, 0]) == float(mask.sum() / causal.sum().double())


def test_rows_of_which_nothing_is_scored_keep_their_forced_blocks() -> None:
    scores = torch.full((1, 1, 2, 2), -math.inf)
    for policy in (TopK(density=0.1), Threshold(threshold=0.5), TopP(p=0.5), TokenBudget(tokens=1)):
        mask = select(policy, scores, 0, 128, forced_scored=False)
        assert torch.equal(mask[0, 0], torch.tensor([[True, False], [True, True]]))


@pytest.mark.parametrize(
    "policy",
    [
        KeepAll(),
        TopK(density=0.1, rule="row_share", length=5, last_rows_dense=2),
        TopK(density=[[0.1, 0.2]]),
        TokenBudget(tokens=512, sink_blocks=0),
        Threshold(threshold=2e-3, on="score"),
        TopP(p=0.9),
        TopK(density=0.1, skip_threshold=1e-3),
        KeepAll(skip_threshold=1),
    ],
)
def test_policies_survive_a_round_trip_through_plain_types(policy) -> None:
    assert policy_from_dict(policy.to_dict()) == policy
    assert ("skip_threshold" in policy.to_dict()) == (policy.skip_threshold is not None)


@pytest.mark.parametrize(
    "policy", [KeepAll(), TopK(density=0.3), TokenBudget(tokens=200), Threshold(threshold=0.1), TopP(p=0.5)]
)
def test_a_policy_that_skips_chooses_the_same_blocks_and_hands_the_threshold_on(policy) -> None:
    scores, _, _ = random_scores(0, 1000)
    call = {"q_start": 0, "q_len": 1000, "block_q": BLOCK, "block_k": BLOCK}
    plain, skipping = (p.select(scores, **call) for p in (policy, replace(policy, skip_threshold=0.01)))
    assert torch.equal(plain.indices, skipping.indices) and torch.equal(plain.counts, skipping.counts)
    assert plain.skip_threshold is None and skipping.skip_threshold == 0.01


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(density=0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: TopK(density=[[0.5, 1.5]]), r"density must be in \(0, 1\], got 1.5"),
        (lambda: TopK(density="0.1"), "density must be a finite number.* got '0.1'"),
        (lambda: TopK(density=[0.1, 0.2]), "density must be a finite number, or one a layer and head"),
        (lambda: TopK(density=0.5, rule="best"), "rule must be"),
        (lambda: TopP(p=1.1), r"p must be in \(0, 1\]"),
        (lambda: TokenBudget(tokens=0), "tokens must be a whole number of at least 1"),
        (lambda: Threshold(threshold=0.1, on="mass"), "on must be"),
        (lambda: KeepAll(sink_blocks=-1), "sink_blocks must be a whole number of at least 0"),
        (lambda: KeepAll(skip_threshold=0.0), "skip_threshold must be a number above 0, at most 1, or None, got 0.0"),
        (lambda: TopK(density=0.5, skip_threshold="x"), "skip_threshold must be .* got 'x'"),
        (lambda: policy_from_dict({"policy": "Best"}), "policy must be one of"),
        (
            lambda: policy_from_dict({"policy": "TopK", "share": 1}),
            "TopK must have no other fields than .*, got \\['share'\\]",
        ),
    ],
)
def test_policies_reject_what_makes_no_sense(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


NO_NUMBERS = [
    [],
    [[]],
    {},
    "x",
    "0.5",
    True,
    None,
    float("nan"),
    float("inf"),
    10**400,
    [None],
    [[True]],
    [["x"]],
    [0.5],
]
NO_WHOLE_NUMBERS = [[], "x", True, None, 1.5, float("nan"), 10**400, -1, {}]
NUMBERS = {"TopK": "density", "TopP": "p", "Threshold": "threshold"}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_policies_reject_a_knob_that_is_no_number_where_they_are_made(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{NUMBERS[name]} must be .*, got "):
        policy_from_dict({"policy": name, NUMBERS[name]: value})


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", ["sink_blocks", "last_rows_dense", "tokens", "length"])
def test_policies_reject_a_count_that_is_no_whole_number_where_they_are_made(field: str, value) -> None:
    values = {"tokens": {"policy": "TokenBudget"}, "length": {"policy": "TopK", "density": 0.5}}
    if field == "length" and value is None:
        return
    with pytest.raises(ValueError, match=f"^{field} must be a whole number of at least [01], at most 2147483647, got "):
        policy_from_dict(values.get(field, {"policy": "KeepAll"}) | {field: value})


@pytest.mark.parametrize(
    "values",
    [[], "x", 1.5, True, None, {}, {"policy": []}, {"policy": None}, {"policy": "TopK"}, {"policy": "KeepAll", 1: 2},
     {"policy": "TopK", "density": 0.5, "rule": []}, {"policy": "Threshold", "threshold": 0.5, "on": {}}],
    ids=repr,
)  # fmt: skip
def test_policy_from_dict_rejects_what_is_no_policy(values) -> None:
    with pytest.raises(ValueError, match=r"^(policy|TopK|KeepAll|rule|on) must "):
        policy_from_dict(values)


def test_layers_without_a_gate_have_no_values_of_a_knob() -> None:
    scores, _, _ = random_scores(0, 1000)
    policy = TopP(p=[[], [0.5, 0.5]])
    assert torch.equal(select(policy, scores, 0, 1000, layer=1), select(TopP(p=0.5), scores, 0, 1000))
    for layer in (0, 2):
        with pytest.raises(ValueError, match="must have 2 values a layer, got 0"):
            select(policy, scores, 0, 1000, layer=layer)


def test_policies_reject_scores_of_another_geometry_and_a_knob_of_another_model() -> None:
    scores, _, _ = random_scores(0, 1000)
    with pytest.raises(ValueError, match="a row for each of the 2 query blocks"):
        select(KeepAll(), scores, 0, 128)
    with pytest.raises(ValueError, match="must have 2 values a layer"):
        select(TopP(p=[[0.5]]), scores, 0, 1000)
