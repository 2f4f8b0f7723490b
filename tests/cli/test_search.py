"""`seerattn search`: plans that are made once, kept whole, and refused for anything else."""

import json
from pathlib import Path

import pytest
from tiny_corpus import tiny_tokenizer, write_documents
from tiny_models import tiny_model
from transformers import AutoConfig

from seerattn.cli import main
from seerattn.methods import methods
from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.methods.moa.spans import planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, another one, documents, and a plan in the official form."""
    folder = tmp_path_factory.mktemp("search")
    for name, overrides in (("model", {}), ("other", {"num_hidden_layers": 3})):
        tiny_model("llama", **overrides).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_documents(folder / "docs.jsonl", 450, 500, 550)
    write_documents(folder / "long.jsonl", 700, 750)
    layer = {str(head): ["vertical_and_slash", 1000, 6096, 0.5] for head in range(4)}
    (folder / "official.json").write_text(json.dumps([layer, layer]))
    (folder / "cut.json").write_text('{"plan": 1,')
    return folder


def run(folder: Path, method: str, *args: str) -> int:
    """Runs `seerattn search` with ``@`` for the folder and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["search", method, "--device", "cpu", *(arg.replace("@", f"{folder}/") for arg in args)])
    return stop.value.code


def options(**values) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def sentence(capsys) -> str:
    """The error, the last line on stderr behind the bars."""
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("seerattn: ")
    return error


MODEL = ("--model", "@model")
DATA = ("--data", "@docs.jsonl", *options(context=400, block_q=32, block_k=32))
SEARCH = (*MODEL, *DATA, *options(density=0.3))
MOA = (*MODEL, "--data", "@long.jsonl", *options(lengths="256,512", validation=320, samples=1))
STRIDES = (*MODEL, "--data", "@docs.jsonl", *options(context=400, windows=2, block=32))


def test_search_writes_a_plan_that_it_does_not_search_again(folder, tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "new" / "plan.json"
    assert run(folder, "minference", *SEARCH, "--output", str(output)) == 0
    model = describe_model(AutoConfig.from_pretrained(folder / "model"))
    plan = HeadRules.load(output, method="minference", model=model)
    assert plan.model["weights"] and [len(heads) for heads in plan.rules] == [4, 4]
    assert {name: plan.made[name] for name in ("variant", "density", "context", "seed", "block_k", "dtype")} == {
        "variant": "paper", "density": 0.3, "context": 400, "seed": 0, "block_k": 32, "dtype": "float32",
    }  # fmt: skip
    first = capsys.readouterr()
    assert f"density: {plan.made['found']['density']:g}" in first.out and str(output) in first.err

    def search(*args, **kwargs):
        raise AssertionError("searched again")

    monkeypatch.setattr(methods()["minference"].searches, "run", search)
    assert run(folder, "minference", *SEARCH, "--output", str(output)) == 0
    assert capsys.readouterr().out == first.out


def test_search_of_the_repository_needs_no_density(folder, tmp_path) -> None:
    output = tmp_path / "plan.json"
    assert run(folder, "minference", *MODEL, *DATA, *options(variant="repository"), "--output", str(output)) == 0
    plan = HeadRules.load(output)
    assert plan.made["density"] is None
    assert {rule["pattern"] for heads in plan.rules for rule in heads} == {"vertical_slash"}


@pytest.fixture(scope="module")
def plan_file(folder) -> Path:
    path = folder / "found.json"
    assert run(folder, "minference", *SEARCH, "--output", str(path)) == 0
    return path


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (options(density=0.5), "density 0.3, not 0.5"),
        (options(seed=3), "seed 0, not 3"),
        (("--max-docs", "1"), "data "),
        (("--dtype", "bfloat16"), "dtype float32, not bfloat16"),
        (("--model", "@other"), "layers 2, not 3"),
    ],
)
def test_search_refuses_a_file_of_other_settings(folder, plan_file, capsys, args, told) -> None:
    before = plan_file.read_bytes()
    assert run(folder, "minference", *SEARCH, *args, "--output", str(plan_file)) == 2
    assert told in sentence(capsys)
    assert plan_file.read_bytes() == before


def test_search_takes_over_an_official_plan_without_weights(folder, tmp_path, plan_file, capsys, monkeypatch) -> None:
    output, official = tmp_path / "plan.json", options(official="@official.json")
    monkeypatch.setattr("seerattn.hf.loading._check_weights", None)
    for _ in range(2):
        assert run(folder, "minference", *MODEL, *official, "--output", str(output)) == 0
    plan = HeadRules.load(output)
    assert plan.rules == [[{"pattern": "vertical_slash", "columns": 1000, "offsets": 6096}] * 4] * 2
    assert (plan.made["variant"], plan.made["source"]) == ("official", "official.json")
    namesake = tmp_path / "official.json"
    namesake.write_text((folder / "official.json").read_text().replace("6096", "100"))
    assert run(folder, "minference", *MODEL, *options(official=namesake), "--output", str(output)) == 2
    assert "content " in sentence(capsys)
    before = plan_file.read_bytes()
    assert run(folder, "minference", *MODEL, *official, "--output", str(plan_file)) == 2
    assert "variant paper, not official" in sentence(capsys)
    assert plan_file.read_bytes() == before


