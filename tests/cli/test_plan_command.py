import json

import pytest
from tiny_corpus import tiny_tokenizer, write_documents
from tiny_models import tiny_model

from seerattn.cli import main
from seerattn.methods.described import describe_named
from seerattn.methods.head_rules import Plan
from seerattn.methods.minference import search as plans_minference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another one, documents, and a plan in the official form."""
    folder = tmp_path_factory.mktemp("plan")
    for name, overrides in (("model", {}), ("other", {"num_hidden_layers": 3})):
        tiny_model("llama", **overrides).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_documents(folder / "docs.jsonl", 450, 500, 550)
    layer = {str(head): ["vertical_and_slash", 1000, 6096, 0.5] for head in range(4)}
    (folder / "official.json").write_text(json.dumps([layer, layer]))
    (folder / "cut.json").write_text('{"plan": 1,')
    return folder


def run(folder, *args: str) -> int:
    """Runs `seerattn plan minference` and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(("plan", "minference", *(arg.replace("@", f"{folder}/") for arg in args)))
    return stop.value.code


def sentence(capsys) -> str:
    """The error, the last line on stderr behind the bars."""
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ")
    return error


MODEL = ("--model", "@model")
DATA = ("--data", "@docs.jsonl", "--device", "cpu", "--context", "400", "--block-q", "32", "--block-k", "32")
SEARCH = (*MODEL, *DATA, "--density", "0.3")


def test_plan_command_writes_a_plan_that_it_does_not_search_again(folder, tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "new" / "plan.json"
    assert run(folder, *SEARCH, "--output", str(output)) == 0
    plan = Plan.load(output, method="minference", model=describe_named(str(folder / "model")))
    assert plan.model["weights"] and [len(heads) for heads in plan.rules] == [4, 4]
    assert {name: plan.made[name] for name in ("variant", "density", "context", "seed", "block_k", "dtype")} == {
        "variant": "paper", "density": 0.3, "context": 400, "seed": 0, "block_k": 32, "dtype": "float32",
    }  # fmt: skip
    first = capsys.readouterr()
    assert f"density: {plan.made['found']['density']:g}" in first.out and str(output) in first.err

    def search(*args, **kwargs):
        raise AssertionError("searched again")

    monkeypatch.setattr(plans_minference, "search_plan", search)
    assert run(folder, *SEARCH, "--output", str(output)) == 0
    assert capsys.readouterr().out == first.out


def test_plan_command_of_the_repository_needs_no_density(folder, tmp_path) -> None:
    output = tmp_path / "plan.json"
    assert run(folder, *MODEL, *DATA, "--variant", "repository", "--output", str(output)) == 0
    plan = Plan.load(output)
    assert plan.made["density"] is None
    assert {rule["pattern"] for heads in plan.rules for rule in heads} == {"vertical_slash"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--density", "0.5"), "with density 0.3, not 0.5; name another file"),
        (("--seed", "3"), "with seed 0, not 3"),
        (("--max-docs", "1"), "with data "),
        (("--dtype", "bfloat16"), "with dtype float32, not bfloat16"),
        (("--model", "@other"), "one for layers 2, not 3; weights "),
    ],
)
def test_plan_command_refuses_a_file_of_other_settings(folder, plan_file, capsys, args, message) -> None:
    before = plan_file.read_bytes()
    assert run(folder, *SEARCH, *args, "--output", str(plan_file)) == 2
    assert message in sentence(capsys)
    assert plan_file.read_bytes() == before


@pytest.fixture(scope="module")
def plan_file(folder):
    path = folder / "found.json"
    assert run(folder, *SEARCH, "--output", str(path)) == 0
    return path


def test_plan_command_imports_an_official_plan(folder, tmp_path, plan_file, capsys) -> None:
    output = tmp_path / "plan.json"
    for _ in range(2):
        assert run(folder, *MODEL, "--import", "@official.json", "--output", str(output)) == 0
    plan = Plan.load(output)
    assert plan.rules == [[{"pattern": "vertical_slash", "columns": 1000, "offsets": 6096}] * 4] * 2
    assert (plan.made["variant"], plan.made["source"]) == ("official", "official.json")
    namesake = tmp_path / "official.json"
    namesake.write_text((folder / "official.json").read_text().replace("6096", "100"))
    assert run(folder, *MODEL, "--import", str(namesake), "--output", str(output)) == 2
    assert "with content " in capsys.readouterr().err
    before = plan_file.read_bytes()
    assert run(folder, *MODEL, "--import", "@official.json", "--output", str(plan_file)) == 2
    assert "with variant paper, not official" in capsys.readouterr().err
    assert plan_file.read_bytes() == before


BAD = {
    "nothing to search on": (MODEL, "either data or import must be given, got none"),
    "both": ((*SEARCH, "--import", "@official.json"), "either data or import must be given, got both"),
    "density": ((*MODEL, *DATA, "--density", "1.5"), "density must be in (0, 1), got 1.5"),
    "too sparse": ((*MODEL, *DATA, "--density", "0.05"), "density must be at least that of the blocks"),
    "density of the repository": ((*SEARCH, "--variant", "repository"), "density must be left out"),
    "windows": ((*SEARCH, "--windows", "99"), "windows must be between 1 and the 3"),
    "context": ((*SEARCH, "--context", "700"), "at least 700 tokens"),
    "model": (("--model", "@none", *DATA), "model must be a folder"),
    "model of an import": (("--model", "@none", "--import", "@official.json"), "model must be a folder"),
    "official plan of another model": (("--model", "@other", "--import", "@official.json"), "the model's 3 layers"),
    "official plan that is none": ((*MODEL, "--import", "@cut.json"), "an official plan must be"),
    "no official plan": ((*MODEL, "--import", "@none.json"), "No such file"),
    "block size": ((*SEARCH, "--block-k", "48"), "block_k must be one of 16, 32, 64, 128, got 48"),
}


@pytest.mark.parametrize("kind", BAD)
def test_plan_command_reports_an_error_in_a_sentence_and_writes_nothing(folder, tmp_path, capsys, kind) -> None:
    args, message = BAD[kind]
    assert run(folder, *args, "--output", str(tmp_path / "plan.json")) == 2
    assert message in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_plan_command_refuses_an_output_that_is_no_plan(folder, capsys) -> None:
    before = (folder / "cut.json").read_text()
    assert run(folder, *SEARCH, "--output", "@cut.json") == 2
    assert "plan must be a whole file that a search wrote" in capsys.readouterr().err
    assert (folder / "cut.json").read_text() == before
