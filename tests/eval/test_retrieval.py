from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from seerattn.data.retrieval import RetrievalDocument
from seerattn.eval.choice import DENSE, Choice, at_density
from seerattn.eval.tasks import retrieval
from seerattn.eval.tasks.retrieval import (
    KeyValue,
    MultiKey,
    Needle,
    PassKey,
    RetrievalJob,
    VariableTracking,
    answers,
)
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.streaming import Streaming
from seerattn.results.file import ResultsFile


class Characters:
    """A tokenizer of 94 characters, a token each."""

    bos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [3 + (ord(c) - 32) % 94 for c in text]


HAYSTACKS = [[3 + (7 * i) % 94 for i in range(3000)], [3 + (11 * i) % 94 for i in range(2000)], [5] * 10]


def document(ids: list[int], answer: int, depth: float = 0.5) -> RetrievalDocument:
    return RetrievalDocument(ids, [(len(ids) - answer, len(ids))], [depth], "passkey")


def test_answers_match_a_greedy_reading_and_fp64_log_probabilities() -> None:
    model = tiny_model("llama", torch.float64)
    prompt = torch.randint(3, 97, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    greedy = list(prompt)
    for _ in range(4):
        with torch.no_grad():
            greedy.append(int(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    wrong = greedy[:-1] + [3 + (greedy[-1] - 2) % 90]
    early = greedy[:-4] + [3 + (greedy[-4] - 2) % 90] + greedy[-3:]
    # The third asks for the last token alone, so the wrong one before it is part of the prompt.
    documents = [document(greedy, 4), document(wrong, 4), document(early, 1), document(greedy, 2, depth=0.2)]
    found = answers(model, documents, batch=3)
    assert [a.correct for a in found][:2] == [True, False] and found[3].correct and found[3].depth == 0.2
    for given, one in zip(found, documents):
        size = one.answers[0][1] - one.answers[0][0]
        ids = torch.tensor(one.input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - size, len(ids)))
        assert given.log_prob == pytest.approx(expected, abs=1e-4)


def test_needles_hide_the_answer_where_they_say_and_are_the_same_every_time() -> None:
    cell = Needle("passkey", 400, 0.25, 3, seed=5)
    made = cell.documents(Characters(), HAYSTACKS, 1)
    assert made == cell.documents(Characters(), HAYSTACKS, 1)
    assert made != Needle("passkey", 400, 0.25, 3, seed=6).documents(Characters(), HAYSTACKS, 1)
    for one in made:
        ((start, stop),) = one.answers
        assert len(one.input_ids) == stop == 400 and one.input_ids[0] == 1
        first = next(i for i in range(400) if one.input_ids[i : i + stop - start] == one.input_ids[start:stop])
        assert abs(first / 400 - 0.25) < 0.15
    assert len({tuple(one.input_ids) for one in made}) == 3


def test_needle_rejects_haystacks_that_are_all_too_short() -> None:
    with pytest.raises(ValueError, match="data"):
        Needle("key_value", 4000, None, 2).documents(Characters(), HAYSTACKS, 1)


@pytest.mark.parametrize(("task", "depth"), [("passkey", None), ("multi_key", 0.5)])
def test_needle_rejects_a_depth_that_its_task_does_not_have(task, depth) -> None:
    with pytest.raises(ValueError, match="depth"):
        Needle(task, 400, depth, 2)


def test_cells_are_told_apart_by_the_options_of_their_task_alone() -> None:
    assert Needle("key_value", 400, None, 2).cell == {"task": "key_value", "documents": 2, "pairs": 8}
    assert Needle("multi_key", 400, None, 2, pairs=5).cell == {"task": "multi_key", "documents": 2, "pairs": 5}
    assert Needle("multi_key", 400, None, 2).cell["pairs"] == 32
    tracking = Needle("variable_tracking", 400, None, 2, hops=3).cell
    assert tracking == {"task": "variable_tracking", "documents": 2, "chains": 2, "hops": 3}


def test_cells_of_a_task_are_its_depths_or_as_many_documents_at_random_depths() -> None:
    assert PassKey(n=5, depths=(0.2, 0.8), seed=3).needles(400) == [Needle("passkey", 400, d, 5, 3) for d in (0.2, 0.8)]
    assert PassKey(n=5, depths=(0.2,)).needles(400, 2) == [Needle("passkey", 400, 0.2, 2)]
    assert KeyValue(n=5, depths=(0.2, 0.8), pairs=2).needles(400) == [Needle("key_value", 400, None, 10, pairs=2)]
    assert MultiKey().needles(400) == [Needle("multi_key", 400, None, 100)]
    tracking = VariableTracking(n=2, depths=(0.5,), chains=1, hops=3)
    assert tracking.needles(400, 1) == [Needle("variable_tracking", 400, None, 1, chains=1, hops=3)]


def job_of(cells: list[Needle]) -> RetrievalJob:
    needles = {cell: cell.documents(Characters(), HAYSTACKS, 1) for cell in cells}
    return RetrievalJob("needles", "t", max(cell.length for cell in cells), [], needles=needles)


def streaming(model: EvalModel, *densities: float, rows: tuple[int, ...] = (0,)) -> list[Choice]:
    return [at_density(model, Streaming(), d, last_rows_dense=n) for n in rows for d in densities]


def test_accuracy_and_log_prob_match_the_answers_of_the_dense_model(model) -> None:
    cells = [
        Needle("passkey", 300, 0.5, 4),
        Needle("key_value", 350, None, 3, pairs=2),
        Needle("multi_key", 410, None, 2, pairs=3),
        Needle("variable_tracking", 420, None, 2, chains=1, hops=2),
    ]
    choices = [DENSE, *streaming(model, 1.0, 0.2, rows=(0, 2))]
    rows = job_of(cells).measure(model, choices, ResultsFile(None), batch=2)
    assert len(rows) == 2 * len(cells) * len(choices)
    for cell in cells:
        given = answers(model.model, cell.documents(Characters(), HAYSTACKS, 1))
        found = [r for r in rows if r.context == cell.length]
        for what, value in (
            ("accuracy", sum(a.correct for a in given) / len(given)),
            ("answer_log_prob", sum(a.log_prob for a in given) / len(given)),
        ):
            dense, *sparse = [r for r in found if r.what == what]
            assert dense.value == pytest.approx(value, rel=1e-5) and dense.n == cell.n
            for r in sparse:
                kept_all = r.density == 1.0
                assert (r.realised_density == 1) == kept_all
                if what == "answer_log_prob":
                    assert (abs(r.value - value) < 1e-3) == kept_all
    # Dense last rows show the question everything, so they cost blocks and change the answers.
    few, few_dense_rows = (
        next(r for r in rows if r.what == "answer_log_prob" and r.density == 0.2 and r.settings["last_rows_dense"] == n)
        for n in (0, 2)
    )
    assert few_dense_rows.realised_density > few.realised_density and few_dense_rows.value != few.value


def test_finished_cells_are_not_asked_again(model, monkeypatch, tmp_path) -> None:
    choices, job = [DENSE, *streaming(model, 0.2)], job_of([Needle("passkey", 300, d, 2) for d in (0.2, 0.8)])
    path = tmp_path / "r.jsonl"
    first = job.measure(model, choices, ResultsFile(path))
    monkeypatch.setattr(retrieval, "answers", lambda *_, **__: pytest.fail("asked again"))
    assert job.measure(model, choices, ResultsFile(path)) == first


def test_all_tokens_of_an_answer_must_be_right() -> None:
    ids = list(range(3, 23))

    def logits_of(right: int):
        """A model that is right about the last so many tokens alone."""

        def call(input_ids, use_cache, logits_to_keep):
            logits = torch.zeros(*input_ids.shape, 40)
            for position in range(len(ids) - 1 - right, len(ids) - 1):
                logits[:, position, ids[position + 1]] = 5.0
            return SimpleNamespace(logits=logits[:, -logits_to_keep:])

        return call

    for right, expected in ((5, True), (4, False), (1, False)):
        fixed = type("Fixed", (), {"device": "cpu", "__call__": staticmethod(logits_of(right))})()
        assert answers(fixed, [document(ids, 5)])[0].correct is expected
