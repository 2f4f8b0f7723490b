"""Long outputs: what the dense model writes after a prompt, and how each way of decoding goes on from there.

Prompts are read densely, all but their last token. From it on everything is decoded token by token. The dense model
writes a text, whose tokens every method is then given one by one: how likely they are to it, and how often its first
choice is that of the dense model. Then each method writes an answer of its own, greedily: how long it stays the answer
of the dense model, and how long it gets.

A greedy text of a small model soon repeats itself, and what repeats itself is easy to foretell from the last few words.
So the text that is given is drawn from the dense model's own distribution, unless the temperature is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seerattn.data.windows import batches, cut_windows, digest
from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.tasks.perplexity import read_once
from seerattn.eval.tasks.task import Job, Progress, Setup, Task
from seerattn.eval.tasks.token_by_token import (
    Decoded,
    decode,
    drawn,
    end_tokens,
    given,
    greedily,
    read_prompts,
    until_end,
)
from seerattn.hf.eval_model import EvalModel
from seerattn.options import option
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    from seerattn.data.windows import Window

_HERE = "THE TEXT STANDS HERE"
# Apart from each other by more than there are prompts.
_SEEDS = 1_000_003


class Followed(NamedTuple):
    """What one way of decoding makes of one prompt.

    Attributes:
        tokens: tokens of the given text.
        losses: their negative log-likelihood in all, nats.
        agreed: how many of them stand where the first choice is that of the dense model.
        common: tokens that its own answer begins with as that of the dense model does, an end token counted.
        lengths: tokens of its own answer, an end token not counted.
        ended: whether that has an end token.
        density: of the tokens that were decoded for the given text, and for its own answer.
    """

    tokens: int
    losses: float
    agreed: int
    common: int
    lengths: int
    ended: bool
    density: tuple[float, float]


@dataclass(frozen=True, eq=False)
class ContinuationJob(Job):
    """Prompts of one length.

    All choices go on with the same prefill and the same text. So nothing is written before all prompts are done.

    Attributes:
        prompts: the prompts, and the documents that they are of.
        answer_tokens: tokens that are written after each at most.
        temperature: of the text that is given; 0 for the greedy one.
        seed: draws that text.
        decode_tokens: how many tokens a decoded one may read.
    """

    prompts: list[Window] = field(default_factory=list)
    answer_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
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
        """Measures every choice; the dense model is measured as well.

        Returns:
            "continuation_perplexity" and "answer_length" of each choice. But for dense, also
            "continuation_difference", the perplexity less the dense model's, "continuation_agreement", the share of
            tokens with the same first choice, and "answer_common", the tokens before answers part.
        """
        blanks = {choice: self._blank(model, choice) for choice in (DENSE, *choices)}
        missing = [choice for choice, blank in blanks.items() if output.find(blank) is None]
        watch = Stopwatch(model.device)
        label = f"{len(missing)} ways of decoding, {self}"
        advance = progress(label, len(self.prompts)) if progress and missing else None
        found = self._followed(model, missing, batch, advance) if missing else {}
        seconds = watch.seconds()
        for choice in missing:
            with output.together() as cell:
                row = cell.append(self._filled(blanks[choice], found[choice], found[DENSE]), seconds)
                for other in _others(row):
                    cell.setdefault(other, seconds)
        rows = []
        for blank in blanks.values():
            row = output.find(blank)
            rows += [row, *(output.find(other) for other in _others(row))]
        return rows

    def _followed(
        self, model: EvalModel, choices: Sequence[Choice], batch: int, advance: Callable[[int], None] | None
    ) -> dict[Choice, list[Followed]]:
        """What becomes of every prompt, by choice and of the dense model."""
        found: dict[Choice, list[Followed]] = {choice: [] for choice in (DENSE, *choices)}
        ends, done = end_tokens(model.model), 0
        for group in batches(self.prompts, batch):
            ids = torch.tensor([prompt.input_ids for prompt in group], device=model.device)
            with model.untouched() as run:
                cache = read_prompts(run.model, ids)
                dense = self._written(run.model, ids[:, -1], cache, done, ends)
            found[DENSE] += compared(*dense, *dense, (1.0, 1.0), ends)
            for choice in choices:
                if not choice.is_dense:
                    own = self._decoded(model, choice, ids[:, -1], cache, dense[0], ends)
                    found[choice] += compared(*own[:2], *dense, own[2], ends)
            done += len(group)
            if advance is not None:
                advance(len(group))
        return found

    def _written(
        self, model: PreTrainedModel, last: Tensor, cache: DynamicCache, done: int, ends: frozenset[int]
    ) -> tuple[Decoded, Decoded]:
        """The dense model's text that is given to all, and its greedy answer."""
        answer = decode(model, last, copy.deepcopy(cache), greedily, tokens=self.answer_tokens, ends=ends)
        if not self.temperature:
            return answer, answer
        pick = drawn(self.temperature, [self.seed * _SEEDS + done + row for row in range(len(last))])
        return decode(model, last, copy.deepcopy(cache), pick, tokens=self.answer_tokens, ends=ends), answer

    def _decoded(
        self,
        model: EvalModel,
        choice: Choice,
        last: Tensor,
        cache: DynamicCache,
        text: Decoded,
        ends: frozenset[int],
    ) -> tuple[Decoded, Decoded, tuple[float, float]]:
        """A choice on the text, its own answer, and the densities of both."""
        with choice.on(model) as run:
            steps = {"tokens": text.tokens.shape[1], "ends": frozenset()}
            follows = decode(run.model, last, copy.deepcopy(cache), given(text.tokens), **steps)
            of_text = run.decode_density()
        with choice.on(model) as run:
            answer = decode(run.model, last, copy.deepcopy(cache), greedily, tokens=self.answer_tokens, ends=ends)
            return follows, answer, (of_text, run.decode_density())

    def _blank(self, model: EvalModel, choice: Choice) -> Result:
        """The "continuation_perplexity" of a choice, without a value yet."""
        about = {"task": self.task, "phase": "decode", "answer_tokens": self.answer_tokens}
        return choice.result(
            model,
            what="continuation_perplexity",
            unit="prompts",
            context=self.context,
            text=self.text,
            cell=self.settings | about | {"temperature": self.temperature},
            seed=self.seed,
        )

    def _filled(self, blank: Result, found: Sequence[Followed], dense: Sequence[Followed]) -> Result:
        """A blank with what was found, and what the dense model made of the same texts."""
        samples = {name: [getattr(one, name) for one in found] for name in Followed._fields if name != "density"}
        samples |= {"documents": [prompt.document for prompt in self.prompts]}
        shares = [None, None]
        if blank.kind != "dense":
            shares = [sum(of) / len(of) for of in zip(*(one.density for one in found))]
            samples |= {"dense_losses": [one.losses for one in dense], "answer_density": [shares[1]]}
        value = statistics.perplexity(samples["losses"], samples["tokens"])
        return replace(blank, **value._asdict(), n=len(found), realised_density=shares[0], samples=samples)


