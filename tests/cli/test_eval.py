"""`seerattn eval`: experiments from files and flags, results that are only added to, and mistakes in a sentence."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from tiny_corpus import write_models_and_gates

from seerattn.cli import main
from seerattn.eval.tasks.retrieval import RetrievalJob
from seerattn.hf.config import save_settings
from seerattn.methods.head_rules import HeadRules
from seerattn.results import significance
from seerattn.results.file import read_results
from seerattn.results.maps import BlockMaps
from seerattn.selection import TopK

ASSETS = Path(__file__).parents[2] / "assets"
SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
RULE = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}
SMALL = {"block_q": 16, "block_k": 16}
EXPERIMENT = {
    "model": "model",
    "contexts": [300],
    "densities": [0.6],
    "methods": [
        "dense",
        {"method": "streaming", **SMALL},
        {"method": "vertical_slash", "name": "slash", **SMALL},
        {"method": "gate", "name": "mine", "gates": "gates-of-model"},
    ],
    "tasks": [
        {"task": "perplexity", "data": "docs.jsonl"},
        {"task": "passkey", "data": "docs.jsonl", "n": 2, "depths": [0.2, 0.8]},
    ],
    "batch": 2,
    "tuning_windows": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, gates for both, plans good and bad, and documents."""
    folder = tmp_path_factory.mktemp("eval")
    write_models_and_gates(folder)
    HeadRules("minference", SIZES | {"layers": 3}, [[RULE] * 4] * 3, {}).save(folder / "other-plan.json")
    # Sizes of their own in every head: heads that grow together change the density in large steps.
    rules = [
        [RULE | {"columns": 100 + 23 * i, "offsets": 800 + 57 * i} for i in heads] for heads in (range(4), range(4, 8))
    ]
    HeadRules("minference", SIZES, rules, {}).save(folder / "plan.json")
    (folder / "damaged.json").write_text('{"plan": 1, "method"')
    (folder / "empty.jsonl").write_text("")
    shutil.copytree(folder / "gates-of-model", folder / "cut-gates")
    weights = folder / "cut-gates" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def command(*args: str) -> int:
    """Runs `seerattn` and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    return stop.value.code


def run(folder: Path, experiment: dict | str, *args: str) -> int:
    """Writes an experiment into the folder and runs `seerattn eval` on it."""
    path = folder / "experiment.yaml"
    path.write_text(experiment if isinstance(experiment, str) else yaml.safe_dump(experiment))
    try:
        return command("eval", "--config", str(path), "--device", "cpu", *args)
    finally:
        path.unlink()


def flags(folder: Path, *args: str) -> int:
    """Runs `seerattn eval` on the model and documents, with ``@`` for the folder."""
    base = ("--model", "@model", "--data", "@docs.jsonl", "--device", "cpu")
    return command("eval", *(arg.replace("@", f"{folder}/") for arg in (*base, *args)))


def test_eval_writes_results_that_a_second_run_only_adds_to(folder, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    assert run(folder, EXPERIMENT, "--output", str(output)) == 0
    rows = read_results([output])
    found = [(r.what, r.line) for r in rows if r.what in ("perplexity", "accuracy")]
    lines = ["dense", "streaming 16", "slash 16", "mine"]
    # One row of pass keys a depth.
    assert found == [("perplexity", line) for line in lines] + [("accuracy", line) for line in lines for _ in range(2)]
    assert {row.command for row in rows} == {rows[0].command} and rows[0].command.startswith("seerattn eval --config /")
    shown = capsys.readouterr()
    assert all(line in shown.out for line in lines) and str(output) in shown.err
    for row in rows:
        if row.what == "perplexity":
            assert f"{row.value:.2f}" in shown.out
    before = output.read_bytes()
    assert run(folder, EXPERIMENT, "--output", str(output)) == 0
    assert output.read_bytes() == before
    more = EXPERIMENT | {"densities": [0.6, 0.8]}
    assert run(folder, more, "--output", str(output), "--only", "slash", "--only", "perplexity") == 0
    after = output.read_bytes()
    added = read_results([output])[len(rows) :]
    assert after.startswith(before) and {(row.name, row.density) for row in added} == {("slash", 0.8)}


def test_eval_without_a_file_has_the_gates_that_are_given_oracle_and_streaming(folder, tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    args = ("--gates", "mine=@gates-of-model", "--contexts", "300,400", "--output", str(output))
    assert flags(folder, *args, "--densities", "0.5") == 0
    rows = [row for row in read_results([output]) if row.what != "setting"]
    found = [(r.context, r.line, r.density) for r in rows if r.what == "perplexity"]
    methods = [("dense", None), ("mine", 0.5), ("oracle", 0.5), ("streaming", 0.5)]
    assert found == [(context, *method) for context in (300, 400) for method in methods]
    before = output.read_bytes()
    assert flags(folder, *args, "--densities", "0.5,0.7") == 0
    after = output.read_bytes()
    added = [row for row in read_results([output]) if row.density == 0.7 and row.what != "setting"]
    # Perplexity, difference and time of three methods at two contexts.
    assert after.startswith(before) and len(added) == 3 * 3 * 2
    assert flags(folder, *args, "--densities", "0.7") == 0
    assert output.read_bytes() == after


def test_recall_and_retrieval_measure_every_method_with_and_without_dense_rows(folder, tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    maps = tmp_path / "maps.npz"
    asked = f"recall,maps={maps},heads=1:2 0:0,passkey,n=2,depths=0.5,key_value,n=2,depths=0.5"
    tasks = ("--tasks", asked, "--set", "last_rows_dense=0,1")
    args = ("--gates", "mine=@gates-of-model", "--contexts", "300", "--densities", "0.5", "--batch", "2")
    assert flags(folder, *args, *tasks, "--output", str(output)) == 0
    assert BlockMaps.load(maps).heads == [(1, 2), (0, 0)]
    rows = read_results([output])
    assert {r.line for r in rows if r.what == "target_recall"} == {"mine", "oracle", "streaming"}
    asked = {(r.cell["task"], r.line, r.settings.get("last_rows_dense")) for r in rows if r.what == "accuracy"}
    assert len(asked) == 2 * (1 + 3 * 2)


def test_limit_cuts_documents(folder, tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    assert run(folder, EXPERIMENT, "--output", str(output), "--limit", "1", "--only", "streaming") == 0
    rows = read_results([output])
    assert {row.n for row in rows if row.what == "perplexity"} == {299}
    assert {row.n for row in rows if row.what == "accuracy"} == {1}


def test_a_failed_cell_ends_with_exit_code_1_and_a_summary(folder, tmp_path, monkeypatch, capsys) -> None:
    output, real = tmp_path / "r.jsonl", RetrievalJob.measure

    def fails(self, model, choices, *args, **kwargs):
        if str(choices[0].method) == "slash":
            raise ValueError("the needle is lost")
        return real(self, model, choices, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalJob, "measure", fails)
        assert run(folder, EXPERIMENT, "--output", str(output)) == 1
    shown = capsys.readouterr()
    assert "ValueError: the needle is lost" in shown.out and "slash 0.6, passkey on docs at 300" in shown.out
    rows = read_results([output])
    assert [row.name for row in rows if row.what == "failure"] == ["slash"]
    # The others, also those after it, are there.
    assert {row.line for row in rows if row.what == "accuracy"} == {"dense", "streaming 16", "mine"}
    assert run(folder, EXPERIMENT, "--output", str(output)) == 0
    assert "slash 16" in {row.line for row in read_results([output]) if row.what == "accuracy"}


def test_an_unreachable_density_is_said_and_measured_at_the_nearest(folder, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    few = EXPERIMENT | {"densities": [0.05]}
    assert run(folder, few, "--output", str(output), "--only", "mine", "--only", "perplexity") == 0
    row = next(r for r in read_results([output]) if r.what == "perplexity" and r.method == "gate")
    # Of 5 blocks the diagonal and the first are kept: 9 of 15.
    assert (row.density, row.realised_density) == (0.05, pytest.approx(9 / 15))
    note = row.cell["note"]
    assert "0.05" in note and "mine" in note and note.endswith("0.600")
    assert note in " ".join(capsys.readouterr().err.split())


def test_dry_run_shows_the_cells_and_runs_nothing(folder, tmp_path, capsys) -> None:
    experiment = EXPERIMENT | {"last_rows_dense": [0, 2], "times": [0.5]}
    assert run(folder, experiment, "--output", str(tmp_path / "r.jsonl"), "--dry-run") == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    line = ["passkey", "docs", "300", "4", "slash", "training-free", "0.6", "0.5", "2", "4"]
    assert line in lines
    # In two tasks dense, and three methods at a density and a time, with and without dense rows.
    assert "26 cells" in shown.err and not list(tmp_path.iterdir())


def test_a_plan_of_the_model_is_compared_under_its_own_digest(folder, tmp_path) -> None:
    experiment = EXPERIMENT | {
        "methods": [{"method": "minference", "plan": "plan.json", **SMALL}],
        "tasks": EXPERIMENT["tasks"][:1],
    }
    assert run(folder, experiment, "--output", str(tmp_path / "r.jsonl")) == 0
    rows = read_results([tmp_path / "r.jsonl"])
    (row,) = [row for row in rows if row.what == "perplexity" and row.method == "minference"]
    assert row.settings["plan"] == HeadRules.load(folder / "plan.json").digest
    assert row.realised_density == pytest.approx(0.6, abs=0.01) and "note" not in row.cell


def test_gates_run_with_the_policy_that_was_saved_with_them(folder, tmp_path) -> None:
    gates, output = tmp_path / "gates", tmp_path / "r.jsonl"
    shutil.copytree(folder / "gates-of-model", gates)
    methods = ("--methods", f"gate,name=own,policy=saved,gates={gates}", "--contexts", "400", "--output", str(output))
    assert flags(folder, *methods) == 1
    assert [row.name for row in read_results([output]) if row.what == "failure"] == ["own"]
    save_settings(gates, policy=TopK(density=0.7).to_dict())
    assert flags(folder, *methods) == 0
    (own,) = [row for row in read_results([output]) if row.what == "perplexity" and row.name == "own"]
    assert own.density is None and own.settings["policy"] == "TopK"
    assert own.realised_density == pytest.approx((1 + 2 + 5 * 3) / 28)


def changed(**changes) -> dict:
    return EXPERIMENT | changes


def method(**values) -> dict:
    return changed(methods=[values])


def task(**values) -> dict:
    return changed(tasks=[values])


TEXT = {"task": "perplexity", "data": "docs.jsonl"}
# What is wrong, and the option or file that the sentence names.
BAD = {
    "no yaml": ("a: [", "YAML"),
    "no mapping": ("- a", "mapping"),
    "nested": ("[" * 100_000, "YAML"),
    "no such date": ("2020-13-45: 1", "YAML"),
    "no such truth": ("models: !!bool maybe", "YAML"),
    "a billion laughs": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "model: {model: *i}\nmethods: [dense]\ntasks: [perplexity]\n",
        "options among",
    ),
    "half a character": ('{"model": "\\ud800", "methods": ["dense"]}', "model"),
    "a key that is no text": (changed(model={"model": "model", 1: 2}), "model"),
    "not a number": (changed(densities=[float("nan")]), "densities"),
    "infinite batch": (changed(batch=float("inf")), "batch"),
    "endless number": (changed(batch=10**400), "batch"),
    "option of another kind": (method(method="streaming", block_q=[64]), "block_q"),
    "truth as a size": (method(method="streaming", block_q=True), "block_q"),
    "unknown key": (changed(magic=1), "magic"),
    "missing key": ({"methods": ["dense"]}, "model"),
    "density": (changed(densities=[1.5]), "densities"),
    "density word": (changed(densities=["few"]), "densities"),
    "time": (changed(times=[0]), "times"),
    "batch": (changed(batch=0), "batch"),
    "dense rows": (changed(last_rows_dense=[0.5]), "last_rows_dense"),
    "no model": (changed(model="./none"), "model"),
    "same names": (changed(methods=["oracle", "oracle"]), "methods"),
    "context": (changed(contexts=[2000]), "contexts"),
    "long context": (changed(contexts=[700]), "700"),
    "long context of a needle": (changed(contexts=[700], tasks=[EXPERIMENT["tasks"][1]]), "700"),
    "method": (changed(methods=["magic"]), "magic"),
    "oracle of no map": (method(method="oracle", target="sum"), "map"),
    "option": (method(method="streaming", magic=1), "magic"),
    "option's kind": (method(method="xattention", stride="wide"), "stride"),
    "no gates": (method(method="gate"), "gates"),
    "missing gates": (method(method="gate", gates="none"), "none"),
    "missing gates of a flag": (changed(gates=["none"]), "gates"),
    "other gates": (method(method="gate", gates="gates-of-other"), "gates"),
    "cut gates": (method(method="gate", gates="cut-gates"), "safetensors"),
    "policy": (method(method="gate", gates="gates-of-model", policy="magic"), "policy"),
    "no plan": (method(method="minference"), "plan"),
    "plan not wanted": (method(method="oracle", plan="p.json"), "plan"),
    "missing plan": (method(method="minference", plan="none.json"), "none.json"),
    "other plan": (method(method="minference", plan="other-plan.json"), "layers 3, not 2"),
    "damaged plan": (method(method="minference", plan="damaged.json"), "plan"),
    "task's option": (task(**TEXT, n=3), "n"),
    "no data": (task(task="perplexity", data="none.jsonl"), "data"),
    "no text to hide in": (task(task="passkey", data=["none.txt"]), "data"),
    "empty data": (task(task="perplexity", data="empty.jsonl"), "data"),
    "depths": (task(task="passkey", data="docs.jsonl", depths=[1.5]), "depths"),
}
# Found out where gates are loaded, with the model.
LOADS = ("cut gates",)


@pytest.mark.parametrize("name", BAD)
def test_eval_rejects_bad_experiments_in_a_sentence_before_it_loads_a_model(folder, tmp_path, capsys, name) -> None:
    experiment, named = BAD[name]
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        if name not in LOADS:
            patch.setattr("seerattn.hf.eval_model.read_model", None)
        assert run(folder, experiment, "--output", str(tmp_path / "r.jsonl")) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ") and named in error
    assert not list(tmp_path.iterdir()) and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--only", "magic"), "magic"),
        (("--device", "abacus"), "device"),
        (("--set", "impl=magic"), "impl"),
        (("--set", "magic=1"), "magic"),
        (("--densities", "few"), "densities"),
        (("--densities", "nan"), "densities"),
        (("--densities", "0"), "densities"),
        (("--contexts", "2000"), "contexts"),
        (("--gates", "./none"), "gates"),
        (("--gates", "mine=@gates-of-model"), "mine"),
        (("--methods", "streaming:sum:2"), "streaming:sum:2"),
        (("--tasks", "recall,maps=m.npz,heads=one"), "heads"),
        (("--tasks", "recall,maps=@docs.jsonl"), "maps"),
    ],
)
def test_eval_rejects_options_that_name_nothing(folder, tmp_path, capsys, option, named: str) -> None:
    option = [word.replace("@", f"{folder}/") for word in option]
    assert run(folder, EXPERIMENT, *option, "--output", str(tmp_path / "r.jsonl")) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ") and named in error and not list(tmp_path.iterdir())


def test_eval_refuses_a_file_that_is_not_its_own_before_it_loads_a_model(folder, tmp_path, capsys) -> None:
    output = tmp_path / "settings.json"
    output.write_text('{"lr": 1}')
    for name in ("perplexity", "passkey"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("seerattn.hf.eval_model.read_model", None)
            assert run(folder, EXPERIMENT, "--only", name, "--output", str(output)) == 2
        assert "output" in capsys.readouterr().err
        assert output.read_text() == '{"lr": 1}'


def test_report_command_names_what_it_wrote(folder, tmp_path, capsys) -> None:
    output, report = tmp_path / "r.jsonl", tmp_path / "report"
    assert flags(folder, "--contexts", "300", "--densities", "0.5", "--output", str(output)) == 0
    capsys.readouterr()
    assert command("report", str(output), "--output", str(report)) == 0
    written = set(report.iterdir())
    assert {path.name for path in written} >= {"report.html", "table.md", "perplexity.png", "perplexity.svg"}
    assert set(capsys.readouterr().out.split()) == set(map(str, written))


def test_the_quick_experiment_is_valid(capsys) -> None:
    arguments = ("--dry-run", "--device", "cpu", "--limit", "1")
    assert command("eval", "--config", "research/experiments/quick.yaml", *arguments) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pg19", "retrieval", "last_rows_dense", "time", "long", "recall"])
def test_experiments_of_published_tables_are_valid_with_their_text(name: str, tmp_path, capsys) -> None:
    """They name text that does not come with the project: a copy of the folders around them gets some."""
    assets = ASSETS.absolute()
    (tmp_path / "assets").symlink_to(assets)
    # One is of a model and gates that are made from the reference model, with plans of it.
    made = tmp_path / "outputs" / "yarn"
    shutil.copytree(assets / "reference-model", made / "runs" / "dense" / "model")
    config = made / "runs" / "dense" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32768}))
    for plan in ("minference-paper.json", "minference-repository.json"):
        (made / plan).symlink_to(assets / "reference-plans" / plan)
    experiment = tmp_path / "research" / "experiments" / f"{name}.yaml"
    experiment.parent.mkdir(parents=True)
    shutil.copy(f"research/experiments/{name}.yaml", experiment)
    # And gates that research/reference_gates.py and research/yarn.py make.
    for method in yaml.safe_load(experiment.read_text())["methods"]:
        place = isinstance(method, dict) and (experiment.parent / method.get("gates", ".")).resolve()
        if place and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(assets / "reference-gates" / "best")
    arguments = ("eval", "--config", str(experiment), "--dry-run", "--device", "cpu", "--limit", "1")
    assert command(*arguments) == 2 and "data" in capsys.readouterr().err
    book = gzip.decompress((assets / "books/evaluate/harte-from-sand-hill-to-pine.txt.gz").read_bytes()).decode()
    for file in ("books/test-000.jsonl.gz", "books/test-001.jsonl.gz", "proofs/test-000.jsonl.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(gzip.compress(json.dumps({"text": book}).encode()))
    assert command(*arguments) == 0
    assert "flexprefill 64" in capsys.readouterr().out


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


def tasks(*args: str) -> int:
    """Runs `seerattn eval` on the reference model."""
    return command("eval", "--model", str(ASSETS / "reference-model"), "--device", "cpu", *args)


def test_tasks_of_the_harness_have_scores_and_guards_with_their_densities(data_dir, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    args = ("--tasks", f"local_longbench2,longest=700,data_dir={data_dir}", "--output", str(output))
    gates = ("--methods", f"dense,gate,name=mine,gates={ASSETS / 'reference-gates' / 'best'}")
    assert tasks(*args, *gates, "--densities", "0.6,0.4") == 0
    rows = [row for row in read_results([output]) if row.what != "setting"]
    found = [(row.what, row.line, row.density) for row in rows]
    assert found == [
        ("task_score", "dense", None), ("task_score", "mine", 0.6), ("task_guard", "mine", 0.6),
        ("task_score", "mine", 0.4), ("task_guard", "mine", 0.4),
    ]  # fmt: skip
    assert rows[0].realised_density == 1 and rows[1].realised_density > rows[3].realised_density > 0.35
    shown = capsys.readouterr()
    assert shown.out.count("local_longbench2") == 2 and "differs" not in shown.out
    written = output.read_bytes()
    assert tasks(*args, *gates, "--densities", "0.4") == 0 and output.read_bytes() == written


def test_a_significant_loss_of_a_task_is_shown_and_the_run_goes_on(data_dir, monkeypatch, capsys) -> None:
    monkeypatch.setattr(significance, "LEVEL", 1.1)  # every difference is
    args = ("--tasks", f"local_longbench2,longest=700,data_dir={data_dir}", "--methods", "streaming")
    assert tasks(*args, "--densities", "0.3") == 0
    assert "differs" in capsys.readouterr().out


def test_tasks_that_have_data_are_measured_and_the_exit_code_is_1(data_dir, capsys) -> None:
    args = ("--tasks", f"local,longest=700,data_dir={data_dir}", "--limit", "1", "--methods", "dense")
    assert tasks(*args) == 1
    shown = capsys.readouterr()
    assert "acc" in shown.out and "Traceback" not in shown.err
    failed = [line for line in shown.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 7 and not any("longbench2" in line for line in failed)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--tasks", " , "), "tasks"),
        (("--tasks", "local,contexts=long"), "contexts"),
        (("--tasks", "local,contexts=100000"), "contexts"),
        (("--tasks", "local,longest=-1"), "longest"),
        (("--tasks", "local,data_dir=./none"), "data_dir"),
        (("--tasks", "local", "--methods", "oracle", "--densities", "2"), "densities"),
    ],
)
def test_tasks_of_the_harness_reject_bad_input_in_a_sentence_and_write_nothing(tmp_path, capsys, args, named) -> None:
    assert tasks(*args, "--output", str(tmp_path / "r.jsonl")) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ") and named in error
    assert not list(tmp_path.iterdir())


def test_many_keys_and_chains_of_variables_are_hidden(tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    args = ("--contexts", "900", "--methods", "dense", "--output", str(output))
    assert tasks(*args, "--tasks", "multi_key,n=1,depths=0.5,variable_tracking,n=1,depths=0.5,hops=3,chains=1") == 0
    cells = [row.cell for row in read_results([output]) if row.what == "accuracy"]
    assert [cell["task"] for cell in cells] == ["multi_key", "variable_tracking"]
    assert cells[0]["pairs"] == 32 and (cells[1]["chains"], cells[1]["hops"]) == (1, 3)
