"""Budgets of heads: what a table says between its entries, its form as JSON, what is refused, how policies use it."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch

from seerattn.selection import HeadBudgets, Threshold, TopK, policy_from_dict
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.budgets import share_density

ABOUT = {"block_q": 64, "block_k": 64, "target": "sum:2", "gain": "max:inf", "text": "0a1b", "windows": 3}
# Two lengths, two rungs, three layers of which the second has no gate, two heads.
TABLE = {
    "ladder": (0.1, 0.2),
    "lengths": (1024, 4096),
    "densities": (
        (((0.05, 0.15), (), (0.1, 0.1)), ((0.1, 0.3), (), (0.1, 0.3))),
        (((0.02, 0.18), (), (0.1, 0.1)), ((0.04, 0.36), (), (0.2, 0.2))),
    ),
}


def table(**changes) -> HeadBudgets:
    return HeadBudgets(**(ABOUT | TABLE | changes))


def test_a_rung_at_a_length_gives_its_row_and_one_gives_everything() -> None:
    for i, length in enumerate(TABLE["lengths"]):
        for j, rung in enumerate(TABLE["ladder"]):
            assert table().at(rung, length) == TABLE["densities"][i][j]
        assert table().at(1.0, length) == ((1.0, 1.0), (), (1.0, 1.0))
    assert table().heads == (2, 0, 2)


@pytest.mark.parametrize("density", [0.1, 0.13, 0.2, 0.55, 1])
@pytest.mark.parametrize("tokens", [1, 1024, 1025, 2048, 3000, 4096, 10**6])
def test_between_entries_densities_are_linear_in_the_density_and_in_the_logarithm_of_the_length(
    density, tokens
) -> None:
    """Head by head from the definition, and the mean is the density that was asked for."""
    found = table().at(density, tokens)
    place = min(max(math.log2(tokens), 10), 12) - 10  # 1024 is 0, 4096 is 2
    for layer in (0, 2):
        for head in range(2):
            ends = []
            for rows in TABLE["densities"]:
                rungs = [(0.1, rows[0][layer][head]), (0.2, rows[1][layer][head]), (1.0, 1.0)]
                (a, x), (b, y) = next(p for p in pairwise(rungs) if p[0][0] <= density <= p[1][0])
                ends.append(x + (density - a) / (b - a) * (y - x))
            assert found[layer][head] == pytest.approx(ends[0] + place / 2 * (ends[1] - ends[0]), rel=1e-12)
    values = [value for heads in found for value in heads]
    assert sum(values) / 4 == pytest.approx(density)


def test_a_table_survives_a_round_trip_through_json() -> None:
    once = table(densities=((((1 / 30, 1 / 6), ()), ((0.1, 0.3), ())),), lengths=(7,), ladder=(0.1, 0.2))
    text = json.dumps(once.to_dict())
    assert '"0.03333 0.1667"' in text
    assert HeadBudgets.from_dict(json.loads(text)) == once
    assert hash(HeadBudgets.from_dict(json.loads(text))) == hash(once)
    assert HeadBudgets.from_dict(table().to_dict()) == table()


def test_a_rung_below_the_forced_blocks_is_met_by_equal_heads_above_it() -> None:
    forced = (((0.12, 0.12),), ((0.1, 0.3),))
    assert table(densities=(forced,), lengths=(1024,)).at(0.1, 1024) == ((0.12, 0.12),)


BAD = [
    ({"densities": (TABLE["densities"][0],)}, "must have a table for each of 2 lengths, got 1"),
    ({"densities": (TABLE["densities"][0], TABLE["densities"][1][:1])}, "a row for each of 2 rungs, got 1"),
    ({"densities": (TABLE["densities"][0], (((0.1,), (), (0.1, 0.1)),) * 2)}, "the same layers and heads everywhere"),
    ({"densities": ((((0.1, 0.2), (), (0.1, 0.1)), TABLE["densities"][0][1]),) * 2}, "the mean 0.1 at 1024 tokens"),
    ({"densities": ((((0.05, 0.05),), ((0.2, 0.2),)),) * 2}, "the mean 0.1 at 1024 tokens"),
    ({"densities": ((((0.0, 0.2),), ((0.2, 0.2),)),) * 2}, "numbers above 0, at most 1, got 0"),
    ({"densities": ((((math.nan, 0.2),), ((0.2, 0.2),)),) * 2}, "numbers above 0, at most 1, got nan"),
    ({"densities": ((((True, 0.2),), ((0.2, 0.2),)),) * 2}, "numbers above 0, at most 1, got True"),
    ({"densities": ((((), ()), ((), ())),) * 2}, "must be of one head at least"),
    ({"densities": 3}, "densities of budgets must be a list"),
    ({"densities": ((0.1, 0.2),) * 2}, "densities of budgets must be a list"),
    ({"ladder": (0.2, 0.1)}, "ladder of budgets must be densities above 0 and below 1, ascending"),
    ({"ladder": (0.1, 1.0)}, "ladder of budgets must be"),
    ({"ladder": ()}, "ladder of budgets must be a list"),
    ({"ladder": ("0.1", 0.2)}, "ladder of budgets must be"),
    ({"lengths": (4096, 1024)}, "lengths of budgets must be numbers of tokens, ascending"),
    ({"lengths": (10.5, 1024)}, "lengths of budgets must be"),
    ({"block_q": 0}, "block_q of budgets must be a whole number"),
    ({"windows": True}, "windows of budgets must be a whole number"),
    ({"target": "mean:2"}, "a map must be keys:power"),
    ({"gain": None}, "gain of budgets must be a map"),
    ({"text": 5}, "text of budgets must be the digest"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_table_rejects_what_makes_none(changes, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        table(**changes)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (None, "budgets must be an object"),
        ([], "budgets must be an object"),
        ({}, "budgets must have ladder, lengths"),
        (table().to_dict() | {"more": 1}, "budgets must have ladder, lengths"),
        (table().to_dict() | {"densities": "0.1"}, "densities of budgets must be a list"),
        (table().to_dict() | {"densities": [[["0.1 x"]]]}, "must be strings of numbers"),
        (table().to_dict() | {"densities": [[[0.1]]]}, "must be strings of numbers"),
        (table().to_dict() | {"densities": [[["nan"], ["0.1"]]] * 2}, "numbers above 0, at most 1, got nan"),
    ],
    ids=range(8),
)
def test_from_dict_rejects_what_is_no_table(values, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        HeadBudgets.from_dict(values)


@pytest.mark.parametrize("density", [0.0999, 0.0, 1.01, math.nan])
def test_a_density_outside_of_the_table_is_refused(density: float) -> None:
    with pytest.raises(
        ValueError, match=r"density must be 0.1 to 1, those of the budgets .*; use TopK\(heads='equal'\)"
    ):
        table().at(density, 2048)


def test_only_one_density_that_is_to_be_shared_is_shared() -> None:
    shared = share_density(TopK(density=0.1, sink_blocks=2), table(), 4096)
    assert shared == TopK(density=TABLE["densities"][1][0], sink_blocks=2)
    others = [
        TopK(density=0.1, heads="equal"), TopK(density=[[0.3, 0.4], [], [0.1, 0.1]]), Threshold(threshold=0.1)
    ]  # fmt: skip
    for policy in others:
        assert share_density(policy, table(), 4096) is policy
    policy = TopK(density=0.1)
    assert share_density(policy, None, 4096) is policy


def test_the_length_that_counts_is_that_of_the_prompt_or_for_row_share_one_that_chunks_agree_on() -> None:
    def density(tokens: int, **options) -> object:
        return share_density(TopK(density=0.1, **options), table(), tokens).density

    short, long = (table().at(0.1, tokens) for tokens in (1024, 4096))
    assert density(1024) == short and density(4096) == long
    assert density(1024, length=4096) == long and density(4096, length=1024) == long
    assert density(1024, rule="row_share") == density(4096, rule="row_share") == long
    assert density(4096, rule="row_share", length=1024) == short


@pytest.mark.parametrize("policy", [TopK(density=0.3, rule="row_share"), TopK(density=0.3, length=1024)])
def test_with_budgets_chunks_select_as_one_shot_where_the_policy_says_so(policy: TopK) -> None:
    budgets = table(lengths=(256, 2048))
    scores = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    scores = scores.masked_fill(~causal, -math.inf)

    def select(begin: int, end: int) -> torch.Tensor:
        chosen = share_density(policy, budgets, end * 64)
        call = {"q_start": begin * 64, "q_len": (end - begin) * 64, "block_q": 64, "block_k": 64, "layer": 0}
        assert num_query_blocks(call["q_start"], call["q_len"], 64) == end - begin
        return chosen.select(scores[:, :, begin:end, :end], **call).to_mask()

    whole = select(0, 16)
    assert whole[0, 0].sum() < whole[0, 1].sum()
    for begin, end in ((0, 3), (3, 4), (4, 16)):
        assert torch.equal(select(begin, end), whole[:, :, begin:end, :end])


def test_calibrated_heads_go_without_saying_in_saved_policies() -> None:
    assert "heads" not in TopK(density=0.1).to_dict()
    equal = TopK(density=0.1, heads="equal")
    assert equal.to_dict()["heads"] == "equal" and policy_from_dict(equal.to_dict()) == equal
    with pytest.raises(ValueError, match="heads must be 'calibrated' or 'equal', got 'all'"):
        TopK(density=0.1, heads="all")
