"""Retrieval while question and answer are decoded, against a greedy reading of the unpatched model."""

from pathlib import Path

import pytest
import torch

from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.experiment import Experiment
from seerattn.eval.run import Runner
from seerattn.eval.tasks import retrieval
from seerattn.eval.tasks.retrieval import DecodingJob, Needle, answers, decoded_answers, read_documents
from seerattn.methods.gate import Gate
from seerattn.methods.oracle import Oracle
from seerattn.methods.quest import Quest
from seerattn.methods.streaming import Streaming
from seerattn.report.tables import retrieval as tables
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from tests.eval.test_retrieval import HAYSTACKS, Characters

CELL, TOKENS = Needle("key_value", 600, None, 3, pairs=2), (128, 1024)


@pytest.fixture(scope="module")
def job() -> DecodingJob:
    needles = {CELL: CELL.documents(Characters(), HAYSTACKS, 1)}
    return DecodingJob("key_value", "t", 600, [[1] * 600], needles=needles, decode_tokens=TOKENS)


def choice(method, tokens: int, model=None) -> Choice:
    return Choice(method, method.decoders(model), tokens, tokens, "tokens")


def test_what_is_decoded_densely_is_answered_as_in_one_call(model, job: DecodingJob) -> None:
    documents = job.needles[CELL]
    for document, expected in zip(documents, answers(model.model, documents)):
        start, stop = document.questions[-1], document.answers[-1][0]
        text = "".join(chr(32 + (i - 3) % 94) for i in document.input_ids[start:stop])
        assert text.startswith(" What is the value of") and text.endswith(" is")
        cache = read_documents(model.model, [document])
        assert cache.get_seq_length() == start
        (found,) = decoded_answers(model.model, [document], cache)
        assert found[::2] == expected[::2] and found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


def test_every_way_of_decoding_is_measured_at_its_tokens_beside_dense(model, job, gate_folders, tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    methods = [Oracle(), Quest(), Streaming(), Gate(gates=gate_folders[0])]
    choices = [choice(method, tokens, model) for method in methods for tokens in TOKENS]
    rows = job.measure(model, choices, ResultsFile(path))
    assert len(rows) == 2 * (1 + len(choices))
    dense, *sparse = [row for row in rows if row.what == "answer_log_prob"]
    assert dense.kind == "dense" and dense.realised_density is None
    for row in sparse:
        assert row.cell["phase"] == "decode" and row.cell["budget"] == "tokens" and row.density is None
        everything = row.cell["tokens"] == 1024
        assert (row.realised_density == 1) == everything
        assert (abs(row.value - dense.value) < 1e-3) == everything
        # 2 of 10 blocks, of 9 for questions that begin before the last one.
        assert everything or 0.2 <= row.realised_density <= 2 / 9
    again = job.measure(model, choices, ResultsFile(path))
    assert again == rows


def test_documents_that_are_decoded_together_answer_as_each_alone(model, gate_folders) -> None:
    cell = Needle("key_value", 600, None, 9, pairs=2)
    documents = cell.documents(Characters(), HAYSTACKS, 1)
    job = DecodingJob("key_value", "t", 600, [[1] * 600], needles={cell: documents}, decode_tokens=(128,))
    choices = [choice(method, 128, model) for method in (Quest(), Streaming(), Gate(gates=gate_folders[0]))]
    places = {(document.questions[-1], document.answers[-1]) for document in documents}
    assert 1 < len(places) < 9
    alone, together = (job.measure(model, choices, ResultsFile(None), batch=batch) for batch in (1, 5))
    for one, other in zip(alone, together, strict=True):
        assert (one.key, one.n, one.realised_density) == (other.key, other.n, pytest.approx(other.realised_density))
        if one.what == "accuracy":
            assert one.sampled("correct") == other.sampled("correct")
            assert one.sampled("depth") == other.sampled("depth")
            assert one.sampled("log_prob") == pytest.approx(other.sampled("log_prob"), abs=1e-4)


def test_finished_cells_are_not_decoded_again(model, job, monkeypatch) -> None:
    output = ResultsFile(None)
    first = job.measure(model, [choice(Streaming(), 128)], output)
    asked = []
    monkeypatch.setattr(retrieval, "decoded_answers", lambda *args: asked.extend(args[1]) or decoded_answers(*args))
    assert job.measure(model, [choice(Streaming(), 128)], output) == first and not asked
    job.measure(model, [choice(Streaming(), 128), choice(Quest(), 128)], output)
    assert len(asked) == 3


def test_an_experiment_measures_decoding_where_a_task_asks_for_it(model, job, tmp_path: Path) -> None:
    task = {"task": "key_value", "n": 1, "depths": (0.5,), "decode_tokens": (128, 256)}
    experiment = Experiment(model="tiny", methods=("dense", "streaming", "quest"), tasks=(task,), contexts=(600,))
    output = ResultsFile(tmp_path / "r.jsonl")
    runner = Runner(model, experiment, [job], output)
    assert [(str(cell.method), cell.budget, cell.asked) for cell in runner.cells] == [
        (name, "tokens", tokens) for name in ("streaming", "quest") for tokens in TOKENS
    ]
    outcomes = list(runner.run())
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    rows: list[Result] = list({row.key: row for outcome in outcomes for row in outcome.rows}.values())
    found = tables.tables(rows)
    assert [table.title.partition(":")[0] for table in found] == ["Retrieval", "Likelihood of answers"]
    for table in found:
        assert [column.name for column in table.columns] == ["1024", "128"]
        assert "by tokens that a decoded one may read" in table.title and DENSE.method.title in str(table)


@pytest.mark.parametrize(
    ("methods", "task"),
    [(("quest",), {"task": "key_value"}), (("a_shape",), {"task": "key_value", "decode_tokens": (128,)})],
)
def test_a_method_that_no_task_measures_is_rejected(methods, task) -> None:
    with pytest.raises(ValueError, match=f"got {methods[0]}, which chooses for"):
        Experiment(model="tiny", methods=methods, tasks=(task,))


def test_torch_counts_writes_while_documents_are_decoded(model, job) -> None:
    """In inference mode it does not, and every step would compare the keys of its cache."""
    document = job.needles[CELL][0]
    with torch.inference_mode(False):
        cache = read_documents(model.model, [document])
    assert not cache.layers[0].keys.is_inference()