def compared(
    follows: Decoded,
    own: Decoded,
    text: Decoded,
    answer: Decoded,
    density: tuple[float, float],
    ends: frozenset[int],
) -> list[Followed]:
    """One way of decoding beside the dense model, prompt by prompt.

    Args:
        follows: that way on the given text.
        own: its own answers.
        text: the dense model on the text that it wrote.
        answer: the dense model's answers.
        density: of the tokens of the texts and of the answers.
        ends: end tokens.
    """
    found = []
    for row in range(len(text.tokens)):
        size = len(until_end(text.tokens[row].tolist(), ends))
        ours, theirs = (until_end(of.tokens[row].tolist(), ends) for of in (own, answer))
        ended = ours[-1] in ends
        found.append(
            Followed(
                tokens=size,
                losses=float(follows.losses[row, :size].double().sum()),
                agreed=int((follows.choices[row, :size] == text.choices[row, :size]).sum()),
                common=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))),
                lengths=len(ours) - ended,
                ended=ended,
                density=density,
            )
        )
    return found


def _others(row: Result) -> list[Result]:
    """The other results of a choice, out of the samples of its "continuation_perplexity"."""
    length = replace(row, what="answer_length", samples={}, **statistics.mean(row.sampled("lengths"))._asdict())
    if row.kind == "dense":
        return [length]
    losses, base, tokens = (row.sampled(name) for name in ("losses", "dense_losses", "tokens"))
    difference = statistics.perplexity_difference(losses, base, tokens)
    agreement = statistics.share(row.sampled("agreed"), tokens)
    of_answers = {"samples": {}, "realised_density": row.sampled("answer_density")[0]}
    return [
        replace(row, what="continuation_difference", samples={}, **difference._asdict()),
        replace(row, what="continuation_agreement", samples={}, **agreement._asdict()),
        replace(row, what="answer_common", **statistics.mean(row.sampled("common"))._asdict(), **of_answers),
        replace(length, **of_answers),
    ]


