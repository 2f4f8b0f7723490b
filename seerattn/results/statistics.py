"""Standard errors of what evaluation reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value and its standard error; None if one sample cannot tell."""

    value: float
    stderr: float | None


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Token-weighted perplexity of documents, with the standard error over documents.

    The mean loss is a ratio of two sums over documents, so its error follows from the documents' residuals
    ``loss - mean * tokens`` (the ratio estimator, Cochran, Sampling Techniques, section 6.3), and that of the
    perplexity from the delta method. Tokens of one document are not independent; documents are.

    Args:
        losses: summed negative log-likelihood of each document, nats.
        tokens: predicted tokens of each document.
    """
    residuals, value = _residuals(losses, tokens)
    return Estimate(value, _stderr(residuals, sum(tokens)))


def perplexity_difference(losses: Sequence[float], baseline: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Perplexity minus that of a baseline on the same documents, with the paired standard error.

    Args:
        losses: summed negative log-likelihood of each document, nats.
        baseline: the same of the baseline.
        tokens: predicted tokens of each document.
    """
    ours, value = _residuals(losses, tokens)
    theirs, base = _residuals(baseline, tokens)
    return Estimate(value - base, _stderr(ours - theirs, sum(tokens)))


def _residuals(losses: Sequence[float], tokens: Sequence[int]) -> tuple[np.ndarray, float]:
    """Each document's share of the linearised error of the perplexity, times all tokens, and the perplexity."""
    loss, weight = np.asarray(losses, float), np.asarray(tokens, float)
    mean = loss.sum() / weight.sum()
    value = math.exp(mean) if mean < 700 else math.inf
    return value * (loss - mean * weight), value


def _stderr(residuals: np.ndarray, weight: float) -> float | None:
    n = len(residuals)
    if n < 2:
        return None
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / weight)


def mean(values: Sequence[float]) -> Estimate:
    """Mean and its standard error."""
    x = np.asarray(values, float)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None)


def share(counts: Sequence[float], totals: Sequence[float]) -> Estimate:
    """A share of tokens, with its standard error over documents: the ratio estimator of `perplexity`.

    Args:
        counts: tokens of each document that count.
        totals: all tokens of each document.
    """
    count, total = np.asarray(counts, float), np.asarray(totals, float)
    value = float(count.sum() / total.sum())
    return Estimate(value, _stderr(count - value * total, total.sum()))


def proportion(successes: int, n: int) -> Estimate:
    """Share of successes with its binomial standard error, taken at ``(successes + 1) / (n + 2)``.

    The plain formula claims no error at all where every try succeeds or fails; the adjustment is that of Agresti and
    Coull (1998).
    """
    p = (successes + 1) / (n + 2)
    return Estimate(successes / n, math.sqrt(p * (1 - p) / n))
