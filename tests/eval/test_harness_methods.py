"""Tasks of lm-evaluation-harness as an experiment: every method, at equal density, with a test beside dense."""

import gzip
import json
import random
import shutil
from dataclasses import MISSING
from pathlib import Path

import datasets
import pytest
from tiny_corpus import WORDS, tiny_tokenizer, topical_text
from tiny_models import tiny_model

from seerattn.data.windows import digest
from seerattn.eval.experiment import Experiment
from seerattn.eval.run import EQUAL_WITHIN, Runner, make_jobs
from seerattn.eval.tasks import harness_tasks
from seerattn.eval.tasks.harness import HarnessTask
from seerattn.eval.tasks.task import Setup
from seerattn.hf.eval_model import EvalModel
from seerattn.methods import make_method, methods
from seerattn.methods.method import Method
from seerattn.options import options_of
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.significance import LEVEL

DENSITY, DOCUMENTS = 0.5, 6
# Blocks small enough for a density to be near the goal on short text.
OPTIONS = {"block": 32, "stride": 8, "block_q": 16, "block_k": 16, "n_init": 16, "n_last": 16}
TASKS = {
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choices}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "tiny_answer": """
task: tiny_answer
dataset_path: json
dataset_kwargs: {data_files: {test: answers}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answers[0]}}"
process_results: !function scores.answers_found
metric_list:
  - {metric: found, aggregation: mean, higher_is_better: true}
generation_kwargs: {max_gen_toks: 8, do_sample: false, until: []}
metadata: {version: 1.0}
""",
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Tasks of words: which of four comes next, and whether any of some words is written; with six texts."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    shutil.copy(harness_tasks._LOCAL / "scores.py", folder)
    rng = random.Random(0)
    texts = [topical_text(380 + 15 * seed, seed) for seed in range(DOCUMENTS)]
    records = {
        "choices": [{"text": text, "choices": rng.sample(WORDS, 4), "answer": rng.randrange(4)} for text in texts],
        "answers": [{"text": text, "answers": rng.sample(WORDS, 40)} for text in texts],
    }
    for stem, documents in records.items():
        with gzip.open(folder / f"{stem}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(document) + "\n" for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(harness_tasks, "_LOCAL", folder)
        yield folder


@pytest.fixture(scope="module")
def model() -> EvalModel:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<4>"
    return EvalModel(tiny_model("llama"), tokenizer, name="tiny")


def all_methods(gates: list[Path]) -> list[Method]:
    """Every method that needs no plan, and gates."""
    found = []
    for id, of in methods().items():
        options = options_of(of)
        if any(field.default is MISSING for field, *_ in options.values()):
            continue
        method = make_method(id, {name: value for name, value in OPTIONS.items() if name in options})
        if method.budgets != ("tokens",):
            found.append(method)
    return [*found, *(make_method("gate", {"gates": folder}) for folder in gates)]


@pytest.mark.parametrize("task", TASKS)
def test_every_method_runs_a_task_at_equal_density_with_a_test_beside_dense(
    model, data_dir, gate_folders, tmp_path, task
) -> None:
    chosen = all_methods(gate_folders)
    experiment = Experiment(
        model="tiny", methods=chosen, tasks=(HarnessTask(name=task, data_dir=data_dir),), densities=DENSITY,
        tuning_windows=2,
    )  # fmt: skip
    (job,) = make_jobs(experiment, Setup(model.tokenizer, experiment.contexts, longest=1024))
    assert len(job.sequences) == DOCUMENTS
    path = tmp_path / "r.jsonl"
    runner = Runner(model, experiment, [job], ResultsFile(path))
    outcomes = list(runner.run())
    assert [o.failure for o in outcomes] == [None] * len(chosen)

    rows = read_results([path])
    score = {row.name: row for row in rows if row.what == "task_score"}
    beside = {row.name: row for row in rows if row.what == "task_guard"}
    sparse = {str(method) for method in chosen} - {"dense"}
    assert set(score) == {"dense", *sparse} and set(beside) == sparse
    dense, notes = score["dense"], {str(o.cell.method): o.note for o in outcomes}
    assert dense.n == DOCUMENTS and dense.realised_density == 1
    for method in chosen:
        name = str(method)
        row = score[name]
        assert (row.method, row.kind, row.context, row.n) == (method.id, method.kind, job.context, DOCUMENTS)
        if name == "dense":
            continue
        tuned = [one for one in rows if one.what == "setting" and one.name == name]
        assert tuned[-1].value == row.settings["setting"] and row.density == DENSITY
        assert {one.cell["tuned_on"] for one in tuned} <= {digest(job.sequences[:n]) for n in (2, DOCUMENTS)}
        off = abs(row.realised_density - DENSITY)
        if notes[name] and method.id != "blasst":
            # One more block in every row of the shortest prompt: half of what that changes.
            assert off <= 1 / (min(map(len, job.sequences)) // method.block_sizes[1] + 1)
        assert off <= EQUAL_WITHIN or notes[name], name
        guard = beside[name]
        assert guard.value == pytest.approx(row.value - dense.value) and guard.samples["dense"] == [dense.value]
        assert 0 < guard.samples["p"][0] <= 1 and guard.stderr is not None
        assert guard.samples["test"] == ["paired sign flips"]
        # What is noted of a density stands beside the score; a guard with a note is significant.
        assert score[name].cell.get("note") == notes[name]
        assert ("note" in guard.cell) == (guard.samples["p"][0] < LEVEL)
    # Whoever chooses by content meets it; whole blocks of every row, and maxima that every row has, may not.
    assert {"flexprefill", "vertical_slash", "xattention"} <= {name for name, note in notes.items() if note is None}
    assert any(row.samples["scores"] != dense.samples["scores"] for row in score.values())
    before = path.read_bytes()
    list(Runner(model, experiment, [job], ResultsFile(path)).run())
    assert path.read_bytes() == before
