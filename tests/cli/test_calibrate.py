"""`seerattn calibrate`: what it saves with gates is what experiments use."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_corpus import write_models_and_gates

from seerattn.cli import main
from seerattn.results.file import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, gates for it and for another, and documents."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_models_and_gates(folder)
    return folder


@pytest.fixture
def gates(folder, tmp_path) -> Path:
    """A copy of gates to write into."""
    return Path(shutil.copytree(folder / "gates-of-model", tmp_path / "gates"))


BASE = ("--model", "@model", "--data", "@docs.jsonl", "--device", "cpu", "--contexts", "400")


def run(folder: Path, command: str, *args: str) -> int:
    """Runs a command on the model and documents, with ``@`` for the folder, and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([command, *(arg.replace("@", f"{folder}/") for arg in (*BASE, *args))])
    return stop.value.code


def config_of(gates: Path) -> dict:
    return json.loads((gates / "adapter_config.json").read_text())


def test_thresholds_are_saved_as_a_policy_that_an_experiment_can_use(folder, gates, tmp_path) -> None:
    asked = ("--gates", str(gates), "--density", "0.7")
    assert run(folder, "calibrate", *asked, "--dry-run") == 0
    assert config_of(gates)["policy"] is None
    assert run(folder, "calibrate", *asked, "--set", "per_head=false") == 0
    assert config_of(gates)["policy"]["policy"] == "Threshold"
    output = tmp_path / "r.jsonl"
    methods = ("--methods", f"gate,gates={gates},policy=saved", "--densities", "0.7")
    assert run(folder, "eval", *methods, "--output", str(output)) == 0
    own = next(r for r in read_results([output]) if r.method == "gate")
    assert own.settings["policy"] == "Threshold" and own.density is None and 0.5 < own.realised_density < 0.9


def test_thresholds_of_a_recall_are_checked_on_it(folder, gates, tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    assert run(folder, "calibrate", "--gates", str(gates), "--recall", "0.9", "--output", str(output)) == 0
    density, recall = read_results([output])
    assert (density.what, recall.what) == ("calibrated_density", "calibrated_recall")
    assert (recall.cell["goal"], recall.cell["goal_value"]) == ("recall", 0.9) and recall.value > 0.85
    assert config_of(gates)["policy"]["threshold"] and recall.text == "docs"


def test_budgets_are_saved_and_used_at_every_density(folder, gates, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    before = config_of(gates)
    where = ("--gates", str(gates), "--budgets", "--set", "ladder=0.5,0.7,0.9")
    assert run(folder, "calibrate", *where, "--dry-run") == 0
    assert config_of(gates) == before
    assert run(folder, "calibrate", *where, "--set", "gain=sum:1", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    values = config_of(gates)
    budgets = values.pop("budgets")
    assert (budgets["ladder"], budgets["lengths"], budgets["gain"]) == ([0.5, 0.7, 0.9], [400], "sum:1")
    before.pop("budgets")
    assert values == before
    rows = read_results([output])
    assert {(r.what, r.density, r.cell["heads"]) for r in rows} == {
        (what, density, heads)
        for what in ("budget_density", "budget_recall")
        for density in (0.5, 0.7, 0.9)
        for heads in ("calibrated", "equal")
    }
    assert all(f"{r.value:.4g}" in shown for r in rows)
    # Thresholds for all heads together now follow the budgets, one a head.
    assert run(folder, "calibrate", "--gates", str(gates), "--density", "0.7", "--set", "per_head=false") == 0
    values = config_of(gates)
    assert [len(row) for row in values["policy"]["threshold"]] == [4, 4] and values["budgets"] == budgets
    # So do experiments, down to the lowest rung.
    methods = ("--methods", f"gate,name=mine,gates={gates}", "--output", str(output))
    assert run(folder, "eval", *methods, "--densities", "0.7,0.4") == 0
    found = {row.density: row for row in read_results([output]) if row.what == "perplexity" and row.name == "mine"}
    assert len(found[0.7].settings["budgets"]) == 12 and abs(found[0.7].realised_density - 0.7) < 0.05
    assert found[0.4].settings["setting"] == 0.5 and "0.4" in found[0.4].cell["note"]


BAD = {
    "no goal": (("--gates", "@gates-of-model"), "density"),
    "two goals": (("--gates", "@gates-of-model", "--budgets", "--density", "0.5"), "density"),
    "density": (("--gates", "@gates-of-model", "--density", "1.5"), "density"),
    "density that is none": (("--gates", "@gates-of-model", "--density", "nan"), "density"),
    "recall": (("--gates", "@gates-of-model", "--recall", "0"), "recall"),
    "rungs": (("--gates", "@gates-of-model", "--budgets", "--set", "ladder=0.6,0.5"), "ladder"),
    "rung": (("--gates", "@gates-of-model", "--budgets", "--set", "ladder=0.5,1"), "ladder"),
    "low rungs": (("--gates", "@gates-of-model", "--budgets", "--set", "ladder=0.1,0.4"), "0.464"),
    "rungs of thresholds": (("--gates", "@gates-of-model", "--density", "0.5", "--set", "ladder=0.1"), "ladder"),
    "gain of thresholds": (("--gates", "@gates-of-model", "--density", "0.5", "--set", "gain=sum:1"), "gain"),
    "gain": (("--gates", "@gates-of-model", "--budgets", "--set", "gain=x"), "map"),
    "unreachable": (("--gates", "@gates-of-model", "--density", "0.1"), "0.464"),
    "no gates": (("--gates", "@none", "--density", "0.5"), "gates"),
    "other gates": (("--gates", "@gates-of-other", "--density", "0.5"), "gates"),
    "context": (("--gates", "@gates-of-model", "--density", "0.5", "--contexts", "2000"), "contexts"),
    "short documents": (("--gates", "@gates-of-model", "--density", "0.5", "--contexts", "700"), "700"),
    "one document": (("--gates", "@gates-of-model", "--density", "0.5", "--set", "max_docs=1"), "data"),
    "no data": (("--gates", "@gates-of-model", "--density", "0.5", "--data", "@none.jsonl"), "data"),
    "device": (("--gates", "@gates-of-model", "--density", "0.5", "--device", "abacus"), "device"),
}


@pytest.mark.parametrize("name", BAD)
def test_calibrate_rejects_bad_input_in_a_sentence_and_writes_nothing(folder, tmp_path, capsys, name: str) -> None:
    args, named = BAD[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(folder, "calibrate", *args, "--output", str(tmp_path / "r.jsonl")) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ") and named in error
    assert not list(tmp_path.iterdir())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_calibrate_refuses_a_file_that_is_not_its_own_before_it_loads_a_model(folder, tmp_path, capsys) -> None:
    output = tmp_path / "settings.json"
    output.write_text('{"lr": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattn.hf.eval_model.read_model", None)
        assert run(folder, "calibrate", "--gates", "@gates-of-model", "--density", "0.5", "--output", str(output)) == 2
    assert "output" in capsys.readouterr().err and output.read_text() == '{"lr": 1}'
