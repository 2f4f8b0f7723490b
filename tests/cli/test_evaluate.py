import json
import shutil

import pytest
from tiny_corpus import write_models_and_gates

from seerattn.cli import main
from seerattn.results.file import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, gates for it and for another, and documents."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_models_and_gates(folder)
    (folder / "empty.jsonl").write_text("")
    return folder


def command(*args: str) -> int:
    """Runs `seerattn` and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    return stop.value.code


def run(folder, *args: str) -> int:
    return command("eval", *(arg.replace("@", f"{folder}/") for arg in args))


BASE = ("--model", "@model", "--data", "@docs.jsonl", "--device", "cpu")


def test_perplexity_command_writes_results_that_a_second_run_only_adds_to(folder, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    args = ("perplexity", *BASE, "--gates", "mine=@gates-of-model", "--contexts", "300,400", "--output", str(output))
    assert run(folder, *args, "--densities", "0.5") == 0
    rows = read_results([output])
    found = [(r.context, r.arm, r.density) for r in rows if r.what == "perplexity"]
    arms = [("dense", None), ("mine", 0.5), ("oracle", 0.5), ("streaming", 0.5)]
    assert found == [(context, *arm) for context in (300, 400) for arm in arms]
    shown = capsys.readouterr().out
    assert all(f"{r.value:.4g}" in shown for r in rows)
    before = output.read_bytes()
    assert run(folder, *args, "--densities", "0.5,0.7") == 0
    after = output.read_bytes()
    assert after.startswith(before) and len(read_results([output])) == len(rows) + 2 * 3 * 2
    assert run(folder, *args, "--densities", "0.7") == 0
    assert output.read_bytes() == after


def test_recall_and_needle_commands_measure_every_arm(folder, tmp_path) -> None:
    output, maps = tmp_path / "r.jsonl", tmp_path / "maps.npz"
    gates = ("--gates", "mine=@gates-of-model")
    assert run(folder, "recall", *BASE, *gates, "--contexts", "300", "--densities", "0.5", "--output", str(output),
        "--maps", str(maps), "--heads", "1:2") == 0  # fmt: skip
    assert run(folder, "needle", *BASE, *gates, "--contexts", "300", "--densities", "0.5", "--output", str(output),
        "--n", "2", "--depths", "0.5", "--last-rows-dense", "0,1", "--batch", "2") == 0  # fmt: skip
    rows = read_results([output])
    assert {r.arm for r in rows if r.what == "target_recall"} == {"mine", "oracle", "streaming"}
    asked = {(r.cell["task"], r.arm, (r.policy or {}).get("last_rows_dense")) for r in rows if r.what == "accuracy"}
    assert len(asked) == 2 * (1 + 3 * 2) and maps.exists()


def test_calibrate_command_saves_a_policy_that_perplexity_can_use(folder, tmp_path) -> None:
    gates = tmp_path / "gates"
    shutil.copytree(folder / "gates-of-model", gates)
    calibrate = ("calibrate", *BASE, "--gates", str(gates), "--context", "400", "--density", "0.7")
    assert run(folder, *calibrate, "--dry-run") == 0
    assert json.loads((gates / "adapter_config.json").read_text())["policy"] is None
    assert run(folder, *calibrate, "--global") == 0
    assert json.loads((gates / "adapter_config.json").read_text())["policy"]["policy"] == "Threshold"
    output = tmp_path / "r.jsonl"
    assert run(folder, "perplexity", *BASE, "--gates", f"mine={gates}", "--selectors", "gate", "--contexts", "400",
        "--densities", "0.7", "--saved-policy", "--output", str(output)) == 0  # fmt: skip
    own = next(r for r in read_results([output]) if r.gates and r.density is None)
    assert own.policy["policy"] == "Threshold" and 0.5 < own.realised_density < 0.9


def test_calibrate_command_saves_budgets_that_every_density_uses(folder, tmp_path, capsys) -> None:
    gates, output = tmp_path / "gates", tmp_path / "r.jsonl"
    shutil.copytree(folder / "gates-of-model", gates)
    config = gates / "adapter_config.json"
    before = config.read_bytes()
    where = ("--gates", f"mine={gates}", "--context", "400")
    budgeted = ("calibrate", *BASE, *where, "--budgets", "--ladder", "0.5,0.7,0.9")
    assert run(folder, *budgeted, "--dry-run") == 0
    assert config.read_bytes() == before
    assert run(folder, *budgeted, "--gain", "sum:1", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    values = json.loads(config.read_text())
    budgets = values.pop("budgets")
    assert (budgets["ladder"], budgets["lengths"], budgets["gain"]) == ([0.5, 0.7, 0.9], [400], "sum:1")
    unchanged = json.loads(before)
    unchanged.pop("budgets")
    assert values == unchanged
    rows = read_results([output])
    assert {(r.what, r.density, r.cell["heads"]) for r in rows} == {
        (what, density, heads)
        for what in ("budget_density", "budget_recall")
        for density in (0.5, 0.7, 0.9)
        for heads in ("calibrated", "equal")
    }
    assert all(f"{r.value:.4g}" in shown for r in rows)
    # Thresholds for all heads together now follow the budgets, one a head.
    threshold = ("calibrate", *BASE, "--gates", str(gates), "--context", "400", "--density", "0.7", "--global")
    assert run(folder, *threshold) == 0
    values = json.loads(config.read_text())
    assert [len(row) for row in values["policy"]["threshold"]] == [4, 4] and values["budgets"] == budgets
    # A density below all rungs is refused with the way out.
    perplexity = ("perplexity", *BASE, "--gates", f"mine={gates}", "--selectors", "gate", "--contexts", "400")
    assert run(folder, *perplexity, "--densities", "0.7", "--output", str(output)) == 0
    row = next(r for r in read_results([output]) if r.what == "perplexity" and r.gates)
    assert len(row.cell["budgets"]) == 12 and abs(row.realised_density - 0.7) < 0.05
    assert run(folder, *perplexity, "--densities", "0.4") == 2
    assert "density must be 0.5 to 1" in capsys.readouterr().err


BAD = {
    "density": (("perplexity", *BASE, "--densities", "1.5"), "density must be in (0, 1]"),
    "density zero": (("needle", *BASE, "--densities", "0"), "density must be in (0, 1]"),
    "densities": (("perplexity", *BASE, "--densities", "few"), "densities must be numbers"),
    "selector": (("recall", *BASE, "--selectors", "magic"), "selectors must be among"),
    "oracle": (("recall", *BASE, "--selectors", "oracle:sum"), "a map must be keys:power such as sum:2"),
    "map of another": (("recall", *BASE, "--selectors", "streaming:sum:2"), "selectors must be among"),
    "context": (("perplexity", *BASE, "--contexts", "2000"), "at most the model's 1024 tokens"),
    "short documents": (("perplexity", *BASE, "--contexts", "700"), "at least 700 tokens"),
    "haystack": (("needle", *BASE, "--contexts", "700"), "a text of 700 tokens"),
    "no data": (("perplexity", "--model", "@model", "--data", "@none.jsonl", "--contexts", "300"), "data must exist"),
    "empty data": (("recall", "--model", "@model", "--data", "@empty.jsonl", "--contexts", "300"), "data must hold"),
    "no model": (("perplexity", "--model", "@none", "--data", "@docs.jsonl"), "model must be"),
    "no gates": (("perplexity", *BASE, "--gates", "@none"), "gates must be a folder"),
    "other gates": (("perplexity", *BASE, "--contexts", "300", "--gates", "@gates-of-other"), "gates must belong"),
    "gate selector": (("perplexity", *BASE, "--selectors", "gate"), "selectors must name gate"),
    "gates' name": (("perplexity", *BASE, "--gates", "oracle=@gates-of-model"), "names of their own"),
    "device": (("perplexity", *BASE, "--device", "abacus"), "device must be"),
    "impl": (("perplexity", *BASE, "--contexts", "300", "--impl", "magic"), "impl must be one of"),
    "depth": (("needle", *BASE, "--depths", "1.5"), "depths"),
    "heads": (("recall", *BASE, "--heads", "one"), "heads must be LAYER:HEAD"),
    "maps": (("recall", *BASE, "--maps", "@maps.npz"), "maps must have gates"),
    "no heads": (
        ("recall", *BASE, "--gates", "@gates-of-model", "--heads", "", "--maps", "@m.npz"),
        "heads must be LAYER",
    ),
    "other heads": (
        ("recall", *BASE, "--gates", "@gates-of-model", "--contexts", "300", "--heads", "0:99", "--maps", "@m.npz"),
        "heads must be among 4 heads",
    ),
    "maps over data": (
        ("recall", *BASE, "--gates", "@gates-of-model", "--maps", "@docs.jsonl"),
        "maps must be a new file or block maps",
    ),
    "no number": (("perplexity", *BASE, "--densities", "nan"), "densities must be at least 0 and finite"),
    "goal": (("calibrate", *BASE, "--gates", "@gates-of-model"), "one of budgets, density and target-recall"),
    "two goals": (
        ("calibrate", *BASE, "--gates", "@gates-of-model", "--budgets", "--density", "0.5"),
        "one of budgets, density and target-recall",
    ),
    "rungs": (
        ("calibrate", *BASE, "--gates", "@gates-of-model", "--budgets", "--ladder", "0.6,0.5"),
        "ladder must be densities above 0 and below 1, ascending",
    ),
    "low rungs": (
        ("calibrate", *BASE, "--gates", "@gates-of-model", "--context", "400", "--budgets", "--ladder", "0.1,0.4"),
        "ladder must exceed the density of the forced blocks, 0.464",
    ),
    "rungs of thresholds": (
        ("calibrate", *BASE, "--gates", "@gates-of-model", "--density", "0.5", "--ladder", "0.1"),
        "ladder and gain must come with budgets",
    ),
    "gain": (("calibrate", *BASE, "--gates", "@gates-of-model", "--budgets", "--gain", "x"), "a map must be"),
    "unreachable goal": (
        ("calibrate", *BASE, "--gates", "@gates-of-model", "--context", "400", "--density", "0.1"),
        "at least that of the forced blocks",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_eval_rejects_bad_input_in_a_sentence_and_writes_nothing(folder, tmp_path, capsys, name: str) -> None:
    args, message = BAD[name]
    before = sorted(folder.rglob("*"))
    assert run(folder, *args, "--output", str(tmp_path / "r.jsonl")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()) and sorted(folder.rglob("*")) == before


def test_report_command_names_what_it_wrote(folder, tmp_path, capsys) -> None:
    output, report = tmp_path / "r.jsonl", tmp_path / "report"
    assert run(folder, "perplexity", *BASE, "--contexts", "300", "--densities", "0.5", "--output", str(output)) == 0
    capsys.readouterr()
    assert command("report", str(output), "--output", str(report)) == 0
    written = {report / name for name in ("report.html", "table.md", "perplexity.png", "perplexity.svg")}
    assert set(report.iterdir()) == written
    assert set(capsys.readouterr().out.split()) == set(map(str, written))


@pytest.mark.parametrize("command", ["perplexity", "needle", "recall"])
def test_eval_refuses_a_file_that_is_not_its_own_before_it_loads_a_model(folder, tmp_path, capsys, command) -> None:
    output = tmp_path / "settings.json"
    output.write_text('{"lr": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattn.cli.evaluate.load_eval_model", None)
        assert run(folder, command, *BASE, "--output", str(output)) == 2
    assert "output must be a new file or results" in capsys.readouterr().err
    assert output.read_text() == '{"lr": 1}'
