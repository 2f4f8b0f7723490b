"""Tasks of lm-evaluation-harness: keep-all is dense in every document, densities are counted, guards are honest."""

import gzip
import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import wonderwords
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattn.eval import tasks
from seerattn.eval.arms import DENSE, Arm, EvalModel
from seerattn.eval.harness import MiddleCutModel, cut_middle
from seerattn.eval.tasks import evaluate_tasks, load_tasks
from seerattn.hf.probe import PROBE_TOKENS
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.results.significance import guard
from seerattn.selection.policies import KeepAll, TopK

REFERENCE = str(Path(__file__).parents[2] / "assets" / "reference-model")
RULER = ["niah_single_1", "niah_multikey_2", "ruler_fwe"]
KEEP_ALL, SPARSE = Arm("streaming", KeepAll()), Arm("oracle", TopK(density=0.2), block_q=32, block_k=32)
TEXT = "the boat left a quiet harbour at dawn and nobody on the island saw where it went after that"
WORDS = TEXT.split()


def passage(words: int, seed: int) -> str:
    return " ".join(WORDS[(i * i + seed * i + seed) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def subject() -> EvalModel:
    """The reference model in double precision, in which no two tokens are a rounding error apart."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float64)
    return EvalModel(model, AutoTokenizer.from_pretrained(REFERENCE), name="reference")


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """Sixteen nouns instead of the millions of pairs that RULER sorts at its import, which take half a minute."""
    kinds = {kind: [f"{kind}{i}" for i in range(16)] for kind in ("nouns", "adjectives", "verbs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=kinds))
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Files of every local task, three documents each, the last one longer than the others."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [passage(words, seed) for seed, words in enumerate((90, 140, 420))]
    questions = [{"question": f"Where is {word}?", "answers": [word]} for word in ("boat", "island")]
    values = [f"{seed}f3-{seed}a" for seed in range(3)]
    records = {
        "longbench_v1_multi_news": [{"text": text, "answers": [text[:60]], "all_classes": None} for text in texts],
        "longbench_v1_multifieldqa_zh": [{"text": text, "input": "大学", "answers": ["厦门大学。"]} for text in texts],
        "longbench_v1_passage_retrieval_zh": [
            {"text": text, "input": "摘要", "answers": [f"段落{number}"]} for number, text in enumerate(texts)
        ],
        "longbench_v2_sample_under100k": [
            {"text": text, "question": "Who?", "choices": dict(zip("ABCD", WORDS[3:7])), "answer": "ADB"[number]}
            for number, text in enumerate(texts)
        ],
        "kv_retrieval_sample": [
            {"text": json.dumps(dict(zip(WORDS[3:6], values))), "key": WORDS[3 + number], "answers": [values[number]]}
            for number in range(3)
        ],
        "ruler_4096_niah_multikey_3": [
            {"text": f"{text} The uuid is: {value}. {text} The uuid is", "answers": [value]}
            for text, value in zip(texts, values)
        ],
        "nq_open_oracle": [{"text": text, "question": "who left", "answers": ["the boat"]} for text in texts],
        "xquad_en_squad_subset": [{"text": text, "qas": questions} for text in texts],
    }
    for stem, documents in records.items():
        with gzip.open(folder / f"{stem}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def shorten(loaded, tokens: int = 12):
    """The same tasks with short answers."""
    for one in loaded:
        if one.generated:
            one.task.set_config(key="generation_kwargs", value={"max_gen_toks": tokens}, update=True)
    return loaded


@pytest.fixture(scope="module")
def loaded(data_dir):
    found, missing = load_tasks(["local", *RULER], tokenizer=REFERENCE, data_dir=data_dir, lengths=[420], limit=2)
    assert not missing and len(found) == 8 + 3
    return shorten(found)


@pytest.fixture
def answered(monkeypatch):
    """Everything that models answer, and the prompts that they see, in order."""
    seen = SimpleNamespace(answers=[], prompts=[])

    def spy(name):
        inner = getattr(MiddleCutModel, name)

        def call(self, requests, disable_tqdm=True):
            found = inner(self, requests)
            seen.answers.append(found)
            return found

        monkeypatch.setattr(MiddleCutModel, name, call)

    for name in ("generate_until", "loglikelihood"):
        spy(name)
    return seen


def scores(rows: list[Result], what: str = "task_score") -> dict:
    return {(r.cell["task"], r.cell["metric"], r.selector): r for r in rows if r.what == what}


def test_keep_all_scores_and_answers_as_dense_does_in_every_document(subject, loaded, answered) -> None:
    rows = evaluate_tasks(subject, [KEEP_ALL, SPARSE], loaded, ResultsFile(None), context=500, batch=2)
    found = scores(rows)
    assert len(found) == 3 * len(loaded) and len(rows) == 5 * len(loaded)
    sparse_differs = 0
    for number, one in enumerate(loaded):
        [(metric, _)] = one.metrics
        dense, keep_all, sparse = (found[one.name, metric, arm] for arm in ("dense", "streaming", "oracle"))
        assert len(dense.samples["scores"]) == dense.n == len(one.chosen) == 2
        assert dense.samples == keep_all.samples and dense.value == keep_all.value
        assert keep_all.realised_density == dense.realised_density == 1 and sparse.realised_density < 1
        ours, theirs, others = answered.answers[3 * number : 3 * number + 3]
        if one.generated:
            assert ours == theirs
        else:
            ours, theirs, others = ([log_prob for log_prob, _ in found] for found in (ours, theirs, others))
            assert theirs == pytest.approx(ours, abs=1e-9)
        sparse_differs += ours != others
    assert sparse_differs > len(loaded) / 2, "what is compared must be able to differ"
    for row in rows:
        if row.what == "task_guard" and row.selector == "streaming":
            assert row.value == 0 and row.samples["p"] == [1.0] and "note" not in row.cell


@pytest.mark.parametrize("name", ["niah_single_1", "local_longbench2", "local_nq_open"])
def test_density_of_a_task_matches_the_blocks_of_its_prompts_run_one_by_one(subject, loaded, name, monkeypatch) -> None:
    prompts = []
    inner = subject.model.forward

    def forward(input_ids, attention_mask=None, **rest):
        if input_ids.shape[1] > PROBE_TOKENS:  # no decode step, and not the tokens that probe the model
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompts.extend(row[mask.bool()] for row, mask in zip(input_ids, kept))
        return inner(input_ids, attention_mask=attention_mask, **rest)

    [task] = [one for one in loaded if one.name == name]
    with monkeypatch.context() as patch:
        patch.setattr(subject.model, "forward", forward)
        rows = evaluate_tasks(subject, [SPARSE], [task], ResultsFile(None), context=500, batch=2)
    ours = prompts[len(prompts) // 2 :]  # the first half went through the dense model
    assert len(ours) == 2 and (len({len(ids) for ids in ours}) == 2 or name == "niah_single_1")
    with torch.inference_mode(), subject.observed(subject.selector(SPARSE)) as run:
        for ids in ours:
            subject.model(ids[None])
    found = scores(rows)[name, task.metrics[0][0], "oracle"]
    assert found.realised_density == pytest.approx(run.density(), rel=1e-12) and run.density() < 0.6


def test_prompts_that_are_too_long_lose_their_middle(subject, data_dir, monkeypatch) -> None:
    assert cut_middle(range(10), 5) == [0, 1, 7, 8, 9] and cut_middle(range(5), 5) == [0, 1, 2, 3, 4]
    names = ["local_nq_open", "local_longbench2"]
    found, _ = load_tasks(names, tokenizer=REFERENCE, data_dir=data_dir)
    seen = []
    inner = subject.model.forward

    def forward(input_ids, **rest):
        seen.extend([input_ids[0].tolist()] if input_ids.shape[1] > PROBE_TOKENS else [])
        return inner(input_ids, **rest)

    monkeypatch.setattr(subject.model, "forward", forward)
    evaluate_tasks(subject, [], shorten(found), ResultsFile(None), context=200)
    for one, room in zip(found, (200 - 12, 200)):
        document = one.task.eval_docs[2]
        whole = subject.tokenizer(one.task.doc_to_text(document))["input_ids"]
        assert len(whole) > 400
        assert whole[: room // 2] + whole[len(whole) - room // 2 :] in seen


def test_documents_are_made_at_each_length_and_are_the_same_whatever_else_is_loaded(subject) -> None:
    two, _ = load_tasks(RULER, tokenizer=REFERENCE, lengths=[320, 420], limit=3)
    one, _ = load_tasks(["ruler_fwe"], tokenizer=REFERENCE, lengths=[420], limit=3)
    assert [(task.name, task.length) for task in two] == list(itertools.product(RULER, (320, 420)))
    assert len({task.digest for task in two}) == 6
    rows = evaluate_tasks(subject, [], shorten(one, 4), ResultsFile(None), context=420)
    assert [(row.context, row.cell["metric"], row.n) for row in rows] == [(420, "420", 3)]
    beside, _ = load_tasks(RULER[1:], tokenizer=REFERENCE, lengths=[420], limit=3)
    assert beside[1].name == "ruler_fwe" and beside[1].digest == one[0].digest
    for task in two:
        for index in task.chosen:
            document = task.task.eval_docs[index]
            tokens = len(subject.tokenizer(document["input"])["input_ids"])
            assert task.length - 250 < tokens < task.length
            assert document["max_length"] == task.length


def test_finished_tasks_are_not_run_again_and_other_documents_are(subject, data_dir, tmp_path, monkeypatch) -> None:
    path = tmp_path / "r.jsonl"
    names = ["local_longbench2"]
    one, _ = load_tasks(names, tokenizer=REFERENCE, data_dir=data_dir, limit=1)
    two, _ = load_tasks(names, tokenizer=REFERENCE, data_dir=data_dir, limit=2)
    first = evaluate_tasks(subject, [SPARSE], one, ResultsFile(path), context=300)
    written = path.read_bytes()
    monkeypatch.setattr(tasks._Runner, "run", lambda *_: pytest.fail("ran again"))
    assert evaluate_tasks(subject, [SPARSE], one, ResultsFile(path), context=300) == first
    assert path.read_bytes() == written
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        evaluate_tasks(subject, [SPARSE], two, ResultsFile(path), context=300)


def row(values: list[float], value: float | None = None, stderr: float | None = None) -> Result:
    mean = float(np.mean(values)) if value is None else value
    return Result(
        what="task_score", value=mean, stderr=stderr, n=len(values), unit="documents", model="m", selector="oracle",
        context=100, text="t", cell={"task": "t", "metric": "acc"}, samples={"scores": values},
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_guard_matches_all_sign_flips_and_the_paired_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 3, (2, 9)) / 2.0 + rng.integers(0, 2) * 0.1
    found = guard(row(ours.tolist()), row(theirs.tolist()))
    gaps = ours - theirs
    means = [abs(np.mean(gaps * np.array(signs))) for signs in itertools.product((-1, 1), repeat=9)]
    expected = sum(mean >= abs(gaps.mean()) - 1e-12 for mean in means) / len(means)
    assert found.samples["p"][0] == pytest.approx(expected, abs=1e-12)
    assert found.value == pytest.approx(gaps.mean()) and found.what == "task_guard"
    assert found.stderr == pytest.approx(math.sqrt(((gaps - gaps.mean()) ** 2).sum() / 8 / 9))
    assert found.samples["dense"] == [pytest.approx(theirs.mean())]


def test_guard_warns_from_six_lost_documents_on_in_both_directions() -> None:
    for lost in (5, 6):
        dense, sparse = [1.0] * 20, [0.0] * lost + [1.0] * (20 - lost)
        note = guard(row(sparse), row(dense)).cell.get("note", "")
        assert note.startswith("significantly lower than dense") == (lost == 6)  # 2 / 2 ** 6 = .031
        note = guard(row(dense), row(sparse)).cell.get("note", "")
        assert note.startswith("significantly higher than dense") == (lost == 6)


def test_guard_of_scores_without_documents_is_a_z_test() -> None:
    dense, same = row([], 10.0, 0.3), row([], 10.9, 0.4)
    found = guard(same, dense)
    assert found.stderr == pytest.approx(0.5) and "note" not in found.cell
    assert found.samples["p"][0] == pytest.approx(0.0718606, abs=1e-6)  # z = 1.8, from a table
    assert "p 0.046" in guard(row([], 11.0, 0.4), dense).cell["note"]  # z = 2
    unknown = guard(row([], 11.0, None), dense)
    assert unknown.stderr is None and unknown.samples["p"] == [None] and "note" not in unknown.cell


def test_tasks_without_data_are_named_and_do_not_take_others_with_them(data_dir, tmp_path, capfd) -> None:
    kept = "kv_retrieval_sample.jsonl.gz"
    (tmp_path / kept).write_bytes((data_dir / kept).read_bytes())
    found, missing = load_tasks(["local", "niah_single_2"], tokenizer=REFERENCE, data_dir=tmp_path)
    assert [one.name for one in found] == ["local_kv_retrieval"] and len(missing) == 7 + 1
    assert "has no longbench_v1_multi_news with one of .jsonl.gz" in missing["local_multi_news"]
    assert missing["niah_single_2"].startswith("task niah_single_2 must have its data, got none: ")
    assert "nltk" not in "".join(capfd.readouterr())
    with pytest.raises(ValueError, match=r"task local_squad must have its data.*give its folder as data-dir"):
        load_tasks(["local_squad"], tokenizer=REFERENCE)


def test_load_tasks_rejects_unknown_names_and_folders(monkeypatch, tmp_path) -> None:
    import lm_eval.tasks

    # Reading all folders of the harness takes 17 s.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match=r"tasks must be tasks or groups of lm-evaluation-harness .*, got magic"):
        load_tasks(["local_squad", "magic"], tokenizer=REFERENCE)
    with pytest.raises(ValueError, match="data-dir must be a folder"):
        load_tasks(["local"], tokenizer=REFERENCE, data_dir=tmp_path / "none")


def test_evaluate_tasks_rejects_contexts_without_room_and_missing_templates(subject, data_dir) -> None:
    found, _ = load_tasks(["local_multi_news"], tokenizer=REFERENCE, data_dir=data_dir)
    found[0].task.set_config(key="generation_kwargs", value={"max_gen_toks": 512}, update=True)
    with pytest.raises(ValueError, match="context must hold local_multi_news and its answers of 512 tokens, got 512"):
        evaluate_tasks(subject, [DENSE], found, ResultsFile(None), context=512)
    with pytest.raises(ValueError, match="chat-template must be in the tokenizer"):
        evaluate_tasks(subject, [DENSE], found, ResultsFile(None), context=600, chat_template=True)
    made, _ = load_tasks(["ruler_fwe"], tokenizer=REFERENCE, lengths=[420], limit=1)
    with pytest.raises(ValueError, match="context must hold ruler_fwe at 420"):
        evaluate_tasks(subject, [DENSE], made, ResultsFile(None), context=400)


def test_the_harness_is_imported_by_need_and_its_absence_is_a_sentence(monkeypatch) -> None:
    code = "import sys, seerattn, seerattn.eval.tasks, seerattn.cli.evaluate; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'seerattn\[tasks\]'"):
        load_tasks(["local"], tokenizer=REFERENCE)


def test_filters_and_metrics_that_are_no_mean_keep_the_error_of_the_harness() -> None:
    values = {"f1,flexible": 0.6, "f1_stderr,flexible": 0.1, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    samples = [{"doc_id": 1 - i, "filter": "flexible", "f1": (i, 1)} for i in range(2)]
    samples += [{"doc_id": 1 - i, "filter": "none", "acc": float(i)} for i in range(2)]
    assert tasks._score("f1", "flexible", values, samples) == (0.6, 0.1, [])
    assert tasks._score("acc", "none", values, samples) == (0.5, 0.5, [1.0, 0.0])
