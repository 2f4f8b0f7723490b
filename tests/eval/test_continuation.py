"""Long outputs, against `generate` and single forwards of the unpatched model."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seerattn.data.windows import Window
from seerattn.eval.choice import Choice
from seerattn.eval.experiment import Experiment
from seerattn.eval.run import Runner, make_jobs
from seerattn.eval.tasks import continuation
from seerattn.eval.tasks.continuation import Continuation, ContinuationJob
from seerattn.eval.tasks.task import Setup
from seerattn.eval.tasks.token_by_token import decode, drawn, given, greedily, read_prompts, until_end
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.gate import Gate
from seerattn.methods.oracle import Oracle
from seerattn.methods.quest import Quest
from seerattn.methods.streaming import Streaming
from seerattn.report.tables import continuation as tables
from seerattn.results import statistics
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

CONTEXT, TOKENS, NO_END = 300, 40, frozenset()


@pytest.fixture(scope="module")
def prompts(documents) -> list[Window]:
    return [Window(number, ids[:CONTEXT]) for number, ids in enumerate(documents)]


@pytest.fixture
def job(prompts) -> ContinuationJob:
    about = {"prompts": prompts, "answer_tokens": TOKENS, "decode_tokens": (128, 1024)}
    return ContinuationJob("continuation", "t", CONTEXT, [p.input_ids for p in prompts], **about)


@pytest.fixture
def ending(model: EvalModel, monkeypatch):
    """Lets a token end answers."""

    def end(token: int) -> None:
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", [token])

    return end


def choice(method, tokens: int, model=None) -> Choice:
    return Choice(method, method.decoders(model), tokens, tokens, "tokens")


def by_what(rows: list[Result], name: str, tokens: int | None = None) -> dict[str, Result]:
    return {r.what: r for r in rows if r.name == name and r.cell.get("tokens") == tokens}


def in_one_forward(model, prompt: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits ``[B, N, V]`` before each token of a text, of one call without a cache."""
    ids = torch.cat((prompt, text), 1)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]


