"""Retrieval: pass keys, key-value pairs and chains of variables hidden in real text and asked for at the end.

Answers are scored by teacher forcing: document, question and answer are one prompt, all of it prefilled through the
selector under test, and an answer counts if every one of its tokens is the model's first choice after the ones before
it. That is what greedy decoding of the answer would give if decoding attended to what prefill does, in one pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from seerattn.data.retrieval import (
    Encoder,
    RetrievalDocument,
    key_value_document,
    multi_key_document,
    passkey_document,
    variable_tracking_document,
)
from seerattn.eval.arms import Arm, EvalModel
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal["passkey", "key_value", "multi_key", "variable_tracking"]
TASKS: tuple[str, ...] = get_args(Task)
# Pairs of a document where none are asked for.
_PAIRS = {"key_value": 8, "multi_key": 32}


class Answer(NamedTuple):
    """How a model answered one question.

    Attributes:
        correct: whether every token of the answer was the first choice.
        log_prob: log-probability of the answer, nats.
        depth: share of the text that lies before the fact.
    """

    correct: bool
    log_prob: float
    depth: float


@dataclass(frozen=True)
class Needle:
    """One cell of a retrieval test.

    Attributes:
        task: "passkey", "key_value", "multi_key" or "variable_tracking".
        length: tokens of a document, answer included.
        depth: share of the text before the pass key; None for the other tasks, whose facts lie at random depths.
        n: documents.
        seed: draws the facts, their places and the text around them; cells are independent of each other.
        pairs: key-value pairs of a document; None for 8, and 32 with "multi_key".
        chains: chains of variables in a document, all but one distractors.
        hops: assignments from variable to variable in a chain.

    Raises:
        ValueError: a pass key without a depth, or another task with one.
    """

    task: Task
    length: int
    depth: float | None
    n: int
    seed: int = 0
    pairs: int | None = None
    chains: int = 2
    hops: int = 4

    def __post_init__(self) -> None:
        if (self.task == "passkey") != (self.depth is not None):
            raise ValueError(f"depth must be given for passkey and for no other task, got {self.depth} for {self.task}")

    def documents(
        self, encoder: Encoder, haystacks: Sequence[Sequence[int]], bos_token_id: int | None
    ) -> list[RetrievalDocument]:
        """The documents of the cell, the same in every run.

        Args:
            encoder: the tokenizer.
            haystacks: token ids of texts to hide facts in; each document uses one of those that are long enough.
            bos_token_id: put first, if given.

        Raises:
            ValueError: every text is shorter than the document.
        """
        long_enough = [text for text in haystacks if len(text) >= self.length]
        if not long_enough:
            longest = max(map(len, haystacks), default=0)
            raise ValueError(f"data must hold a text of {self.length} tokens, got at most {longest}; use a longer one")
        made = []
        for number in range(self.n):
            rng = random.Random(f"{self.seed} {self.task} {self.length} {self.depth} {number}")
            text = rng.choice(long_enough)
            made.append(self._document(encoder, text, rng, bos_token_id))
        return made

    def _document(
        self, encoder: Encoder, text: Sequence[int], rng: random.Random, bos_token_id: int | None
    ) -> RetrievalDocument:
        if self.task == "passkey":
            return passkey_document(encoder, text, self.length, self.depth, rng, bos_token_id=bos_token_id)
        make = {
            "key_value": key_value_document,
            "multi_key": multi_key_document,
            "variable_tracking": variable_tracking_document,
        }[self.task]
        return make(encoder, text, self.length, rng, bos_token_id=bos_token_id, **self._options)

    @property
    def _options(self) -> dict[str, int]:
        if self.task == "variable_tracking":
            return {"chains": self.chains, "hops": self.hops}
        return {"pairs": _PAIRS[self.task] if self.pairs is None else self.pairs}

    @property
    def cell(self) -> dict:
        """What identifies the cell in a result, beside its length and seed."""
        place = {"depth": self.depth} if self.task == "passkey" else self._options
        return {"task": self.task, "documents": self.n} | place


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    documents: Sequence[RetrievalDocument],
    *,
    batch: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Asks the model the question at the end of every document.

    Args:
        model: a causal language model.
        documents: of equal lengths, each with one final question.
        batch: documents that run together.
        advance: told the number of documents done.
    """
    found = []
    for begin in range(0, len(documents), batch):
        group = documents[begin : begin + batch]
        input_ids = torch.tensor([document.input_ids for document in group], device=model.device)
        width = max(stop - start for document in group for start, stop in document.answers)
        # The token before the answer predicts its first one; the last token predicts nothing that is asked.
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float()
        labels = input_ids[:, -width:]
        log_probs = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).double()
        hits = logits.argmax(-1) == labels
        for row, document in enumerate(group):
            size = document.answers[-1][1] - document.answers[-1][0]
            correct = bool(hits[row, -size:].all())
            found.append(Answer(correct, float(log_probs[row, -size:].sum()), document.depths[-1]))
        if advance is not None:
            advance(len(group))
    return found


def evaluate_needle(
    subject: EvalModel,
    arms: Sequence[Arm],
    needles: Sequence[Needle],
    haystacks: Sequence[Sequence[int]],
    output: ResultsFile,
    *,
    text: str,
    settings: dict | None = None,
    batch: int = 1,
    prepared: Mapping[Needle, Sequence[RetrievalDocument]] | None = None,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> list[Result]:
    """Measures the retrieval of every arm in every cell; all arms are asked the same questions.

    Args:
        subject: the model.
        arms: what to measure.
        needles: cells.
        haystacks: token ids of the texts that facts are hidden in.
        output: where results go; cells that it already holds are not measured again.
        text: kind of text.
        settings: what else identifies a result, such as a digest of the haystacks.
        batch: documents that run together.
        prepared: the documents of the cells, if they are made already.
        progress: called with a description and a number of documents, returns what is told of finished ones.

    Returns:
        "accuracy" and "answer_log_prob" of each cell and arm.
    """
    rows = []
    for needle in needles:
        documents = None if prepared is None else prepared[needle]
        for arm in arms:
            blank = subject.result(
                arm,
                what="accuracy",
                unit="documents",
                context=needle.length,
                text=text,
                cell=needle.cell | (settings or {}),
                seed=needle.seed,
            )
            with output.together() as cell:
                row = cell.find(blank)
                if row is None:
                    if documents is None:
                        documents = needle.documents(subject.tokenizer, haystacks, subject.bos_token_id)
                    watch = Stopwatch(subject.device)
                    label = f"{arm}, {needle.task} at {needle.length}"
                    advance = progress(label, len(documents)) if progress else None
                    with subject.attached(arm) as run:
                        given = answers(run.model, documents, batch=batch, advance=advance)
                    row = replace(
                        blank,
                        **statistics.proportion(sum(answer.correct for answer in given), len(given))._asdict(),
                        n=len(given),
                        realised_density=run.density(),
                        samples={name: [getattr(answer, name) for answer in given] for name in Answer._fields},
                    )
                    row = cell.append(row, watch.seconds())
                likely = statistics.mean(row.sampled("log_prob"))
                likely = replace(row, what="answer_log_prob", samples={}, **likely._asdict())
                rows += [row, cell.setdefault(likely, row.seconds)]
    return rows
