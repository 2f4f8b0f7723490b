"""Perplexity of whole documents at several contexts, for the dense model and for every way of choosing blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.data.windows import Window, batches
from seerattn.eval.arms import DENSE, Arm, EvalModel, TunedArm
from seerattn.hf.chunked_loss import LOGITS_ELEMENTS, head_losses
from seerattn.hf.meters import AttentionTimes
from seerattn.results import statistics
from seerattn.results.environment import Stopwatch
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Forwards that the dense attention is timed on; other arms are timed while their perplexity is measured.
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


def attention_times(
    subject: EvalModel, arm: Arm | TunedArm, groups: Sequence[Sequence[Sequence[int]]]
) -> AttentionTimes:
    """Times of choosing blocks and of attention in the backbone, after one forward that is not timed.

    Args:
        subject: the model.
        arm: what chooses the blocks; dense attention is timed at its fastest, see `record_time`.
        groups: token ids of sequences that run together; each group is one forward.
    """
    warm_up(subject, arm, groups[0])
    with subject.attached(arm, timed=True) as run, torch.inference_mode():
        for group in groups:
            run.model.base_model(input_ids=torch.tensor(group, device=subject.device), use_cache=False)
        return run.times()


def warm_up(subject: EvalModel, arm: Arm | TunedArm, group: Sequence[Sequence[int]]) -> None:
    """Runs the backbone once, so that kernels are compiled before the clock starts."""
    with subject.observed(subject.selector(arm)) as run, torch.inference_mode():
        run.model.base_model(input_ids=torch.tensor(group, device=subject.device), use_cache=False)


def evaluate_perplexity(
    subject: EvalModel,
    arms: Sequence[Arm | TunedArm],
    windows: dict[int, list[Window]],
    output: ResultsFile,
    *,
    text: str,
    settings: dict,
    batch: int = 1,
    timed: bool = False,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> list[Result]:
    """Measures the perplexity of every arm at every context and its difference from the dense model's.

    Args:
        subject: the model.
        arms: what to measure. The dense model is measured in any case, as the baseline of the differences.
        windows: windows of text for each context.
        output: where results go; cells that it already holds are not measured again.
        text: kind of text.
        settings: limits of the data, part of what identifies a result.
        batch: windows of equal length that run together.
        timed: also take the time of choosing blocks and of attention.
        progress: called with a description and a number of windows, returns what is told of finished windows.

    Returns:
        "perplexity" and, but for dense, "perplexity_difference" of each arm and context, in that order; then, if
        timed, "attention_ms": median milliseconds of a window over all layers, with those of every forward under
        ``samples["index"]`` (choosing blocks) and ``samples["attention"]``.
    """
    rows = []
    for context, pieces in windows.items():
        baseline = None
        for arm in [DENSE, *(arm for arm in arms if arm != DENSE)]:
            blank = subject.result(arm, what="perplexity", unit="tokens", context=context, text=text, cell=settings)
            time = replace(blank, what="attention_ms", unit="forwards", cell=blank.cell | {"batch": batch})
            with output.together() as cell:
                row, times = cell.find(blank), cell.find(time)
                if row is None or (timed and times is None):
                    advance = progress(f"{arm} at {context}", len(pieces)) if progress else None
                    measured, seconds, taken = _measure(
                        subject, arm, pieces, blank, batch=batch, timed=timed, advance=advance
                    )
                    row = cell.setdefault(measured, seconds)
                rows.append(row)
                if baseline is None:
                    baseline = row
                else:
                    gap = statistics.perplexity_difference(
                        row.sampled("losses"), baseline.sampled("losses"), row.sampled("tokens")
                    )
                    difference = replace(row, what="perplexity_difference", samples={}, **gap._asdict())
                    rows.append(cell.setdefault(difference, row.seconds))
                if timed:
                    rows.append(times or cell.append(_time_row(time, row, taken), seconds))
    return rows


def _measure(
    subject: EvalModel,
    arm: Arm | TunedArm,
    pieces: Sequence[Window],
    blank: Result,
    *,
    batch: int,
    timed: bool,
    advance: Callable[[int], None] | None,
) -> tuple[Result, float, AttentionTimes | None]:
    """The perplexity of one arm, its seconds and, if asked for, its times."""
    groups = [[window.input_ids for window in group] for group in batches(pieces, batch)]
    times = None
    if timed and arm == DENSE:
        times = attention_times(subject, arm, groups[:DENSE_FORWARDS])
    elif timed and subject.device.type == "cuda":
        warm_up(subject, arm, groups[0])
    watch = Stopwatch(subject.device)
    with subject.attached(arm, timed=timed and arm != DENSE) as run:
        documents, losses, tokens = document_losses(run.model, pieces, batch=batch, advance=advance)
        if timed and times is None:
            times = run.times()
    row = replace(
        blank,
        **statistics.perplexity(losses, tokens)._asdict(),
        n=sum(tokens),
        realised_density=run.density(),
        samples={"documents": documents, "losses": losses, "tokens": tokens, "head_density": run.head_density()},
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
