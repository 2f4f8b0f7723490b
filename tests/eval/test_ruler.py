"""Documents of RULER: about the text that is named, and those that were kept are those that would be made."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from seerattn.eval.tasks import ruler
from seerattn.eval.tasks.harness import HarnessTask, load_tasks
from seerattn.eval.tasks.ruler import RulerDocuments
from seerattn.eval.tasks.task import Setup

ROOT = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "assets" / "reference-model")
BOOK = ROOT / "assets" / "books" / "evaluate" / "harte-from-sand-hill-to-pine.txt.gz"
ESSAYS = ("niah_single_2", "niah_multivalue")

pytestmark = pytest.mark.usefixtures("few_words")


def load(name: str, limit: int | None = 2, **options):
    found, missing = load_tasks(
        name, tokenizer=TOKENIZER, lengths=options.pop("lengths", [1300]), limit=limit, **options
    )
    assert not missing
    return found


def documents(name: str, **options) -> list[dict]:
    return [dict(one.task.eval_docs[index]) for one in load(name, **options) for index in one.chosen]


@pytest.mark.parametrize("name", ESSAYS)
def test_documents_about_a_book_are_its_words_with_facts_between_sentences(name: str) -> None:
    words = gzip.decompress(BOOK.read_bytes()).decode().split()
    for document in documents(name, essays=[str(BOOK)]):
        lines = document["input"].split("\n")
        facts = [f"is: {answer}." for answer in document["outputs"]]
        assert len(facts) == (4 if name == "niah_multivalue" else 1)
        body = lines[1]
        for fact in facts:
            assert body.count(fact) == 1
            start = body.rindex("One of the special magic", 0, body.index(fact))
            before, after = body[:start].rstrip(), body[body.index(fact) + len(fact) :].lstrip()
            assert not before or not after or before[-1] in ".?!"
            body = f"{before} {after}".strip()
        assert body.split() == words[: len(body.split())] and len(body.split()) > 300


def test_essays_are_asked_for_again_where_no_text_is_named() -> None:
    load("niah_single_2", essays=[str(BOOK)])
    _, missing = load_tasks("niah_single_2", tokenizer=TOKENIZER, lengths=[1300], limit=2)
    assert list(missing) == ["niah_single_2"]


def test_kept_documents_are_those_that_would_be_made_and_are_not_made_again(tmp_path, monkeypatch) -> None:
    options = {"essays": [str(BOOK)], "lengths": [320, 1300]}
    for name in ("niah_single_1", "niah_multivalue"):
        plain = documents(name, limit=3, **options)
        assert documents(name, limit=3, documents=tmp_path, **options) == plain
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(ruler, "read_documents", lambda sources: ["another text"])
    with pytest.raises(AssertionError):
        assert documents("niah_multivalue", limit=3, documents=tmp_path, **options) == plain
    monkeypatch.undo()
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(RulerDocuments, "keep", lambda *_: pytest.fail("made again"))
    assert documents("niah_multivalue", limit=3, documents=tmp_path, **options) == plain
    fewer = documents("niah_multivalue", limit=2, documents=tmp_path, **options)
    assert fewer == [*plain[:2], *plain[3:5]]
    assert {path: path.read_bytes() for path in written} == written
    with pytest.raises(pytest.fail.Exception, match="made again"):
        documents("niah_multivalue", limit=4, documents=tmp_path, **options)


def test_tasks_of_other_folders_keep_nothing(tmp_path) -> None:
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir()
    lines = [json.dumps({"text": "a b", "question": "who", "answers": ["b"]}) + "\n"] * 2
    (data / "nq_open_oracle.jsonl").write_text("".join(lines))
    load("local_nq_open", data_dir=data, documents=kept)
    assert not kept.exists()


def test_records_name_the_text_in_place_of_essays_of_tasks_that_have_some() -> None:
    setup = Setup(TOKENIZER, (1300,), limit=1, longest=1300)
    about = {"name": "niah_single_2", "essays": (str(BOOK),), "likelihood": True, "generate": 5}
    (job,) = HarnessTask(**about).jobs(setup)
    assert job.about == {"essays": "harte-from-sand-hill-to-pine", "generated": 5} and job.loaded.generated == 5
    assert [metric for metric, _ in job.metrics] == ["1300", "log_prob_per_token", "first_choice"]
    (job,) = HarnessTask(**about | {"name": "niah_single_1", "generate": 0}).jobs(setup)
    assert job.about == {} and [metric for metric, _ in job.metrics] == ["log_prob_per_token", "first_choice"]
    assert job.loaded.generated == 128


def test_essays_that_are_not_there_are_refused_before_a_model_is_loaded(tmp_path) -> None:
    with pytest.raises(ValueError, match="essays must exist, got"):
        HarnessTask(name="niah_single_2", essays=(str(tmp_path / "none.txt"),)).check()
