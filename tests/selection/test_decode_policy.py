"""Policies for one token: each choice written out, and what may not choose there."""

import math

import pytest
import torch

from seerattn import KeepAll, Policy, Threshold, TokenBudget, TopK, TopP
from seerattn.selection.decode_policy import check_decode_policy, choose_blocks, group_scores, reads_all

BLOCK = 32
POLICIES = [
    KeepAll(),
    TokenBudget(tokens=3 * BLOCK),
    TokenBudget(tokens=1, sink_blocks=2),
    TokenBudget(tokens=100, sink_blocks=0),
    TopK(density=0.3),
    TopK(density=0.3, rule="row_share", heads="equal", sink_blocks=0),
    TopK(density=1.0),
    Threshold(threshold=0.2),
    Threshold(threshold=-1.0, on="score", sink_blocks=0),
    TopP(p=0.6),
]


def written_out(scores: list[float], policy: Policy, tokens: int, forced_scored: bool) -> list[int]:
    """Blocks of one row, by the words of the policies."""
    own = (tokens - 1) // BLOCK
    forced = sorted({own, *range(min(policy.sink_blocks, own))})
    rivals = [j for j in range(own) if j not in forced]
    ranked = sorted(rivals, key=lambda j: -scores[j])
    scored = list(range(own)) if forced_scored else rivals
    total = math.fsum(math.exp(scores[j]) for j in scored)
    chance = {j: math.exp(scores[j]) / total for j in scored}
    if isinstance(policy, KeepAll):
        return list(range(own + 1))
    if isinstance(policy, TokenBudget):
        kept = ranked[: max(0, math.ceil(policy.tokens / BLOCK) - len(forced))]
    elif isinstance(policy, TopK):
        kept = ranked[: max(0, math.ceil((own + 1) * policy.density - 1e-6) - len(forced))]
    elif isinstance(policy, Threshold):
        level = chance if policy.on == "softmax" else dict(enumerate(scores))
        kept = [j for j in rivals if level[j] > policy.threshold]
    else:
        kept, mass = [], 0.0
        for j in sorted(scored, key=lambda j: -scores[j]):
            if mass < policy.p:
                kept.append(j)
            mass += chance[j]
    return sorted({*forced, *kept})


@pytest.mark.parametrize("forced_scored", [True, False])
@pytest.mark.parametrize("tokens", [1, BLOCK, BLOCK + 1, 7 * BLOCK, 300])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_choice_matches_the_written_out_one_and_is_of_its_row_alone(
    policy: Policy, tokens: int, forced_scored: bool
) -> None:
    scores = torch.randn(3, 2, (tokens - 1) // BLOCK, generator=torch.Generator().manual_seed(tokens))
    call = {"tokens": tokens, "block_k": BLOCK, "forced_scored": forced_scored}
    found = choose_blocks(scores, policy, **call)
    assert found.indices.dtype == found.counts.dtype == torch.int32 and found.block_k == BLOCK
    for b in range(3):
        alone = choose_blocks(scores[b : b + 1], policy, **call)
        for h in range(2):
            expected = written_out(scores[b, h].tolist(), policy, tokens, forced_scored)
            row, count = found.indices[b, h].tolist(), int(found.counts[b, h])
            assert row[:count] == expected and set(row[count:]) <= {-1}
            assert alone.indices[0, h, :count].tolist() == expected


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_said_to_read_all_does_and_so_does_no_other_budget(policy: Policy) -> None:
    counts = isinstance(policy, (KeepAll, TokenBudget, TopK))
    for tokens in range(1, 9 * BLOCK, 11):
        number = -(-tokens // BLOCK)
        said = reads_all(policy, tokens, BLOCK)
        for best in range(number - 1):
            scores = torch.full((1, 1, number - 1), -30.0)
            scores[..., best] = 0.0
            full = int(choose_blocks(scores, policy, tokens=tokens, block_k=BLOCK).counts) == number
            assert full == said if counts else full >= said


def test_lists_of_a_budget_have_one_width_however_long_the_sequence() -> None:
    policy = TokenBudget(tokens=4 * BLOCK)
    for number in (4, 5, 40):
        found = choose_blocks(torch.randn(2, 2, number), policy, tokens=number * BLOCK + 1, block_k=BLOCK)
        assert found.indices.shape == (2, 2, 4)


@pytest.mark.parametrize("unscored", [0, 1, 2])
def test_a_group_has_the_largest_probability_of_its_heads(unscored: int) -> None:
    scores = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 3
    found, given = group_scores(scores, 2, unscored=unscored).exp().double(), scores.double()
    for b in range(2):
        for group in range(2):
            for j in range(5):
                rows = given[b, 3 * group : 3 * group + 3, unscored:].exp()
                expected = 0.0 if j < unscored else float((rows[:, j - unscored] / rows.sum(1)).max())
                assert found[b, group, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_a_group_of_which_nothing_is_scored_has_no_scores() -> None:
    assert (group_scores(torch.randn(1, 2, 1), 1, unscored=1) == -math.inf).all()
    assert group_scores(torch.zeros(1, 2, 0), 1).shape == (1, 1, 0)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("fast", "decode_policy must be a policy such as TokenBudget"),
        (TopP(p=0.5, last_rows_dense=1), "last_rows_dense of a decode_policy must be 0, got 1"),
        (TopP(p=0.5, skip_threshold=0.1), "skip_threshold of a decode_policy must be None, got 0.1"),
        (TopK(density=[[0.1, 0.2]]), "density of a decode_policy must be one number"),
    ],
)
def test_a_policy_that_means_nothing_for_one_token_is_rejected(policy: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_decode_policy(policy)
