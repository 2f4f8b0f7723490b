"""The page of the ablation says what the records say."""

import json
import math
import sys
from pathlib import Path

import pytest

from seerattn.gate import AttnGateConfig
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import ablation_table

TOKENS = [100, 300]
# Mean losses of two books.
LOSSES = {"streaming": [3.2, 3.1], "oracle": [3.0, 2.9], "8x8": [3.05, 2.95], "paper": [3.15, 3.06]}


def perplexity(name: str) -> float:
    total = sum(loss * n for loss, n in zip(LOSSES[name], TOKENS))
    return math.exp(total / sum(TOKENS))


def result(**values) -> Result:
    return Result(**{"n": 400, "unit": "tokens", "model": "m", "context": 8192, "text": "books"} | values)


@pytest.fixture
def page(tmp_path: Path) -> str:
    results = ResultsFile(tmp_path / "ablation.jsonl", "cpu")
    for density in (0.1, 0.2):
        for name, losses in LOSSES.items():
            gate = name not in ("streaming", "oracle")
            results.append(
                result(
                    what="perplexity",
                    value=perplexity(name),
                    selector="gate" if gate else name,
                    gates=name if gate else None,
                    density=density,
                    samples={"losses": [x * n for x, n in zip(losses, TOKENS)], "tokens": TOKENS},
                )
            )
    for name, value in (("8x8", 0.75), ("paper", 0.25)):
        results.append(
            result(
                what="accuracy", value=value, n=40, selector="gate", gates=name, density=0.1, cell={"task": "key_value"}
            )
        )
    lines = []
    for name, config in (("8x8", AttnGateConfig()), ("paper", AttnGateConfig.paper())):
        facts = {"steps": 7, "batch": 2, "context": 8192, "stretch": 1024, "loss_at_end": 0.5}
        lines.append(json.dumps({"name": name, "config": config.to_dict()} | facts))
    (tmp_path / "variants.jsonl").write_text("\n".join(lines) + "\n")
    ablation_table.main(tmp_path / "ablation.jsonl", tmp_path / "variants.jsonl", tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def test_the_share_of_the_gap_is_that_of_perplexities(page: str) -> None:
    ends = perplexity("streaming"), perplexity("oracle")
    for name in ("8x8", "paper"):
        expected = (ends[0] - perplexity(name)) / (ends[0] - ends[1])
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2] == f"{perplexity(name):.3f}"
        assert cells[4] == cells[5] == f"{100 * expected:.0f}%"


def test_retrieval_and_scores_stand_in_their_columns(page: str) -> None:
    rows = {line.split("|")[1].strip(): line.strip("|").split("|") for line in page.splitlines() if line[:1] == "|"}
    assert [rows[name][7].strip() for name in ("8x8", "paper")] == ["0.75", "0.25"]
    assert [rows[name][1].strip() for name in ("8x8", "paper")] == ["64", "1"]
    assert "7 steps of 2" in page and "2 validation books" in page
