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
from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattn.eval.choice import DENSE, Choice, at_density
from seerattn.eval.tasks import harness
from seerattn.eval.tasks.harness import HarnessJob, HarnessTask, LoadedTask, UnavailableJob, load_tasks
from seerattn.eval.tasks.harness_model import MiddleCutModel, cut_middle
from seerattn.eval.tasks.task import Setup
from seerattn.hf.eval_model import EvalModel
from seerattn.hf.probe import PROBE_TOKENS
from seerattn.methods.oracle import Oracle
from seerattn.methods.streaming import Streaming
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.results.significance import guard

REFERENCE = str(Path(__file__).parents[2] / "assets" / "reference-model")
TOKENIZER = AutoTokenizer.from_pretrained(REFERENCE)
RULER = ["niah_single_1", "niah_multikey_2", "ruler_fwe"]
TEXT = "the boat left a quiet harbour at dawn and nobody on the island saw where it went after that"
WORDS = TEXT.split()

pytestmark = pytest.mark.usefixtures("few_words")


def passage(words: int, seed: int) -> str:
    return " ".join(WORDS[(i * i + seed * i + seed) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def model() -> EvalModel:
    """The reference model in double precision, in which no two tokens are a rounding error apart."""
    return EvalModel(AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float64), TOKENIZER, name="reference")


@pytest.fixture(scope="module")
def keep_all(model) -> Choice:
    return at_density(model, Streaming(), 1.0)


@pytest.fixture(scope="module")
def sparse(model) -> Choice:
    return at_density(model, Oracle(block_q=32, block_k=32), 0.2)


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


def load(*names: str, **options) -> tuple[list[LoadedTask], dict[str, str]]:
    """Tasks of several names, one after the other."""
    found, missing = [], {}
    for name in names:
        some, gone = load_tasks(name, tokenizer=TOKENIZER, **options)
        found, missing = found + some, missing | gone
    return found, missing


@pytest.fixture(scope="module")
def loaded(data_dir) -> list[LoadedTask]:
    found, missing = load("local", *RULER, data_dir=data_dir, lengths=[420], limit=2)
    assert not missing and len(found) == 8 + 3
    return shorten(found)


def measured(
    model: EvalModel, choices: list[Choice], loaded: list[LoadedTask], output: ResultsFile, *, context: int, **options
) -> list[Result]:
    return [
        row
        for one in loaded
        for row in HarnessJob(one.name, one.name, context, [], loaded=one).measure(model, choices, output, **options)
    ]


@pytest.fixture
def answered(monkeypatch):
    """Everything that models answer, and the prompts that they see, in order."""
    seen = SimpleNamespace(answers=[], prompts=[])

    def watch(name):
        inner = getattr(MiddleCutModel, name)

        def call(self, requests, disable_tqdm=True):
            found = inner(self, requests)
            seen.answers.append(found)
            return found

        monkeypatch.setattr(MiddleCutModel, name, call)

    for name in ("generate_until", "loglikelihood"):
        watch(name)
    return seen


def scores(rows: list[Result], what: str = "task_score") -> dict:
    return {(r.cell["task"], r.cell["metric"], r.method): r for r in rows if r.what == what}


def test_the_tokenizer_stays_as_it_was_and_what_is_changed_later_counts(model, loaded) -> None:
    def seen() -> tuple:
        return TOKENIZER.pad_token, TOKENIZER.model_max_length, TOKENIZER.padding_side, TOKENIZER.chat_template

    def harnessed() -> MiddleCutModel:
        return MiddleCutModel(model.model, TOKENIZER, max_length=500, batch_size=1)

    before = seen()
    measured(model, [DENSE], loaded[:1], ResultsFile(None), context=500)
    first = harnessed().tokenizer
    assert seen() == before and first is not TOKENIZER and first is harnessed().tokenizer
    asked = [{"role": "user", "content": TEXT}]
    try:
        TOKENIZER.chat_template = "{% for message in messages %}Q: {{ message.content }}{% endfor %}"
        assert harnessed().apply_chat_template(asked) == f"Q: {TEXT}"
    finally:
        TOKENIZER.chat_template = before[-1]


def test_keep_all_scores_and_answers_as_dense_does_in_every_document(model, keep_all, sparse, loaded, answered) -> None:
    rows = measured(model, [DENSE, keep_all, sparse], loaded, ResultsFile(None), context=500, batch=2)
    found = scores(rows)
    assert len(found) == 3 * len(loaded) and len(rows) == 5 * len(loaded)
    sparse_differs = 0
    for number, one in enumerate(loaded):
        [(metric, _)] = one.metrics
        dense, all_kept, few = (found[one.name, metric, method] for method in ("dense", "streaming", "oracle"))
        assert len(dense.samples["scores"]) == dense.n == len(one.chosen) == 2
        assert dense.samples == all_kept.samples and dense.value == all_kept.value
        assert all_kept.realised_density == dense.realised_density == 1 and few.realised_density < 1
        ours, theirs, others = answered.answers[3 * number : 3 * number + 3]
        if one.generated:
            assert ours == theirs
        else:
            ours, theirs, others = ([log_prob for log_prob, _ in found] for found in (ours, theirs, others))
            assert theirs == pytest.approx(ours, abs=1e-9)
        sparse_differs += ours != others
    assert sparse_differs > len(loaded) / 2, "what is compared must be able to differ"
    for row in rows:
        if row.what == "task_guard" and row.method == "streaming":
            assert row.value == 0 and row.samples["p"] == [1.0] and "note" not in row.cell


@pytest.mark.parametrize("name", ["niah_single_1", "local_longbench2", "local_nq_open"])
def test_density_of_a_task_matches_the_blocks_of_its_prompts_run_one_by_one(
    model, sparse, loaded, name, monkeypatch
) -> None:
    prompts = []
    inner = model.model.forward

    def forward(input_ids, attention_mask=None, **rest):
        if input_ids.shape[1] > PROBE_TOKENS:  # no decode step, and not the tokens that probe the model
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompts.extend(row[mask.bool()] for row, mask in zip(input_ids, kept))
        return inner(input_ids, attention_mask=attention_mask, **rest)

    [task] = [one for one in loaded if one.name == name]
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", forward)
        rows = measured(model, [sparse], [task], ResultsFile(None), context=500, batch=2)
    ours = prompts[len(prompts) // 2 :]  # the first half went through the dense model
    assert len(ours) == 2 and (len({len(ids) for ids in ours}) == 2 or name == "niah_single_1")
    with torch.inference_mode(), sparse.on(model) as run:
        for ids in ours:
            model.model(ids[None])
    found = scores(rows)[name, task.metrics[0][0], "oracle"]
    assert found.realised_density == pytest.approx(run.density(), rel=1e-12) and run.density() < 0.6


def test_prompts_that_are_too_long_lose_their_middle(model, data_dir, monkeypatch) -> None:
    assert cut_middle(range(10), 5) == [0, 1, 7, 8, 9] and cut_middle(range(5), 5) == [0, 1, 2, 3, 4]
    found, _ = load("local_nq_open", "local_longbench2", data_dir=data_dir)
    seen = []
    inner = model.model.forward

    def forward(input_ids, **rest):
        seen.extend([input_ids[0].tolist()] if input_ids.shape[1] > PROBE_TOKENS else [])
        return inner(input_ids, **rest)

    monkeypatch.setattr(model.model, "forward", forward)
    measured(model, [DENSE], shorten(found), ResultsFile(None), context=200)
    for one, room in zip(found, (200 - 12, 200)):
        document = one.task.eval_docs[2]
        whole = TOKENIZER(one.task.doc_to_text(document))["input_ids"]
        assert len(whole) > 400
        assert whole[: room // 2] + whole[len(whole) - room // 2 :] in seen


def test_documents_are_made_at_each_length_and_are_the_same_whatever_else_is_loaded(model) -> None:
    two, _ = load(*RULER, lengths=[320, 420], limit=3)
    one, _ = load("ruler_fwe", lengths=[420], limit=3)
    assert [(task.name, task.length) for task in two] == list(itertools.product(RULER, (320, 420)))
    assert len({task.digest for task in two}) == 6
    rows = measured(model, [DENSE], shorten(one, 4), ResultsFile(None), context=420)
    assert [(row.context, row.cell["metric"], row.n) for row in rows] == [(420, "420", 3)]
    beside, _ = load(*RULER[1:], lengths=[420], limit=3)
    assert beside[1].name == "ruler_fwe" and beside[1].digest == one[0].digest
    for task in two:
        for index in task.chosen:
            document = task.task.eval_docs[index]
            tokens = len(TOKENIZER(document["input"])["input_ids"])
            assert task.length - 250 < tokens < task.length
            assert document["max_length"] == task.length


def test_likelihoods_at_each_length_are_those_of_its_own_documents_in_a_plain_forward(model) -> None:
    task = HarnessTask(name="ruler_fwe", likelihood=True, generate=0)
    for job in task.jobs(Setup(TOKENIZER, (320, 420), limit=2, longest=700)):
        rows = {row.cell["metric"]: row for row in job.measure(model, [DENSE], ResultsFile(None))}
        expected = []
        for index, prompt in zip(job.loaded.chosen, job.sequences, strict=True):
            answer = " " + " ".join(job.loaded.task.eval_docs[index]["outputs"])
            ids = torch.tensor([*prompt, *TOKENIZER(answer, add_special_tokens=False)["input_ids"]])
            with torch.inference_mode():
                rows_of_logits = model.model(ids[None]).logits[0, len(prompt) - 1 : -1]
            chosen = rows_of_logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])
            expected.append(float(chosen.mean()))
        assert rows["log_prob_per_token"].samples["scores"] == pytest.approx(expected, abs=1e-9)
        assert len({round(value, 3) for value in expected}) == 2


def test_finished_tasks_are_not_run_again_and_other_documents_are(
    model, sparse, data_dir, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "r.jsonl"
    one, two = (load("local_longbench2", data_dir=data_dir, limit=limit)[0] for limit in (1, 2))
    first = measured(model, [sparse], one, ResultsFile(path), context=300)
    written = path.read_bytes()
    monkeypatch.setattr(harness._Runner, "run", lambda *_: pytest.fail("ran again"))
    assert measured(model, [sparse], one, ResultsFile(path), context=300) == first
    assert path.read_bytes() == written
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        measured(model, [sparse], two, ResultsFile(path), context=300)


def row(values: list[float], value: float | None = None, stderr: float | None = None) -> Result:
    mean = float(np.mean(values)) if value is None else value
    return Result(
        what="task_score", value=mean, stderr=stderr, n=len(values), unit="documents", model="m", method="oracle",
        kind="oracle", name="oracle", context=100, text="t", cell={"task": "t", "metric": "acc"},
        samples={"scores": values},
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
    found, missing = load("local", "niah_single_2", data_dir=tmp_path)
    assert [one.name for one in found] == ["local_kv_retrieval"] and len(missing) == 7 + 1
    assert "longbench_v1_multi_news" in missing["local_multi_news"]
    assert missing["niah_single_2"].startswith("task niah_single_2 must have its data")
    assert "nltk" not in "".join(capfd.readouterr())


def test_jobs_of_tasks_without_data_fail_with_the_reason_and_the_others_run(model, data_dir, tmp_path) -> None:
    kept = "longbench_v2_sample_under100k.jsonl.gz"
    (tmp_path / kept).write_bytes((data_dir / kept).read_bytes())
    setup = Setup(TOKENIZER, (300,), limit=1, longest=300)
    *missing, found = sorted(
        HarnessTask(name="local", data_dir=tmp_path).jobs(setup), key=lambda job: len(job.sequences)
    )
    assert found.task == "local_longbench2" and len(missing) == 7
    assert all(isinstance(job, UnavailableJob) for job in missing)
    with pytest.raises(ValueError, match=missing[0].task):
        missing[0].measure(model, [DENSE], ResultsFile(None))
    assert [row.n for row in found.measure(model, [DENSE], ResultsFile(None))] == [1]
    (without,) = HarnessTask(name="local_squad").jobs(setup)
    with pytest.raises(ValueError, match=r"local_squad.*data-dir"):
        without.measure(model, [DENSE], ResultsFile(None))


def test_tasks_reject_unknown_names_and_folders(monkeypatch, tmp_path) -> None:
    import lm_eval.tasks

    # Reading all folders of the harness takes 17 s.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="magic"):
        load("magic")
    with pytest.raises(ValueError, match="data_dir"):
        HarnessTask(name="local", data_dir=tmp_path / "none").check()


@pytest.mark.parametrize(
    ("name", "room"),
    [("niah_single_1", 500), ("local_longbench2", 500), ("local_longbench2", 120), ("local_nq_open", 99)],
)
def test_jobs_hold_the_prompts_that_the_model_will_see(model, loaded, name, room, monkeypatch) -> None:
    """Settings are tuned on them; where there is less room they lose their middle."""
    [one] = [one for one in loaded if one.name == name]
    monkeypatch.setattr(harness, "load_tasks", lambda *_, **options: ([one], {}))
    (job,) = HarnessTask(name=name, longest=room + one.generated).jobs(Setup(TOKENIZER, (420,)))
    seen, inner = [], model.model.forward

    def forward(input_ids, attention_mask=None, **rest):
        if input_ids.shape[1] > PROBE_TOKENS:
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, kept))
        return inner(input_ids, attention_mask=attention_mask, **rest)

    monkeypatch.setattr(model.model, "forward", forward)
    job.measure(model, [DENSE], ResultsFile(None))
    # Answers to choose from, of one token each, are asked for at once.
    assert sorted(job.sequences) == sorted(seen) and len(job.sequences) == len(one.chosen) == 2
    assert {len(ids) for ids in seen} == {room} if room < 500 else max(map(len, seen)) < 500


def test_tasks_reject_lengths_without_room_and_missing_templates(data_dir) -> None:
    setup = Setup(TOKENIZER, (420,), limit=1)
    # Its answers have 512 tokens.
    for name, longest in (("local_multi_news", 512), ("ruler_fwe", 400)):
        with pytest.raises(ValueError, match="longest"):
            HarnessTask(name=name, data_dir=data_dir, longest=longest).jobs(setup)
    with pytest.raises(ValueError, match="chat_template"):
        HarnessTask(name="local_multi_news", data_dir=data_dir, longest=600, chat_template=True).jobs(setup)


def test_the_harness_is_imported_by_need_and_its_absence_is_a_sentence(monkeypatch) -> None:
    code = "import sys, seerattn, seerattn.eval.tasks, seerattn.cli.evaluate; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setattr("seerattn.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"seerattn\[tasks\]"):
        HarnessTask(name="local").check()


def test_filters_and_metrics_that_are_no_mean_keep_the_error_of_the_harness() -> None:
    values = {"f1,flexible": 0.6, "f1_stderr,flexible": 0.1, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    samples = [{"doc_id": 1 - i, "filter": "flexible", "f1": (i, 1)} for i in range(2)]
    samples += [{"doc_id": 1 - i, "filter": "none", "acc": float(i)} for i in range(2)]
    assert harness._score("f1", "flexible", values, samples) == (0.6, 0.1, [])
    assert harness._score("acc", "none", values, samples) == (0.5, 0.5, [1.0, 0.0])
