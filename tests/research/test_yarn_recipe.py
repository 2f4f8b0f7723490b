"""The YaRN recipe: its plan, its tokens, its processes, and all of it on a tiny model."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from seerattn.data.text import read_documents
from seerattn.report import write_report
from seerattn.report.tables.finetuned import REFERENCE
from seerattn.results.environment import fingerprint
from seerattn.results.file import read_results

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import yarn


def options_of(inputs: dict[str, Path], output: Path, **changes: object) -> "yarn.Options":
    given = {"model": inputs["model"], "gates": inputs["gates"], "output": output, "train": (str(inputs["train"]),)}
    given |= {"books_test": (str(inputs["books"]),), "proofs_test": (str(inputs["proofs"]),)}
    return yarn.Options(**given | yarn.SMOKE | changes)


def test_runs_are_those_of_the_comparison(inputs: dict[str, Path], tmp_path: Path) -> None:
    runs = {run.name: run for run in yarn.make_runs(options_of(inputs, tmp_path, sparsities=(0.5, 0.8, 0.9)))}
    names = ["stretched", "dense", "after", "together-0.5", "together-0.8", "together-0.9", "annealed"]
    assert list(runs) == [*names, "together-0.9-whole", "together-0.9-every4"]
    assert runs["dense"].label == REFERENCE and runs["dense"].measured == runs["stretched"].measured == ()
    assert runs["after"].measured == runs["annealed"].measured == (0.5, 0.8, 0.9)
    assert runs["together-0.8"].measured == (0.8,) and runs["together-0.8"].target_share == 0.1
    assert (runs["together-0.9-whole"].target_share, runs["together-0.9-every4"].target_every) == (1.0, 4)
    # Each has a line of its own in the tables; those of one sparsity each share one.
    labels = [run.label for run in runs.values()]
    assert len(set(labels)) == len(labels) - 2


def test_tokens_hold_long_documents_alone_and_stand_in_for_the_text(inputs: dict[str, Path], tmp_path: Path) -> None:
    options = options_of(inputs, tmp_path, train_tokens=10**6)
    yarn.prepare(options)
    texts = [text for text in read_documents([inputs["train"]]) if len(text) >= 1024]
    corpus = yarn.load_corpus(tmp_path / "tokens", "train")
    assert sorted(corpus.lengths) == sorted(map(len, texts)) and len(texts) == 4
    books = yarn.documents_of(yarn.load_corpus(tmp_path / "tokens", "books-test"))
    assert [len(ids) for ids in books] == [1024, 1024]
    yarn.prepare(replace(options, train=("gone.jsonl",), books_test=(), proofs_test=()))
    assert np.array_equal(yarn.load_corpus(tmp_path / "tokens", "train").tokens, corpus.tokens)
    with pytest.raises(ValueError, match="use another folder"):
        yarn.prepare(replace(options, train_tokens=7))


def test_prepare_rejects_text_that_is_too_short(inputs: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "w1 " * 300}) + "\n")
    with pytest.raises(ValueError, match="proofs-test must hold a document of 1024 tokens"):
        yarn.prepare(options_of(inputs, tmp_path, proofs_test=(str(short),)))
    assert not (tmp_path / "tokens" / "about.json").exists()


def test_a_call_with_other_options_is_rejected(inputs: dict[str, Path], tmp_path: Path) -> None:
    yarn.check_settings(options_of(inputs, tmp_path))
    yarn.check_settings(options_of(inputs, tmp_path, train=(), micro_batch=2))
    with pytest.raises(ValueError, match=r"lr was 0.0003 and is 0.01"):
        yarn.check_settings(options_of(inputs, tmp_path, lr=0.01))
    with pytest.raises(typer.BadParameter, match=r"runs must be among stretched, .* got c"):
        yarn.choose(yarn.make_runs(options_of(inputs, tmp_path)), "dense,c")
    for wrong, message in (({"sparsities": (1.0,)}, "between 0 and 1"), ({"contexts": (3, 4)}, "must divide")):
        with pytest.raises(ValueError, match=message):
            options_of(inputs, tmp_path, **wrong)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe with some of its runs, in this process."""
    output = tmp_path_factory.mktemp("yarn")
    done = call(inputs, output)
    assert done.exit_code == 0, (done.output, done.exception)
    return output


