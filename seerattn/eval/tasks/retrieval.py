"""Retrieval: pass keys, key-value pairs and chains of variables hidden in real text and asked for at the end.

Answers are scored by teacher forcing: document, question and answer are one prompt, all of it prefilled through the
selector under test, and an answer counts if every one of its tokens is the model's first choice after the ones before
it. That is what greedy decoding of the answer would give if decoding attended to what prefill does, in one pass.

With ``decode_tokens`` it is decoding that is measured: the document is prefilled densely, and question and answer are
read token by token, each of which attends to so many tokens at most.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

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
from seerattn.data.windows import digest
from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.tasks import token_by_token
from seerattn.eval.tasks.perplexity import read_once
from seerattn.eval.tasks.task import Job, Progress, Setup, Task
from seerattn.hf.eval_model import EvalModel
from seerattn.options import option
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

Kind = Literal["passkey", "key_value", "multi_key", "variable_tracking"]
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

    task: Kind
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


def decoded_answers(
    model: PreTrainedModel, documents: Sequence[RetrievalDocument], cache: DynamicCache
) -> list[Answer]:
    """How a model answers the last question of each document if question and answer are read token by token.

    Args:
        model: a causal language model.
        documents: with questions and answers at the same places, at their end.
        cache: holds what comes before the questions, see `read_documents`; what is read is added to it.
    """
    begin, (start, stop) = documents[0].questions[-1], documents[0].answers[-1]
    ids = torch.tensor([document.input_ids[begin:stop] for document in documents], device=model.device)
    text, steps = token_by_token.given(ids[:, 1:]), {"tokens": stop - begin - 1, "ends": frozenset()}
    follows = token_by_token.decode(model, ids[:, 0], cache, text, **steps)
    answer = slice(start - stop, None)
    correct = (follows.choices == follows.tokens)[:, answer].all(1).tolist()
    log_probs = (-follows.losses[:, answer].double()).sum(1).tolist()
    return list(map(Answer, correct, log_probs, [document.depths[-1] for document in documents]))


def read_documents(model: PreTrainedModel, documents: Sequence[RetrievalDocument]) -> DynamicCache:
    """A cache with what comes before the last questions of documents, which is equally long, read in one call."""
    ids = [document.input_ids[: document.questions[-1] + 1] for document in documents]
    return token_by_token.read_prompts(model, torch.tensor(ids, device=model.device))


@dataclass(frozen=True, eq=False)
class RetrievalJob(Job):
    """Documents with a question at their end, by cell.

    Attributes:
        needles: the documents of every cell.
    """

    needles: dict[Needle, list[RetrievalDocument]] = field(default_factory=dict)

    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Measures the retrieval of every choice in every cell; all are asked the same questions.

        Returns:
            "accuracy" and "answer_log_prob" of each cell and choice.
        """
        rows = []
        for needle, documents in self.needles.items():
            for choice in choices:
                blank = self._blank(model, choice, needle)
                with output.together() as cell:
                    row = cell.find(blank)
                    if row is None:
                        watch = Stopwatch(model.device)
                        label = f"{choice}, {needle.task} at {needle.length}"
                        advance = progress(label, len(documents)) if progress else None
                        with choice.on(model) as run:
                            given = answers(run.model, documents, batch=batch, advance=advance)
                        row = cell.append(_filled(blank, given, run.density()), watch.seconds())
                    rows += [row, cell.setdefault(_likely(row), row.seconds)]
        return rows

    def _blank(self, model: EvalModel, choice: Choice, needle: Needle) -> Result:
        """The "accuracy" of a choice in a cell, without a value yet."""
        return choice.result(
            model,
            what="accuracy",
            unit="documents",
            context=needle.length,
            text=self.text,
            cell=needle.cell | self.settings,
            seed=needle.seed,
        )


@dataclass(frozen=True, eq=False)
class DecodingJob(RetrievalJob):
    """The same documents, of which question and answer are decoded.

    All choices and the dense model go on with the same prefill, document by document. So nothing is written before all
    documents of a cell are done.

    Attributes:
        decode_tokens: how many tokens a decoded one may read.
    """

    decode_tokens: tuple[int, ...] = ()

    together = True
    has_dense = False

    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """See `RetrievalJob.measure`; the dense model is measured as well.

        Documents run together whose questions and answers are at the same places.
        """
        rows = []
        for needle, documents in self.needles.items():
            blanks = {choice: self._blank(model, choice, needle) for choice in (DENSE, *choices)}
            missing = [choice for choice, blank in blanks.items() if output.find(blank) is None]
            watch = Stopwatch(model.device)
            label = f"{len(missing)} ways of decoding, {needle.task} at {needle.length}"
            advance = progress(label, len(documents)) if progress and missing else None
            found = self._decoded(model, missing, documents, batch, advance)
            seconds = watch.seconds()
            for choice in missing:
                given, densities = zip(*found[choice])
                density = None if choice.is_dense else sum(densities) / len(densities)
                with output.together() as cell:
                    row = cell.append(_filled(blanks[choice], given, density), seconds)
                    cell.setdefault(_likely(row), seconds)
            for blank in blanks.values():
                row = output.find(blank)
                rows += [row, output.find(_likely(row))]
        return rows

    @staticmethod
    def _decoded(
        model: EvalModel,
        choices: Sequence[Choice],
        documents: Sequence[RetrievalDocument],
        batch: int,
        advance: Callable[[int], None] | None,
    ) -> dict[Choice, list[tuple[Answer, float]]]:
        """Answers of each choice in the order of the documents, with the density of their steps."""
        found: dict[Choice, dict[int, tuple[Answer, float]]] = {choice: {} for choice in choices}
        for numbers in _at_the_same_places(documents, batch) if choices else ():
            group = [documents[number] for number in numbers]
            with model.untouched() as run:
                cache = read_documents(run.model, group)
            for choice in choices:
                with choice.on(model) as run:
                    replies = decoded_answers(run.model, group, copy.deepcopy(cache))
                    density = run.decode_density()
                found[choice] |= {number: (answer, density) for number, answer in zip(numbers, replies)}
            if advance is not None:
                advance(len(group))
        return {choice: [of[number] for number in sorted(of)] for choice, of in found.items()}

    def _blank(self, model: EvalModel, choice: Choice, needle: Needle) -> Result:
        blank = super()._blank(model, choice, needle)
        return replace(blank, cell=blank.cell | {"phase": "decode"})


