import gzip
import json
from pathlib import Path

import datasets
import pytest

from seerattn.cli import main
from seerattn.results import significance as guard
from seerattn.results.file import read_results

ASSETS = Path(__file__).parents[2] / "assets"
BASE = ("--model", str(ASSETS / "reference-model"), "--device", "cpu", "--context", "700")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Two documents, a question each with choices."""
    folder = tmp_path_factory.mktemp("data")
    text = " ".join(f"On day {day} the boat left the harbour." for day in range(120))
    asked = {"text": text, "question": "Who left?", "choices": {"A": "boat", "B": "day", "C": "we", "D": "I"}}
    with gzip.open(folder / "longbench_v2_sample_under100k.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(asked | {"answer": answer}) + "\n" for answer in "AB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def run(*args: str) -> int:
    """Runs `seerattn eval tasks` and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["eval", "tasks", *BASE, *args])
    return stop.value.code


def test_tasks_command_writes_scores_and_guards_with_their_densities(data_dir, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    args = ("--tasks", "local_longbench2", "--data-dir", str(data_dir), "--output", str(output))
    gates = ("--gates", f"mine={ASSETS / 'reference-gates' / 'best'}")
    assert run(*args, *gates, "--densities", "0.6,0.4") == 0
    rows = read_results([output])
    found = [(row.what, row.arm, row.density) for row in rows]
    assert found == [
        ("task_score", "dense", None), ("task_score", "mine", 0.6), ("task_guard", "mine", 0.6),
        ("task_score", "mine", 0.4), ("task_guard", "mine", 0.4),
    ]  # fmt: skip
    assert rows[0].realised_density == 1 and rows[1].realised_density > rows[3].realised_density > 0.35
    shown = capsys.readouterr()
    assert shown.out.count("local_longbench2 acc") == 3 and "significantly" not in shown.err
    written = output.read_bytes()
    assert run(*args, *gates, "--densities", "0.4") == 0 and output.read_bytes() == written


def test_tasks_command_warns_where_a_loss_is_significant_and_goes_on(data_dir, monkeypatch, capsys) -> None:
    monkeypatch.setattr(guard, "LEVEL", 1.1)  # every difference is
    args = ("--tasks", "local_longbench2", "--data-dir", str(data_dir), "--selectors", "streaming")
    assert run(*args, "--densities", "0.3") == 0
    assert "local_longbench2, streaming 0.3: significantly" in capsys.readouterr().err


def test_tasks_command_measures_what_has_data_and_exits_with_1(data_dir, capsys) -> None:
    assert run("--tasks", "local", "--data-dir", str(data_dir), "--limit", "1") == 1
    shown = capsys.readouterr()
    assert "local_longbench2 acc" in shown.out and "Traceback" not in shown.err
    assert shown.err.count("must have its data, got none") == 7


BAD = {
    "no data": (("--tasks", "local"), "give its folder as data-dir"),
    "no task": (("--tasks", " , "), "tasks must be"),
    "lengths": (("--tasks", "local", "--lengths", "long"), "lengths must be numbers"),
    "context": (("--tasks", "local", "--context", "100000"), "at most the model's 8192 tokens"),
    "density": (("--tasks", "local", "--selectors", "oracle", "--densities", "2"), "density must be in (0, 1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_tasks_command_rejects_bad_input_in_a_sentence_and_writes_nothing(tmp_path, capsys, name: str) -> None:
    args, message = BAD[name]
    assert run(*args, "--output", str(tmp_path / "r.jsonl")) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_needle_command_hides_many_keys_and_chains_of_variables(tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    args = ["eval", "needle", *BASE[:4], "--data", str(ASSETS / "books" / "evaluate"), "--contexts", "900", "--n", "1"]
    args += ["--depths", "0.5", "--selectors", "dense", "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--tasks", "multi_key,variable_tracking", "--hops", "3", "--chains", "1"])
    assert stop.value.code == 0
    cells = [row.cell for row in read_results([output]) if row.what == "accuracy"]
    assert [cell["task"] for cell in cells] == ["multi_key", "variable_tracking"]
    assert cells[0]["pairs"] == 32 and (cells[1]["chains"], cells[1]["hops"]) == (1, 3)
    with pytest.raises(SystemExit) as stop:
        main([*args, "--tasks", "multi_key,magic"])
    assert stop.value.code == 2
    assert "tasks must be among passkey, key_value, multi_key, variable_tracking" in capsys.readouterr().err