@torch.no_grad()
def test_the_dense_model_writes_what_generate_writes_and_finds_it_as_likely_as_in_one_forward(model, prompts) -> None:
    ids = torch.tensor([prompt.input_ids for prompt in prompts])
    cache = read_prompts(model.model, ids)
    found = decode(model.model, ids[:, -1], cache, greedily, tokens=TOKENS, ends=NO_END)
    expected = model.model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found.tokens, expected[:, CONTEXT:]) and torch.equal(found.choices, found.tokens)
    logits = in_one_forward(model.model, ids, found.tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), found.tokens.flatten(), reduction="none").view_as(found.losses)
    torch.testing.assert_close(found.losses, losses, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_given_text_is_found_as_likely_as_under_the_mask_of_its_tokens(model, prompts) -> None:
    """Streaming chooses alike in all layers and heads, so one forward with a mask is the same."""
    ids = torch.tensor([prompt.input_ids for prompt in prompts])
    text = torch.randint(3, 90, (len(ids), TOKENS), generator=torch.Generator().manual_seed(0))
    cache = read_prompts(model.model, ids)
    with choice(Streaming(), 128).on(model) as run:
        found = decode(run.model, ids[:, -1], copy.deepcopy(cache), given(text), tokens=TOKENS, ends=NO_END)
        density = run.decode_density()
    places = torch.arange(CONTEXT + TOKENS)
    query, key = places[:, None], places
    # 128 tokens are two blocks: the first and the token's own.
    kept = (key < 64) | (key // 64 == query // 64) | (query < CONTEXT - 1)
    mask = ((key <= query) & kept).expand(len(ids), 1, -1, -1)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = in_one_forward(model.model, ids, text, bias)
    losses = F.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none").view_as(found.losses)
    torch.testing.assert_close(found.losses, losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.choices, logits.argmax(-1))
    blocks = [-(-tokens // 64) for tokens in range(CONTEXT, CONTEXT + TOKENS)]
    assert density == pytest.approx(2 * len(blocks) / sum(blocks))


def test_who_may_read_everything_agrees_with_the_dense_model(model, job, gate_folders) -> None:
    methods = [Oracle(), Quest(), Streaming(), Gate(gates=gate_folders[0])]
    rows = job.measure(
        model, [choice(m, tokens, model) for m in methods for tokens in job.decode_tokens], ResultsFile(None)
    )
    assert len(rows) == 2 + 5 * 2 * len(methods)
    dense = by_what(rows, "dense")
    assert set(dense) == {"continuation_perplexity", "answer_length"}
    perplexity, length = dense.values()
    assert length.value == TOKENS and perplexity.realised_density is None
    for method in methods:
        for tokens in job.decode_tokens:
            of = by_what(rows, str(method), tokens)
            everything = tokens == 1024
            assert all((row.realised_density == 1) == everything for row in of.values())
            assert (abs(of["continuation_difference"].value) < 1e-3) == everything
            assert (of["continuation_agreement"].value == 1) == everything
            assert (of["answer_common"].value == TOKENS) == everything
            assert of["continuation_perplexity"].value == pytest.approx(
                perplexity.value + of["continuation_difference"].value, rel=1e-9
            )


def test_what_is_told_follows_from_the_tokens_that_were_decoded(model, job, prompts, ending) -> None:
    """Perplexity, agreement, common beginnings and lengths, counted anew prompt by prompt, with an end token."""
    ids = torch.tensor([prompt.input_ids for prompt in prompts])
    wanted = choice(Streaming(), 128)
    greedy, texts, answers, losses, agreed = [], [], [], [], []
    for row in range(len(ids)):
        with torch.no_grad():
            cache = read_prompts(model.model, ids[row : row + 1])
        last = ids[row : row + 1, -1]
        pick = drawn(1.0, [row])
        text = decode(model.model, last, copy.deepcopy(cache), pick, tokens=TOKENS, ends=NO_END)
        greedy.append(decode(model.model, last, copy.deepcopy(cache), greedily, tokens=TOKENS, ends=NO_END).tokens[0])
        with wanted.on(model) as run:
            own = decode(run.model, last, copy.deepcopy(cache), given(text.tokens), tokens=TOKENS, ends=NO_END)
        with wanted.on(model) as run:
            answers.append(
                decode(run.model, last, copy.deepcopy(cache), greedily, tokens=TOKENS, ends=NO_END).tokens[0]
            )
        texts.append(text.tokens[0])
        losses.append(own.losses[0])
        agreed.append(own.choices[0] == text.choices[0])
    end = int(greedy[0][7])
    ending(end)
    rows = job.measure(model, [wanted], ResultsFile(None), batch=3)
    of, dense = by_what(rows, "streaming", 128), by_what(rows, "dense")

    def length(tokens: torch.Tensor) -> int:
        places = (tokens == end).nonzero().flatten().tolist()
        return places[0] if places else len(tokens)

    sizes = [min(length(text) + 1, TOKENS) for text in texts]
    total = sum(float(loss[:size].double().sum()) for loss, size in zip(losses, sizes))
    assert of["continuation_perplexity"].value == pytest.approx(math.exp(total / sum(sizes)), rel=1e-4)
    assert of["continuation_agreement"].value == sum(int(a[:n].sum()) for a, n in zip(agreed, sizes)) / sum(sizes)
    assert dense["answer_length"].value == sum(map(length, greedy)) / len(greedy) < TOKENS
    assert of["answer_length"].value == sum(map(length, answers)) / len(answers)
    common = []
    for ours, theirs in zip(answers, greedy):
        alike = 0
        while alike <= min(length(ours), length(theirs), TOKENS - 1) and ours[alike] == theirs[alike]:
            alike += 1
        common.append(alike)
    assert of["continuation_perplexity"].samples["common"] == common and of["answer_common"].value == sum(common) / len(
        common
    )


def test_prompts_that_run_together_do_not_matter_to_each_other(model, job) -> None:
    wanted = [choice(Streaming(), 128), choice(Quest(), 128)]
    alone, together = (job.measure(model, wanted, ResultsFile(None), batch=size) for size in (1, 3))
    for one, other in zip(alone, together):
        assert one.what == other.what and one.value == pytest.approx(other.value, rel=1e-5)


def test_text_is_drawn_by_its_seed_and_greedy_at_temperature_0(model, job) -> None:
    def text(job: ContinuationJob) -> list[float]:
        return job.measure(model, [], ResultsFile(None))[0].samples["losses"]

    first, again = text(job), text(job)
    assert first == again != text(replace(job, seed=1))
    greedy = replace(job, temperature=0.0)
    (row, _) = greedy.measure(model, [], ResultsFile(None))
    assert (
        row.samples["agreed"] == row.samples["tokens"] and row.value < statistics.perplexity(first, [TOKENS] * 4).value
    )


def test_tokens_are_drawn_with_the_probability_that_the_temperature_gives_them() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).log().repeat(4000, 1)
    found = drawn(0.5, range(4000))(0, logits)
    # 1 and 4 of 5; three standard errors.
    assert abs(float((found == 1).double().mean()) - 0.2) < 3 * (0.2 * 0.8 / 4000) ** 0.5 and not (found == 0).any()


def test_finished_choices_are_not_decoded_again(model, job, monkeypatch) -> None:
    output = ResultsFile(None)
    first = job.measure(model, [choice(Streaming(), 128)], output)
    asked = []
    monkeypatch.setattr(continuation, "decode", lambda *args, **more: asked.append(1) or decode(*args, **more))
    assert job.measure(model, [choice(Streaming(), 128)], output) == first and not asked
    rows = job.measure(model, [choice(Streaming(), 128), choice(Quest(), 128)], output)
    # The dense model's text and answer, and the same of Quest, for each prompt.
    assert len(asked) == 4 * len(job.prompts) and rows[: len(first)] == first


def test_an_answer_ends_with_its_first_end_token() -> None:
    assert until_end([5, 2, 7, 2], frozenset({2, 9})) == [5, 2] and until_end([5, 7], frozenset({2})) == [5, 7]


def test_an_experiment_measures_long_outputs(model, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("one two three four five six seven eight " * 90, encoding="utf-8")
    task = {"task": "continuation", "answer_tokens": 6, "decode_tokens": (128, 192), "windows": 2, "data": (str(book),)}
    experiment = Experiment(model="tiny", methods=("dense", "streaming", "quest"), tasks=(task,), contexts=(CONTEXT,))
    jobs = make_jobs(experiment, Setup(model.tokenizer, experiment.contexts))
    assert [len(ids) for ids in jobs[0].sequences] == [CONTEXT] * 2
    runner = Runner(model, experiment, jobs, ResultsFile(tmp_path / "r.jsonl"))
    outcomes = list(runner.run())
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    rows: list[Result] = list({row.key: row for outcome in outcomes for row in outcome.rows}.values())
    (table,) = tables.tables(rows)
    assert [(line.name, line.cells[0].text) for line in table.lines] == [
        ("dense", "all"),
        ("Quest", "192"),
        ("Quest", "128"),
        ("streaming", "192"),
        ("streaming", "128"),
    ]
    assert table.title == "Long outputs: 300 tokens, book, tiny, plain text, temperature 1"
    asked = [replace(r, cell=r.cell | {"instruction": "go on", "temperature": 0.0}) for r in rows]
    (_, other) = sorted(tables.tables([*rows, *asked]), key=lambda table: "instruction" in table.title)
    assert other.title.endswith("tiny, answers to an instruction, greedy") and "“go on”" in other.notes[1]
    assert "2 prompts, at most 6 tokens" in table.notes[0] and table.lines[1].cells[3].error
    assert len(table.notes) == 1


def test_a_table_says_where_methods_were_given_texts_of_different_runs(model, job) -> None:
    rows = job.measure(model, [choice(Quest(), 128), choice(Streaming(), 128)], ResultsFile(None))
    (table,) = tables.tables(rows)
    assert not any("each run drew a text of its own" in note for note in table.notes)
    other = [
        replace(r, samples=r.samples | {"dense_losses": [loss + 1 for loss in r.samples["dense_losses"]]})
        if r.method == "quest" and "dense_losses" in r.samples
        else r
        for r in rows
    ]
    (table,) = tables.tables(other)
    assert any("each run drew a text of its own" in note for note in table.notes)


def test_an_instruction_stands_after_the_text_in_the_chat_template(model, documents, monkeypatch) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
    )
    monkeypatch.setattr(continuation, "read_once", lambda *args: documents)
    (job,) = Continuation(instruction="w88 w89").jobs(Setup(tokenizer, (CONTEXT,)))
    head, tail = (tokenizer.convert_tokens_to_ids(words) for words in (["w1"], ["w88", "w89", "w2", "w3"]))
    expected = [head + ids[: CONTEXT - 5] + tail for ids in documents]
    assert job.sequences == expected and job.settings["instruction"] == "w88 w89"


@pytest.mark.parametrize(
    ("options", "setup", "message"),
    [
        ({"decode_tokens": ()}, {}, "decode_tokens must be one or several"),
        ({"answer_tokens": 100}, {"longest": 350}, "must be at most the model's 350 tokens together"),
        ({"instruction": "go on"}, {}, "needs a chat template"),
    ],
)
def test_what_cannot_be_measured_is_rejected(model, documents, monkeypatch, options, setup, message) -> None:
    monkeypatch.setattr(continuation, "read_once", lambda *args: documents)
    with pytest.raises(ValueError, match=message):
        Continuation(**options).jobs(Setup(model.tokenizer, (CONTEXT,), **setup))
