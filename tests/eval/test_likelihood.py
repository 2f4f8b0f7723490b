"""The likelihood of right answers is that of the plain model, and after a sparse prompt that of decoding one by one."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_corpus import tiny_tokenizer, topical_text
from tiny_models import tiny_model
from torch import nn

from seerattn.eval.choice import Choice, at_density
from seerattn.eval.tasks.harness import HarnessTask
from seerattn.eval.tasks.harness_model import MiddleCutModel
from seerattn.eval.tasks.likelihood import Likelihood, right_answer
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.streaming import Streaming

# One token, several, and more than a query block of any kind has.
ANSWERS = ["w5", "w7 w9 w11", " ".join(f"w{number}" for number in range(90))]
LENGTHS = (150, 211, 190)
TOKENIZER = tiny_tokenizer()
TOKENIZER.eos_token = "<4>"


@pytest.fixture(params=["llama", "gemma3"])
def model(request) -> EvalModel:
    return EvalModel(tiny_model(request.param).double(), TOKENIZER, name="tiny")


@pytest.fixture
def sparse(model: EvalModel) -> Choice:
    return at_density(model, Streaming(block_q=16, block_k=16), 0.3)


PROMPTS = [topical_text(length, seed) for seed, length in enumerate(LENGTHS)]


def taken(model: nn.Module, batch: int, *, max_length: int = 400) -> list[Likelihood]:
    """What the model that the harness sees tells of all documents."""
    harnessed = MiddleCutModel(
        model, TOKENIZER, max_length=max_length, batch_size=batch, writes=False,
        answer=lambda document: f" {ANSWERS[document['number']]}",
    )  # fmt: skip
    requests = [
        Instance("generate_until", {"number": n}, (prompt, {"max_gen_toks": 4, "until": []}), 0, ("t", n, 1))
        for n, prompt in enumerate(PROMPTS)
    ]
    assert harnessed.generate_until(requests) == [""] * 3
    return [harnessed.likelihoods[number] for number in range(3)]


def log_probs(found: list[Likelihood]) -> list[float]:
    return [one.log_prob_per_token for one in found]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def in_one_forward(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """Mean log-probability of the answer's tokens, each read off the token before it."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    total = 0.0
    for place, token in enumerate(answer, len(prompt)):
        row = logits[place - 1]
        total += float(row[token] - row.exp().sum().log())
    return total / len(answer)


@torch.inference_mode()
def token_by_token(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    """The same where each token of the answer is decoded alone."""
    found, total = model(torch.tensor([prompt]), use_cache=True), 0.0
    for token in answer:
        row = found.logits[0, -1]
        total += float(row[token] - row.exp().sum().log())
        found = model(torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True)
    return total / len(answer)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_likelihood_of_answers_matches_a_plain_forward_of_the_unpatched_model(model, batch) -> None:
    expected = [in_one_forward(model.model, ids(p), ids(a)) for p, a in zip(PROMPTS, ANSWERS)]
    assert log_probs(taken(model.model, batch)) == pytest.approx(expected, abs=1e-9)
    assert len({round(value, 2) for value in expected}) == 3
    with model.held():
        assert log_probs(taken(model.model, batch)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_after_a_sparse_prompt_are_as_likely_as_decoding_finds_them(model, sparse, batch) -> None:
    with sparse.on(model) as run:
        found = log_probs(taken(run.model, batch))
        counted = run.density()
    with sparse.on(model) as run:
        expected = [token_by_token(run.model, ids(p), ids(a)) for p, a in zip(PROMPTS, ANSWERS)]
        assert counted == run.density(), "answers are no part of the density"
        chosen = [in_one_forward(run.model, ids(p), ids(a)) for p, a in zip(PROMPTS, ANSWERS)]
    dense = [in_one_forward(model.model, ids(p), ids(a)) for p, a in zip(PROMPTS, ANSWERS)]
    assert found == pytest.approx(expected, abs=1e-9)
    for others in (chosen, dense):
        assert found != pytest.approx(others, abs=1e-5), "what is compared must be able to differ"


def test_prompts_that_are_too_long_lose_their_middle_and_answers_their_end() -> None:
    model = tiny_model("llama").double()
    found = log_probs(taken(model, 1, max_length=154))
    room = 154 - 4
    for prompt, answer, value in zip(map(ids, PROMPTS), map(ids, ANSWERS), found):
        cut = prompt if len(prompt) <= room else prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]
        assert value == pytest.approx(in_one_forward(model, cut, answer[: 154 - len(cut)]), abs=1e-9)


def test_an_answer_is_the_first_choice_if_greedy_decoding_writes_it(model, sparse, monkeypatch) -> None:
    with sparse.on(model) as run:
        greedy = []
        for prompt in PROMPTS:
            inputs = torch.tensor([ids(prompt)])
            out = run.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=3, pad_token_id=0
            )
            greedy.append(TOKENIZER.decode(out[0, inputs.shape[1] :].tolist()))
        wrong = " ".join([*greedy[1].split()[:2], "w3" if greedy[1].split()[2] != "w3" else "w4"])
        monkeypatch.setattr(f"{__name__}.ANSWERS", [greedy[0], wrong, greedy[2]])
        assert [one.first_choice for one in taken(run.model, 3)] == [1.0, 0.0, 1.0]


def task(name: str, target: object, prefix: str | None = None, delimiter: str = " ") -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(task=name, target_delimiter=delimiter),
        doc_to_target=lambda document: target,
        doc_to_prefix=lambda document: prefix,
    )


@pytest.mark.parametrize(
    ("name", "target", "prefix", "chat_template", "expected"),
    [
        ("niah_single_1", ["71", "72"], "it is", True, " 71"),
        ("niah_multivalue", ["71", "72"], "they are", True, " 71, 72"),
        ("niah_multiquery", ["71", "72"], "they are", False, " 71, 72"),
        ("ruler_vt", ["AB", "CD"], "they are:", True, " AB CD"),
        ("ruler_cwe", ["boat", "day"], "the list are:", True, " 1. boat 2. day"),
        ("ruler_qa_squad", ["boat", "the boat"], "Answer:", True, " boat"),
        ("local_nq_open", "the boat", None, False, "\nthe boat"),
        ("local_nq_open", "the boat", None, True, "the boat"),
        ("some_task", 7, None, False, "\n7"),
    ],
)
def test_a_right_answer_is_the_target_as_the_prompt_would_go_on(name, target, prefix, chat_template, expected) -> None:
    assert right_answer(task(name, target, prefix, "\n"), {}, chat_template=chat_template) == expected


@pytest.mark.parametrize("target", [[], "", " "])
def test_likelihood_rejects_a_document_without_an_answer(target) -> None:
    with pytest.raises(ValueError, match="documents must have an answer for its likelihood, got one of t without"):
        right_answer(task("t", target), {}, chat_template=False)


def test_a_task_rejects_to_measure_neither_answers_nor_their_likelihood() -> None:
    with pytest.raises(ValueError, match="likelihood must be true where no answer is generated"):
        HarnessTask(name="niah_single_1", generate=0)
    assert HarnessTask(name="niah_single_1", generate=0, likelihood=True).generate == 0