@dataclass(frozen=True, kw_only=True)
class Continuation(Task):
    """A text of the dense model, and answers, after prompts that are read densely."""

    id = "continuation"

    decode_tokens: tuple[int, ...] = option((512, 256), help="Tokens that a decoded one may read.", low=1)
    answer_tokens: int = option(128, help="Tokens that are written after a prompt at most.", low=1)
    windows: int = option(1, help="Prompts out of each document, from its start; 0 for all.", low=0)
    temperature: float = option(1.0, help="Of the dense model's text; 0 for its greedy answer.", low=0)
    instruction: str = option("", help="Put the text and this after it into the model's chat template.")
    seed: int = option(0, help="Draws the dense model's text.", low=0)

    def jobs(self, setup: Setup) -> list[Job]:
        contexts, tokenizer, found = self.contexts or setup.contexts, setup.tokenizer, []
        docs = min(self.max_docs or setup.limit, setup.limit or self.max_docs) or None
        documents = read_once(tokenizer, self.sources, docs, self.windows * max(contexts) or None)
        settings = {"windows": self.windows, "data": digest(documents)}
        settings |= {"instruction": self.instruction} if self.instruction else {}
        for context in contexts:
            if setup.longest and context + self.answer_tokens > setup.longest:
                raise ValueError(
                    f"contexts and answer_tokens must be at most the model's {setup.longest} tokens together, got "
                    f"{context} and {self.answer_tokens}"
                )
            prompts = self._prompts(tokenizer, documents, context)
            inputs = [prompt.input_ids for prompt in prompts]
            about = {name: getattr(self, name) for name in ("answer_tokens", "temperature", "seed", "decode_tokens")}
            found.append(ContinuationJob(self.id, self.called, context, inputs, settings, prompts=prompts, **about))
        return found

    def _prompts(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Sequence[int]], context: int
    ) -> list[Window]:
        """Prompts of exactly ``context`` tokens."""
        count = self.windows or None
        if not self.instruction:
            return cut_windows(documents, context=context, count=count, bos_token_id=tokenizer.bos_token_id)
        head, tail = around(tokenizer, self.instruction)
        room = context - len(head) - len(tail)
        if room < 1:
            raise ValueError(
                f"contexts must have room for a text beside the instruction's {len(head) + len(tail)} tokens, got "
                f"{context}"
            )
        cut = cut_windows(documents, context=room, count=count)
        return [replace(window, input_ids=head + window.input_ids + tail) for window in cut]


def around(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[list[int], list[int]]:
    """What stands before and after the text of a prompt in the chat template, as tokens.

    Raises:
        ValueError: the tokenizer has none, or it loses the text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("instruction needs a chat template of the tokenizer, got none; leave the option out")
    message = {"role": "user", "content": f"{_HERE}\n\n{instruction}"}
    whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    head, here, tail = whole.partition(_HERE)
    if not here:
        raise ValueError("the chat template must hold what the user says, got one that leaves it out")
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail))
