"""The small examples of the page on concepts come out as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from seerattn import KeepAll, Policy, Threshold, TokenBudget, TopK, TopP

PAGE = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
POLICIES = {c.__name__: c for c in (KeepAll, Threshold, TokenBudget, TopK, TopP)}
ROWS = re.findall(r"^\| (\.\d) \| (\.\d+) \| (\.\d+) \| (\.\d+) \|$", PAGE, re.MULTILINE)
CHOICES = re.findall(r"^\| `(\w+)\((\w+)=([\d.]+)\)` \|.*\| ([\d, ]+) \|$", PAGE, re.MULTILINE)


def chosen(policy: Policy, scores: torch.Tensor, tokens: int) -> torch.Tensor:
    geometry = {"q_start": 0, "q_len": tokens, "block_q": 64, "block_k": 64}
    return policy.select(scores, **geometry, forced_scored=False).to_mask()[0, 0]


@pytest.mark.parametrize("name, option, value, blocks", CHOICES, ids=lambda word: word)
def test_policies_keep_the_blocks_of_the_table(name: str, option: str, value: str, blocks: str) -> None:
    shares = re.search(r"^\| score \| (.*) \|$", PAGE, re.MULTILINE)
    assert shares is not None and len(CHOICES) == 5
    scores = torch.zeros(1, 1, 8, 8)
    scores[0, 0, 5, :6] = torch.tensor([float(share) for share in shares[1].split(" | ")]).log()
    number = int(value) if option == "tokens" else float(value)
    mask = chosen(POLICIES[name](**{option: number}), scores, 512)
    assert mask[5].nonzero().flatten().tolist() == [int(block) for block in blocks.split(", ")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_densities_of_the_table_are_those_that_are_computed(row: tuple[str, ...]) -> None:
    assert len(ROWS) == 2
    for tokens, told in zip((2048, 4096, 8192), row[1:], strict=True):
        rows = tokens // 64
        mask = chosen(TopK(density=float(row[0])), torch.zeros(1, 1, rows, rows), tokens)
        assert float(mask.sum()) / (rows * (rows + 1) / 2) == pytest.approx(float(told), abs=5e-4)