def test_search_of_thresholds_is_reused_and_refused_for_other_settings(folder, tmp_path, capsys) -> None:
    output = tmp_path / "plan.json"

    def strides(stride: int) -> int:
        return run(folder, "xattention", *STRIDES, *options(stride=stride), "--output", str(output))

    assert strides(8) == 0
    written = output.read_bytes()
    plan = HeadRules.load(output, method="xattention_profile")
    every = [rule["threshold"] for heads in plan.rules for rule in heads]
    assert f"least threshold: {plan.made['found']['least threshold']:g}" in capsys.readouterr().out
    assert 0 < min(every) <= max(every) <= 1
    assert strides(8) == 0
    assert strides(16) == 2
    assert "stride 8, not 16" in sentence(capsys)
    assert output.read_bytes() == written


def test_search_of_moa_is_not_made_again_and_refused_for_others(folder, tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "new" / "plan.json"
    args = (*MOA, *options(density=0.6), "--output", str(output))
    assert run(folder, "moa", *args) == 0
    plan = HeadRules.load(output, method="moa")
    shown = capsys.readouterr().out
    assert f"loss: {plan.made['found']['loss']:g}" in shown and "area density" in shown
    assert plan.made["lengths"] == [256, 512] and plan.made["samples"] == 1 and planned(plan)(0) is not None
    before = output.read_bytes()
    monkeypatch.setattr(methods()["moa"].searches, "run", None)
    assert run(folder, "moa", *args) == 0
    assert output.read_bytes() == before
    assert run(folder, "moa", *args, "--model", "@other") == 2
    assert "layers 2, not 3" in sentence(capsys)
    assert run(folder, "moa", *args, *options(density=0.7)) == 2
    assert "density 0.6, not 0.7" in sentence(capsys)
    assert output.read_bytes() == before and json.loads(before)["made"]["density"] == 0.6


# The method, what is wrong, and the option that the sentence names.
BAD = {
    "no such method": ("magic", SEARCH, "method"),
    "method that does not search": ("streaming", SEARCH, "method"),
    "no such option": ("minference", (*SEARCH, *options(magic=1)), "magic"),
    "nothing to search on": ("minference", MODEL, "data"),
    "both": ("minference", (*SEARCH, *options(official="@official.json")), "data"),
    "density": ("minference", (*MODEL, *DATA, *options(density=1.5)), "density"),
    "too sparse": ("minference", (*MODEL, *DATA, *options(density=0.05)), "density"),
    "density of the repository": ("minference", (*SEARCH, *options(variant="repository")), "density"),
    "windows": ("minference", (*SEARCH, *options(windows=99)), "windows"),
    "context": ("minference", (*SEARCH, *options(context=700)), "700"),
    "model": ("minference", ("--model", "@none", *DATA), "model"),
    "model of a plan": ("minference", ("--model", "@none", *options(official="@official.json")), "model"),
    "plan of another model": ("minference", ("--model", "@other", *options(official="@official.json")), "3 layers"),
    "plan that is none": ("minference", (*MODEL, *options(official="@cut.json")), "official"),
    "no plan": ("minference", (*MODEL, *options(official="@none.json")), "official"),
    "block size": ("minference", (*SEARCH, *options(block_k=48)), "block_k"),
    "bound of moa": ("moa", (*MOA, *options(density=0.05)), "density"),
    "lengths of moa": ("moa", (*MOA, *options(lengths=100)), "lengths"),
    "context of moa": ("moa", (*MOA, *options(lengths=640, validation=2048)), "contexts"),
    "model of moa": ("moa", (*MOA, "--model", "@nothing"), "model"),
    "text of moa": ("moa", (*MOA, "--data", "@none.jsonl"), "data"),
    "default lengths of moa": ("moa", (*MODEL, "--data", "@docs.jsonl"), "contexts"),
    "stride": ("xattention", (*STRIDES, *options(stride=24)), "stride"),
    "coverage": ("xattention", (*STRIDES, *options(coverage=0)), "coverage"),
}


@pytest.mark.parametrize("kind", BAD)
def test_search_reports_an_error_in_a_sentence_and_writes_nothing(folder, tmp_path, capsys, kind) -> None:
    method, args, named = BAD[kind]
    assert run(folder, method, *args, "--output", str(tmp_path / "plan.json")) == 2
    assert named in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_search_refuses_an_output_that_is_no_plan(folder, capsys) -> None:
    before = (folder / "cut.json").read_text()
    assert run(folder, "minference", *SEARCH, "--output", "@cut.json") == 2
    assert "output" in sentence(capsys)
    assert (folder / "cut.json").read_text() == before
