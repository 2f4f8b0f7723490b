"""Perplexity of whole documents, for the dense model and for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seerattn.data.windows import Window, batches, cut_windows, digest, token_documents
from seerattn.eval.choice import DENSE, Choice
from seerattn.eval.tasks.task import Job, Progress, Setup, Task
from seerattn.hf.chunked_loss import LOGITS_ELEMENTS, head_losses
from seerattn.hf.eval_model import EvalModel
from seerattn.hf.meters import AttentionTimes
from seerattn.options import option
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Forwards that the dense attention is timed on; others are timed while their perplexity is measured.
DENSE_FORWARDS = 4


@torch.inference_mode()
def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, fp32 ``[B, T - 1]``.

    The backbone runs once, and the model's own head on pieces of the hidden states, so logits of ``T`` tokens times
    the vocabulary are never held.

    Args:
        model: a causal language model.
        input_ids: ``[B, T]``, no padding.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return head_losses(model, hidden[:, :-1], input_ids[:, 1:], elements=LOGITS_ELEMENTS)


def document_losses(
    model: PreTrainedModel, windows: Sequence[Window], *, batch: int = 1, advance: Callable[[int], None] | None = None
) -> tuple[list[int], list[float], list[int]]:
    """Losses of windows, summed per document.

    Args:
        model: a causal language model.
        windows: windows of documents.
        batch: windows of equal length that run together.
        advance: told the number of windows done.

    Returns:
        Numbers of the documents, their summed losses and their predicted tokens.
    """
    losses: dict[int, float] = {}
    tokens: dict[int, int] = {}
    for group in batches(windows, batch):
        input_ids = torch.tensor([window.input_ids for window in group], device=model.device)
        sums = token_losses(model, input_ids).double().sum(1).tolist()
        for window, loss in zip(group, sums):
            losses[window.document] = losses.get(window.document, 0.0) + loss
            tokens[window.document] = tokens.get(window.document, 0) + len(window.input_ids) - 1
        if advance is not None:
            advance(len(group))
    return list(losses), list(losses.values()), list(tokens.values())


def attention_times(model: EvalModel, choice: Choice, groups: Sequence[Sequence[Sequence[int]]]) -> AttentionTimes:
    """Times of choosing blocks and of attention in the backbone, after one forward that is not timed.

    Args:
        model: the model.
        choice: what chooses the blocks; dense attention is timed at its fastest, see `record_time`.
        groups: token ids of sequences that run together; each group is one forward.
    """
    warm_up(model, choice, groups[0])
    with choice.on(model, timed=True) as run, torch.inference_mode():
        for group in groups:
            run.model.base_model(input_ids=torch.tensor(group, device=model.device), use_cache=False)
        return run.times()


def warm_up(model: EvalModel, choice: Choice, group: Sequence[Sequence[int]]) -> None:
    """Runs the backbone once, so that kernels are compiled before the clock starts."""
    with model.attached(choice.selector_at) as run, torch.inference_mode():
        run.model.base_model(input_ids=torch.tensor(group, device=model.device), use_cache=False)


@dataclass(frozen=True, eq=False)
class PerplexityJob(Job):
    """Windows of documents, whose next tokens are predicted.

    Attributes:
        windows: the windows, all of one length.
        timed: also take the time of choosing blocks and of attention.
    """

    windows: list[Window] = field(default_factory=list)
    timed: bool = True

    beside_dense = True

    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Measures the perplexity of every choice and its difference from the dense model's, which is measured first.

        Returns:
            "perplexity" and, but for dense, "perplexity_difference" of each choice; then, if timed, "attention_ms":
            median milliseconds of a window over all layers, with those of every forward under ``samples["index"]``
            (choosing blocks) and ``samples["attention"]``.
        """
        baseline, rows = None, []
        for choice in [DENSE, *(choice for choice in choices if not choice.is_dense)]:
            blank = choice.result(
                model, what="perplexity", unit="tokens", context=self.context, text=self.text, cell=self.settings
            )
            time = replace(blank, what="attention_ms", unit="forwards", cell=blank.cell | {"batch": batch})
            found = []
            with output.together() as cell:
                row, times = cell.find(blank), cell.find(time)
                if row is None or (self.timed and times is None):
                    advance = progress(f"{choice} at {self.context}", len(self.windows)) if progress else None
                    measured, seconds, taken = self._measure_one(model, choice, blank, batch=batch, advance=advance)
                    row = cell.setdefault(measured, seconds)
                found.append(row)
                if baseline is None:
                    baseline = row
                else:
                    gap = statistics.perplexity_difference(
                        row.sampled("losses"), baseline.sampled("losses"), row.sampled("tokens")
                    )
                    difference = replace(row, what="perplexity_difference", samples={}, **gap._asdict())
                    found.append(cell.setdefault(difference, row.seconds))
                if self.timed:
                    found.append(times or cell.append(_time_row(time, row, taken), seconds))
            if not choice.is_dense or any(one.is_dense for one in choices):
                rows += found
        return rows

    def _measure_one(
        self,
        model: EvalModel,
        choice: Choice,
        blank: Result,
        *,
        batch: int,
        advance: Callable[[int], None] | None,
    ) -> tuple[Result, float, AttentionTimes | None]:
        """The perplexity of one choice, its seconds and, if asked for, its times."""
        groups = [[window.input_ids for window in group] for group in batches(self.windows, batch)]
        times = None
        if self.timed and choice.is_dense:
            times = attention_times(model, choice, groups[:DENSE_FORWARDS])
        elif self.timed and model.device.type == "cuda":
            warm_up(model, choice, groups[0])
        watch = Stopwatch(model.device)
        with choice.on(model, timed=self.timed and not choice.is_dense) as run:
            documents, losses, tokens = document_losses(run.model, self.windows, batch=batch, advance=advance)
            if self.timed and times is None:
                times = run.times()
        samples = {"documents": documents, "losses": losses, "tokens": tokens, "head_density": run.head_density()}
        row = replace(
            blank,
            **statistics.perplexity(losses, tokens)._asdict(),
            n=sum(tokens),
            realised_density=run.density(),
            samples=samples | ({"skipped": [skipped]} if (skipped := run.skipped()) else {}),
        )
        return row, watch.seconds(), times