def _at_the_same_places(documents: Sequence[RetrievalDocument], batch: int) -> list[list[int]]:
    """Numbers of documents that can be decoded together, so many at a time."""
    alike: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for number, document in enumerate(documents):
        alike.setdefault((document.questions[-1], document.answers[-1]), []).append(number)
    return [of[begin : begin + batch] for of in alike.values() for begin in range(0, len(of), batch)]


def _filled(blank: Result, given: Sequence[Answer], density: float | None) -> Result:
    """A blank "accuracy" with the answers that were given."""
    return replace(
        blank,
        **statistics.proportion(sum(answer.correct for answer in given), len(given))._asdict(),
        n=len(given),
        realised_density=density,
        samples={name: [getattr(answer, name) for answer in given] for name in Answer._fields},
    )


def _likely(row: Result) -> Result:
    """The "answer_log_prob" beside an "accuracy"."""
    likely = statistics.mean(row.sampled("log_prob"))
    return replace(row, what="answer_log_prob", samples={}, **likely._asdict())


@dataclass(frozen=True, kw_only=True)
class RetrievalTask(Task):
    """Facts hidden in a text and asked for at its end; document, question and answer are one sparse prefill.

    Where facts lie at random places there are ``n`` documents for each of the depths.
    """

    n: int = option(20, help="Documents for each depth.", low=1)
    depths: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), help="Shares of the text before a pass key.", low=0, high=1
    )
    seed: int = option(0, help="Draws facts, places and text.")
    decode_tokens: tuple[int, ...] = option(
        (), help="Measure decoding: dense documents; questions and answers may read so many tokens each.", low=1
    )

    def needles(self, context: int, limit: int = 0) -> list[Needle]:
        """The cells at a context, with at most ``limit`` documents each if that is not 0."""
        n = self.n * len(self.depths)
        return [Needle(self.id, context, None, min(n, limit or n), self.seed, **self.about)]

    @property
    def about(self) -> dict[str, int]:
        """What else a `Needle` of the task takes."""
        return {}

    def jobs(self, setup: Setup) -> list[Job]:
        tokenizer = setup.tokenizer
        documents = read_once(tokenizer, self.sources, self.max_docs or None, None)
        settings, found = {"data": digest(documents)}, []
        for context in self.contexts or setup.contexts:
            needles = self.needles(context, setup.limit)
            made = {needle: needle.documents(tokenizer, documents, tokenizer.bos_token_id) for needle in needles}
            # One of each depth first, as settings are tuned on the first ones.
            inputs = [document.input_ids for together in zip(*made.values()) for document in together]
            about = {"task": self.id, "text": self.called, "context": context, "sequences": inputs}
            about |= {"settings": settings, "needles": made}
            decodes = self.decode_tokens
            found.append(DecodingJob(**about, decode_tokens=decodes) if decodes else RetrievalJob(**about))
        return found


@dataclass(frozen=True, kw_only=True)
class PassKey(RetrievalTask):
    """A number hidden at given depths."""

    id = "passkey"

    def needles(self, context: int, limit: int = 0) -> list[Needle]:
        n = min(self.n, limit or self.n)
        return [Needle(self.id, context, depth, n, self.seed) for depth in self.depths]


@dataclass(frozen=True, kw_only=True)
class KeyValue(RetrievalTask):
    """Pairs of a key and a value, one of which is asked for."""

    id = "key_value"

    pairs: int | None = option(None, help="Pairs in a document; default 8, and 32 of multi_key.", low=1)

    @property
    def about(self) -> dict[str, int]:
        return {} if self.pairs is None else {"pairs": self.pairs}


@dataclass(frozen=True, kw_only=True)
class MultiKey(KeyValue):
    """Many pairs whose keys look alike."""

    id = "multi_key"


@dataclass(frozen=True, kw_only=True)
class VariableTracking(RetrievalTask):
    """Chains of variables, of one of which the value is asked for."""

    id = "variable_tracking"

    chains: int = option(2, help="Chains in a document; one is asked for.", low=1)
    hops: int = option(4, help="Assignments from variable to variable in a chain.", low=1)

    @property
    def about(self) -> dict[str, int]:
        return {"chains": self.chains, "hops": self.hops}
