import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_corpus import write_models_and_gates

from seerattn.cli import main
from seerattn.eval import compare
from seerattn.methods.head_rules import Plan
from seerattn.results.file import read_results

SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
RULE = {"pattern": "vertical_slash", "columns": 100, "offsets": 800}
SMALL = {"block_q": 16, "block_k": 16}
RECIPE = {
    "models": ["model"],
    "contexts": [300],
    "densities": [0.6],
    "selectors": [
        "dense",
        {"selector": "streaming", **SMALL},
        {"selector": "vertical_slash", "name": "slash", **SMALL},
        {"selector": "gate", "name": "mine", "gates": "gates-of-model"},
    ],
    "tasks": [
        {"task": "perplexity", "data": "docs.jsonl"},
        {"task": "passkey", "haystack": "docs.jsonl", "n": 2, "depths": [0.2, 0.8]},
    ],
    "batch": 2,
    "tuning_windows": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, gates for both, plans good and bad, and documents."""
    folder = tmp_path_factory.mktemp("compare")
    write_models_and_gates(folder)
    Plan("minference", SIZES | {"layers": 3}, [[RULE] * 4] * 3, {}).save(folder / "other-plan.json")
    # Sizes of their own in every head: heads that grow together change the density in large steps.
    rules = [
        [RULE | {"columns": 100 + 23 * i, "offsets": 800 + 57 * i} for i in heads] for heads in (range(4), range(4, 8))
    ]
    Plan("minference", SIZES, rules, {}).save(folder / "plan.json")
    (folder / "damaged.json").write_text('{"plan": 1, "method"')
    shutil.copytree(folder / "gates-of-model", folder / "cut-gates")
    weights = folder / "cut-gates" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def run(folder, recipe: dict | str, *args: str) -> int:
    """Writes a recipe into the folder, runs `seerattn compare` on it and returns the exit code."""
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--device", "cpu", *args])
    path.unlink()
    return stop.value.code


def test_compare_command_writes_results_that_a_second_run_only_adds_to(folder, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    assert run(folder, RECIPE, "--output", str(output)) == 0
    rows = read_results([output])
    found = [(r.what, r.arm) for r in rows if r.what in ("perplexity", "accuracy")]
    arms = ["dense", "streaming 16", "slash 16", "mine"]
    # One row of pass keys a depth.
    assert found == [("perplexity", arm) for arm in arms] + [("accuracy", arm) for arm in arms for _ in range(2)]
    assert {row.command for row in rows} == {rows[0].command} and rows[0].command.startswith("seerattn compare /")
    shown = capsys.readouterr().out
    for row in rows:
        if row.what == "perplexity":
            assert f"{row.value:.4g}" in shown
    before = output.read_bytes()
    assert run(folder, RECIPE, "--output", str(output)) == 0
    assert output.read_bytes() == before
    more = RECIPE | {"densities": [0.6, 0.8]}
    only = ("--only-selectors", "slash", "--only-tasks", "perplexity")
    assert run(folder, more, "--output", str(output), *only) == 0
    after = output.read_bytes()
    added = read_results([output])[len(rows) :]
    assert after.startswith(before) and {(row.selector, row.density) for row in added} == {("slash", 0.8)}


def test_limit_cuts_documents(folder, tmp_path) -> None:
    output = tmp_path / "r.jsonl"
    assert run(folder, RECIPE, "--output", str(output), "--limit", "1", "--only-selectors", "streaming") == 0
    rows = read_results([output])
    assert {row.n for row in rows if row.what == "perplexity"} == {299}
    assert {row.n for row in rows if row.what == "accuracy"} == {1}


def test_a_failed_cell_ends_with_exit_code_1_and_a_summary(folder, tmp_path, monkeypatch, capsys) -> None:
    output, real = tmp_path / "r.jsonl", compare.evaluate_needle

    def fails(subject, arms, *args, **kwargs):
        if getattr(getattr(arms[0], "family", None), "name", "") == "slash":
            raise ValueError("the needle is lost")
        return real(subject, arms, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "evaluate_needle", fails)
        assert run(folder, RECIPE, "--output", str(output)) == 1
    shown = capsys.readouterr()
    assert "ValueError: the needle is lost" in shown.out and "slash 0.6, passkey on docs at 300" in shown.out
    rows = read_results([output])
    assert [row.selector for row in rows if row.what == "failure"] == ["slash"]
    # The others, also those after it, are there.
    assert {row.arm for row in rows if row.what == "accuracy"} == {"dense", "streaming 16", "mine"}
    assert run(folder, RECIPE, "--output", str(output)) == 0
    assert "slash 16" in {row.arm for row in read_results([output]) if row.what == "accuracy"}


def test_an_unreachable_density_is_said_and_measured_at_the_nearest(folder, tmp_path, capsys) -> None:
    output = tmp_path / "r.jsonl"
    few = RECIPE | {"densities": [0.05]}
    assert run(folder, few, "--output", str(output), "--only-selectors", "mine", "--only-tasks", "perplexity") == 0
    # Of 5 blocks the diagonal and the first are kept: 9 of 15.
    sentence = "density 0.05 cannot be reached by mine at 300 tokens: the nearest is 0.600"
    assert sentence in " ".join(capsys.readouterr().err.split())
    row = next(r for r in read_results([output]) if r.what == "perplexity" and r.gates)
    assert (row.density, row.realised_density, row.cell["note"]) == (0.05, pytest.approx(9 / 15), sentence)


def test_dry_run_shows_the_cells_and_runs_nothing(folder, tmp_path, capsys) -> None:
    assert run(folder, RECIPE | {"last_rows_dense": [0, 2]}, "--output", str(tmp_path / "r.jsonl"), "--dry-run") == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["model", "passkey", "docs", "300", "4", "slash", "0.6", "0", "2", "2"] in lines
    assert "14 cells" in shown.err and not list(tmp_path.iterdir())


def test_two_models_each_use_their_own_gates(folder, tmp_path) -> None:
    gates = {"model": "gates-of-model", "second": "gates-of-other"}
    recipe = RECIPE | {
        "models": ["model", {"model": "other", "name": "second"}],
        "selectors": [{"selector": "gate", "name": "g", "gates": gates}],
        "tasks": RECIPE["tasks"][:1],
    }
    assert run(folder, recipe, "--output", str(tmp_path / "r.jsonl")) == 0
    rows = [row for row in read_results([tmp_path / "r.jsonl"]) if row.what == "perplexity" and row.gates]
    assert [row.model for row in rows] == ["model", "second"]
    assert len({row.weights["gates"] for row in rows}) == 2


def test_a_plan_of_the_model_is_compared_under_its_own_digest(folder, tmp_path) -> None:
    recipe = RECIPE | {
        "selectors": [{"selector": "minference", "plan": "plan.json", **SMALL}],
        "tasks": RECIPE["tasks"][:1],
    }
    assert run(folder, recipe, "--output", str(tmp_path / "r.jsonl")) == 0
    rows = read_results([tmp_path / "r.jsonl"])
    (row,) = [row for row in rows if row.what == "perplexity" and row.selector == "minference"]
    assert row.policy["plan"] == Plan.load(folder / "plan.json").digest
    assert row.realised_density == pytest.approx(0.6, abs=0.01) and "note" not in row.cell


def changed(**changes) -> dict:
    return RECIPE | changes


def selector(**values) -> dict:
    return changed(selectors=[values])


def task(**values) -> dict:
    return changed(tasks=[values])


TEXT = {"task": "perplexity", "data": "docs.jsonl"}
BAD = {
    "no yaml": ("a: [", "recipe must be YAML"),
    "no mapping": ("- a", "the recipe must be a mapping"),
    "nested": ("[" * 100_000, "recipe must be YAML"),
    "no such date": ("2020-13-45: 1", "recipe must be YAML"),
    "no such truth": ("models: !!bool maybe", "recipe must be YAML"),
    "a billion laughs": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "models: {model: *i}\nselectors: [dense]\ntasks: [perplexity]\n",
        "the recipe must have keys among",
    ),
    "half a character": ('{"models": ["\\ud800"], "selectors": ["dense"], "tasks": []}', "model must be text"),
    "a key that is no text": (changed(models=[{"model": "model", 1: 2}]), "keys among model, name"),
    "not a number": (changed(densities=[float("nan")]), "densities must be a number above 0"),
    "infinite batch": (changed(batch=float("inf")), "batch must be a whole number"),
    "endless number": (changed(batch=10**400), "batch must be a whole number"),
    "option of another kind": (selector(selector="streaming", block_q=[64]), "of the kind that they have by default"),
    "truth as a size": (selector(selector="streaming", block_q=True), "of the kind that they have by default"),
    "unknown key": (changed(magic=1), "keys among models, selectors"),
    "missing key": ({"models": ["model"]}, "got none of selectors, tasks"),
    "no budget": (changed(densities=[]), "must have densities or budgets"),
    "density": (changed(densities=[1.5]), "densities must be a number above 0 and at most 1, got 1.5"),
    "density word": (changed(densities=["few"]), "densities must be a number"),
    "time": (changed(budgets={"time": [0]}), "times must be a number above 0"),
    "batch": (changed(batch=0), "batch must be a whole number at least 1"),
    "dense rows": (changed(last_rows_dense=[0.5]), "last_rows_dense must be a whole number"),
    "no model": (changed(models=["./none"]), "model must be a folder or the name of a model on the Hub"),
    "same names": (changed(models=["model", "model"]), "models must be some with names of their own"),
    "context": (changed(contexts=[2000]), "contexts must be at most the 1024 tokens of model, got 2000"),
    "long context": (changed(contexts=[700]), "at least 700 tokens"),
    "selector": (changed(selectors=["magic"]), "selector must be one of dense, gate"),
    "oracle of no map": (selector(selector="oracle", target="sum"), "a map must be keys:power such as sum:2"),
    "option": (selector(selector="streaming", magic=1), "options of streaming must be among"),
    "option's kind": (selector(selector="xattention", stride="wide"), "options of xattention must be of the kind"),
    "no gates": (selector(selector="gate"), "gates must be a folder for the selector gate"),
    "missing gates": (selector(selector="gate", gates="none"), "gates must be a folder, got"),
    "other gates": (selector(selector="gate", gates="gates-of-other"), "gates must belong to the model"),
    "cut gates": (selector(selector="gate", gates="cut-gates"), "must be a whole safetensors file"),
    "policy": (selector(selector="gate", gates="gates-of-model", policy="magic"), "policy must be one of top_k"),
    "no plan": (selector(selector="minference"), "minference must have a plan, got none; make one with seerattn plan"),
    "plan not wanted": (selector(selector="oracle", plan="p.json"), "oracle must have no plan"),
    "missing plan": (selector(selector="minference", plan="none.json"), "plan of minference must be a file"),
    "other plan": (selector(selector="minference", plan="other-plan.json"), "layers 3, not 2"),
    "damaged plan": (selector(selector="minference", plan="damaged.json"), "plan must be a whole file"),
    "gates by model": (selector(selector="gate", gates={"x": "gates-of-model"}), "must be given for model"),
    "task": (task(task="magic"), "task must be one of perplexity"),
    "task's option": (task(**TEXT, n=3), "keys among task, text"),
    "no data": (task(task="perplexity", data="none.jsonl"), "data must exist"),
    "no haystack": (task(task="passkey", haystack=["none.txt"]), "haystack must exist"),
    "empty data": (task(task="perplexity", data=[]), "data must name a file"),
    "depths": (task(task="passkey", haystack="docs.jsonl", depths=[1.5]), "depths must be a number at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_compare_rejects_bad_recipes_in_a_sentence_before_it_loads_a_model(folder, tmp_path, capsys, name) -> None:
    recipe, message = BAD[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattn.cli.compare.load_eval_model", None)
        assert run(folder, recipe, "--output", str(tmp_path / "r.jsonl")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--only-selectors", "magic"), "only-selectors must be among dense, streaming, slash, mine, got magic"),
        (("--only-tasks", "recall"), "only-tasks must be among perplexity, passkey, got recall"),
        (("--device", "abacus"), "device must be"),
    ],
)
def test_compare_rejects_options_that_name_nothing(folder, tmp_path, capsys, option, message: str) -> None:
    assert run(folder, RECIPE, *option, "--output", str(tmp_path / "r.jsonl")) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_quick_recipe_is_valid(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "research/experiments/quick.yaml", "--dry-run", "--device", "cpu", "--limit", "1"])
    assert stop.value.code == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pg19", "retrieval", "dense_rows", "time", "long"])
def test_recipes_of_published_tables_are_valid_with_their_text(name: str, tmp_path, capsys) -> None:
    """They name text that does not come with the project: a copy of the folders around them gets some."""
    for folder in ("recipes", "assets"):
        (tmp_path / folder).symlink_to(Path(folder).absolute())
    # One is of a model that another recipe makes from the reference model, with plans of it.
    made, assets = tmp_path / "outputs" / "yarn", Path("assets").absolute()
    shutil.copytree(assets / "reference-model", made / "runs" / "dense" / "model")
    config = made / "runs" / "dense" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32768}))
    for plan in ("minference-paper.json", "minference-repository.json"):
        (made / plan).symlink_to(assets / "reference-plans" / plan)
    recipe = tmp_path / "own" / f"compare_{name}.yaml"
    recipe.parent.mkdir()
    shutil.copy(f"research/experiments/{name}.yaml", recipe)
    arguments = ["compare", str(recipe), "--dry-run", "--device", "cpu", "--limit", "1"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "must exist" in capsys.readouterr().err
    book = gzip.decompress(Path("assets/books/evaluate/harte-from-sand-hill-to-pine.txt.gz").read_bytes()).decode()
    for file in ("books/test-000.jsonl.gz", "books/test-001.jsonl.gz", "proofs/test-000.jsonl.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(gzip.compress(json.dumps({"text": book}).encode()))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "flexprefill 64" in capsys.readouterr().out