def _time_row(blank: Result, row: Result, times: AttentionTimes) -> Result:
    """The times that were taken with a perplexity."""
    totals = [index + attention for index, attention in zip(*times)]
    return replace(
        blank,
        value=median(totals),
        n=len(totals),
        realised_density=row.realised_density,
        samples=times._asdict(),
    )


@dataclass(frozen=True, kw_only=True)
class WindowTask(Task):
    """A task on windows of documents, from their start."""

    windows: int = option(1, help="Windows of each document; 0 for all.", low=0)
    min_tokens: int = option(0, help="Also keep shorter windows of so many tokens; 0 keeps full ones alone.", low=0)

    def cut(self, setup: Setup) -> tuple[dict[int, list[Window]], dict[str, Any]]:
        """The windows of every context, and what identifies them.

        Raises:
            ValueError: no document is so long.
        """
        contexts, tokenizer = self.contexts or setup.contexts, setup.tokenizer
        docs = min(self.max_docs or setup.limit, setup.limit or self.max_docs) or None
        tokens = self.windows * max(contexts) or None
        documents = read_once(tokenizer, self.sources, docs, tokens)
        settings = {"windows": self.windows, "min_tokens": self.min_tokens, "data": digest(documents)}
        cut = {
            context: cut_windows(
                documents,
                context=context,
                count=self.windows or None,
                min_tokens=self.min_tokens or None,
                bos_token_id=tokenizer.bos_token_id,
            )
            for context in contexts
        }
        return cut, settings


@lru_cache(maxsize=8)
def read_once(
    tokenizer: PreTrainedTokenizerBase, sources: tuple[str, ...], limit: int | None, tokens: int | None
) -> list[list[int]]:
    """`token_documents`, remembered: several tasks of an experiment use the same text."""
    return token_documents(sources, tokenizer, limit=limit, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Perplexity(WindowTask):
    """Perplexity of whole documents."""

    id = "perplexity"

    timed: bool = option(True, help="Also take the time of choosing blocks and of attention.")

    def jobs(self, setup: Setup) -> list[Job]:
        cut, settings = self.cut(setup)
        return [
            PerplexityJob(
                self.id,
                self.called,
                context,
                [window.input_ids for window in windows],
                settings,
                windows=windows,
                timed=self.timed,
            )
            for context, windows in cut.items()
        ]
