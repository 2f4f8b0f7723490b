"""The tables of the ablation say what the records say."""

import math
import sys
from pathlib import Path

import pytest

from seerattn.gate import AttnGateConfig
from seerattn.results.record import Result

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import ablation_table

TOKENS = [100, 300]
# Mean losses of two books.
LOSSES = {"streaming": [3.2, 3.1], "oracle": [3.0, 2.9], "8x8": [3.05, 2.95], "paper": [3.15, 3.06]}
KINDS = {"streaming": ("streaming", "static"), "oracle": ("oracle", "oracle")}


def perplexity(name: str) -> float:
    total = sum(loss * n for loss, n in zip(LOSSES[name], TOKENS))
    return math.exp(total / sum(TOKENS))


def result(name: str, **values) -> Result:
    method, kind = KINDS.get(name, ("gate", "learned"))
    values = {"n": 400, "unit": "tokens", "model": "m", "context": 8192, "text": "books"} | values
    return Result(method=method, kind=kind, name=name, **values)


@pytest.fixture
def lines() -> dict[str, list[str]]:
    """Cells of the first table by the name of their line."""
    results = []
    for density in (0.1, 0.2):
        for name, losses in LOSSES.items():
            samples = {"losses": [x * n for x, n in zip(losses, TOKENS)], "tokens": TOKENS}
            results.append(result(name, what="perplexity", value=perplexity(name), density=density, samples=samples))
    for name, value in (("8x8", 0.75), ("paper", 0.25)):
        results.append(result(name, what="accuracy", value=value, density=0.1, cell={"task": "key_value"}))
    configs = {"8x8": AttnGateConfig(), "paper": AttnGateConfig.paper()}
    variants = {name: {"config": config.to_dict(), "loss_at_end": 0.5} for name, config in configs.items()}
    first, *_ = ablation_table.tables(results, variants)
    return {line.name: [cell.text for cell in line.cells] for line in first.lines}


def test_the_share_of_the_gap_is_that_of_perplexities(lines: dict[str, list[str]]) -> None:
    ends = perplexity("streaming"), perplexity("oracle")
    for name in ("8x8", "paper"):
        share = (ends[0] - perplexity(name)) / (ends[0] - ends[1])
        assert lines[name][1] == f"{perplexity(name):.3f}"
        assert lines[name][3] == lines[name][4] == f"{share:.0%}"


def test_retrieval_and_scores_stand_in_their_columns(lines: dict[str, list[str]]) -> None:
    assert [lines[name][6] for name in ("8x8", "paper")] == ["0.75", "0.25"]
    assert [lines[name][0] for name in ("8x8", "paper")] == ["64", "1"]
    assert lines["8x8"][2] == "" and lines["paper"][2].startswith("+")
