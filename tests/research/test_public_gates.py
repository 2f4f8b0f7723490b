"""Gates of a public model: what their forms are, the lengths that are measured, and the tables of both."""

import math
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from seerattn.gate import AttnGateConfig
from seerattn.hf.config import SeerConfig
from seerattn.report.render.markdown import cell_text
from seerattn.results.file import read_results
from seerattn.results.record import Result

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import forms_table
import public_gates

DIFFERENT = {
    "published-no-rope": {"rope": False},
    "published-q-max": {"q_pooling": ["max"]},
    "published-k-avg": {"k_pooling": ["avg"]},
    "published-k-maxmin": {"k_pooling": ["max", "min"]},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_variant_of_the_published_form_differs_in_what_its_name_says(name: str) -> None:
    published, variant = AttnGateConfig.paper().to_dict(), public_gates.FORMS[name].to_dict()
    assert {key: value for key, value in variant.items() if value != published[key]} == DIFFERENT[name]


def test_windows_are_as_long_as_samples_unless_lengths_are_named() -> None:
    given = {"model": Path("m"), "output": Path("o"), "context": 4096}
    assert public_gates.Options(**given).measured == (4096,)
    assert public_gates.Options(**given, measure_contexts=(2048, 8192)).measured == (2048, 8192)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gates") / "out"
    app = typer.Typer()
    app.command()(public_gates.main)
    arguments = ["--train", inputs["train"], "--calibrate", inputs["train"], "--books-test", inputs["books"]]
    arguments += ["--model", inputs["model"], "--output", output, "--smoke", "--jobs", "0"]
    done = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--forms", "published-no-rope"]])
    assert done.exit_code == 0, done.output
    return output


def test_recipe_trains_a_form_and_measures_it_at_every_length(finished: Path) -> None:
    rows = [r for r in read_results([finished / "results.jsonl"]) if r.what == "perplexity"]
    found = {(r.name, r.context, r.settings.get("policy"), "budgets" in r.settings) for r in rows}
    ways = [("dense", None, False), ("published-no-rope", "top_k", True), ("published-no-rope", "equal_top_k", False)]
    assert found == {(name, length, *way) for length in (256, 512) for name, *way in ways} and len(rows) == len(found)
    # One window of each of two documents, whose first token is not predicted.
    assert {(r.context, r.n) for r in rows} == {(256, 2 * 255), (512, 2 * 511)}
    gates = SeerConfig.from_pretrained(str(finished / "gates" / "published-no-rope"))
    assert gates.gate["rope"] is False and gates.budgets is not None


def result(name: str, context: int, loss: float, density: float | None = None, **more: object) -> Result:
    """A perplexity of two documents of 100 tokens, with this loss a token and twice that."""
    samples = {"documents": [0, 1], "losses": [100 * loss, 200 * loss], "tokens": [100, 100]}
    about = {"model": "m", "text": "books-test", "context": context, "unit": "tokens", "n": 200, "cell": {}}
    kinds = {"dense": "dense", "streaming": "static"}
    method = name if name in kinds else "gate"
    about |= {"method": method, "kind": kinds.get(name, "learned"), "density": density, "realised_density": density}
    return Result(what="perplexity", name=name, value=math.exp(1.5 * loss), samples=samples, **about | more)


def test_tables_tell_what_each_form_loses_beside_dense_attention_of_the_same_length() -> None:
    rows = [result("dense", 2048, 1.0), result("dense", 8192, 0.5)]
    rows += [result("published", 2048, 1.02, 0.2), result("published-no-rope", 2048, 1.04, 0.2)]
    rows += [result("published", 8192, 0.5, 0.2), result("published", 8192, 0.49, 0.2, settings={"budgets": "b"})]
    rows += [result("published-k-avg", 8192, 0.54, 0.1, realised_density=0.15), result("streaming", 2048, 1.1, 0.2)]
    rope = forms_table.rope(rows)
    cells = {line.name: dict(zip([c.name for c in rope.columns], map(cell_text, line.cells))) for line in rope.lines}

    def told(ratio_of_losses: float) -> str:
        return f"{100 * (math.exp(ratio_of_losses) - 1):+.1f}"

    at = "2k at 0.2, equal heads"
    assert [cells[name]["gate RoPE"] for name in ("published", "published-no-rope")] == ["on", "off"]
    assert cells["published"][at].startswith(told(1.5 * 0.02)) and cells["published-no-rope"][at].startswith(told(0.06))
    assert cells["streaming"][at].startswith(told(0.15)) and cells["streaming"]["8k at 0.2, equal heads"] == ""
    assert cells["published"]["8k at 0.2, equal heads"].startswith("+0.0")
    assert cells["published"]["8k at 0.2, budgets"].startswith(told(-0.015))
    assert cells["published-no-rope"]["8k at 0.1, budgets"] == ""
    pooled = {line.name: list(map(cell_text, line.cells)) for line in forms_table.poolings(rows).lines}
    assert pooled["published"][:2] == ["avg", "max+min+avg"] and pooled["published-q-max"][:2] == ["max", "max+min+avg"]
    # What came out at another density says so.
    assert next(cell for cell in pooled["published-k-avg"][2:] if cell).startswith(told(0.06))
    assert any(cell.endswith("at 0.150") for cell in pooled["published-k-avg"])
    by_target = [(line.name, *map(cell_text, line.cells[:2])) for line in forms_table.targets(rows).lines]
    assert ("published", "max:inf", "1 x 1") in by_target