def call(inputs: dict[str, Path], output: Path, *more: str):
    app = typer.Typer()
    app.command()(yarn.main)
    arguments = ["--train", inputs["train"], "--books-test", inputs["books"], "--proofs-test", inputs["proofs"]]
    arguments += ["--model", inputs["model"], "--gates", inputs["gates"], "--output", output, "--smoke", "--jobs", "0"]
    arguments += ["--runs", "stretched,dense,after,annealed", *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_recipe_trains_measures_and_collects_all_runs(finished: Path) -> None:
    results = read_results([finished / "results.jsonl"])
    found = {(r.what, r.cell["training"]["name"], r.text, r.context, r.density) for r in results}
    # Perplexity of two texts at two lengths and pass keys of one: dense, and at two sparsities where there are gates.
    for label, densities in (("not trained", (None,)), ("dense", (None,)), ("gates afterwards", (None, 0.5, 0.1))):
        for density in densities:
            for text in yarn.TEXTS:
                assert all(("perplexity", label, text, context, density) in found for context in (512, 1024))
            assert ("accuracy", label, "books-test", 1024, density) in found
    sparse = [r for r in results if r.what == "perplexity" and r.density == 0.1 and r.context == 1024]
    assert len(sparse) == 4 and all(r.realised_density < 0.25 for r in sparse)
    # 2 documents of 1024 tokens; windows of 512 predict 511 each.
    tokens = {(r.context, r.cell["windows"]): r.n for r in results if r.what == "perplexity"}
    assert tokens == {(512, 2): 4 * 511, (1024, 1): 2 * 1023}
    curves = [json.loads(line) for line in (finished / "curves.jsonl").read_text().splitlines()]
    assert [(c["arm"], c["step"]) for c in curves] == [(a, s) for a in ("dense", "after", "annealed") for s in (1, 2)]
    assert curves[2]["loss"] is None and curves[2]["gate_loss"] > 0


def test_gates_afterwards_belong_to_the_dense_model_and_yarn_is_in_its_config(finished: Path) -> None:
    results = read_results([finished / "results.jsonl"])
    weights = {r.cell["training"]["name"]: r.weights["model"] for r in results}
    assert weights["gates afterwards"] == weights["dense"] != weights["not trained"]
    config = AutoModelForCausalLM.from_pretrained(finished / "runs" / "dense" / "model").config
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 4
    assert config.max_position_embeddings == 4 * 512
    dense = {
        (r.text, r.context): r.value
        for r in results
        if (r.what, r.method, r.cell["training"]["name"]) == ("perplexity", "dense", "dense")
    }
    again = [r for r in results if (r.what, r.method) == ("perplexity", "dense")]
    again = [r for r in again if r.cell["training"]["name"] == "gates afterwards"]
    assert len(again) == 4 and all(r.value == dense[r.text, r.context] for r in again)


def test_results_make_a_report(finished: Path, tmp_path: Path) -> None:
    written = write_report([finished / "results.jsonl", finished / "curves.jsonl"], tmp_path)
    assert {"curves.png", "table.md"} <= {path.name for path in written}
    assert "| trained together, annealed |" in (tmp_path / "table.md").read_text()


def test_finished_runs_are_not_done_again(inputs: dict[str, Path], finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and "runs" in p.parts}
    text = (finished / "results.jsonl").read_text()
    assert call(inputs, finished).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before and (finished / "results.jsonl").read_text() == text
    assert call(inputs, finished, "--lr", "0.5").exit_code == 2


def test_every_run_tells_its_text_and_the_model_and_gates_that_it_began_with(
    inputs: dict[str, Path], finished: Path
) -> None:
    names = ("dense", "after", "annealed")
    facts = {name: json.loads((finished / "runs" / name / "run.json").read_text()) for name in names}
    corpus = yarn.load_corpus(finished / "tokens", "train")
    for run in facts.values():
        assert run["data"] == [str(inputs["train"])] and run["data_hash"] == corpus.fingerprint()
    start = [str(inputs["gates"]), fingerprint(inputs["gates"])]
    assert "gates" not in facts["dense"] and facts["after"]["gates"] == facts["annealed"]["gates"] == start
    assert facts["after"]["model"] == str(finished / "runs" / "dense" / "model")
    assert facts["dense"]["model"] == facts["annealed"]["model"] == str(inputs["model"])


def test_runs_in_processes_that_are_ended_at_the_limit_are_collected_and_continued(
    inputs: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "yarn"
    shutil.copytree(finished, output)
    (output / "finished" / "stretched").unlink()
    for name in ("results.jsonl", "curves.jsonl"):
        (output / name).unlink()
    ended = call(inputs, output, "--jobs", "2", "--time-limit", "0.5")
    assert ended.exit_code == 1 and "unfinished: stretched" in ended.output
    for name in ("results.jsonl", "curves.jsonl"):
        assert (output / name).read_text() == (finished / name).read_text()
    assert call(inputs, output, "--jobs", "2").exit_code == 0
    assert (output / "logs" / "stretched.txt").exists() and (output / "finished" / "stretched").exists()


def test_gates_afterwards_wait_for_the_dense_model(inputs: dict[str, Path], tmp_path: Path) -> None:
    options = options_of(inputs, tmp_path)
    jobs = {run.name: yarn.job_of(options, run) for run in yarn.make_runs(options)}
    assert {name for name, job in jobs.items() if not job.ready} == {"after"}
    (tmp_path / "runs" / "dense" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "dense" / "model" / "config.json").write_text("{}")
    assert jobs["after"].ready
