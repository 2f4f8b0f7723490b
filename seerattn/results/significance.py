"""The guard beside a score of a task: what sparse attention changed, and whether chance explains it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from seerattn.extras import check_extra
from seerattn.results import statistics
from seerattn.results.record import Result

LEVEL = 0.05
_FLIPS = 9999  # exact up to 13 differences, drawn above
_SEED = 0


def guard(sparse: Result, dense: Result) -> Result:
    """The difference of two scores of one metric, and whether chance explains it.

    Where documents have scores, the error is that of their paired differences, and the test a permutation test that
    flips the signs of the differences, exact up to 13 that are not zero: it holds for few documents and for scores that
    are right or wrong. Elsewhere the errors are taken as independent and the test is a z-test.

    Args:
        sparse: a "task_score".
        dense: that of the dense model on the same documents.
    """
    ours, theirs = sparse.sampled("scores"), dense.sampled("scores")
    difference = sparse.value - dense.value
    if ours and theirs:
        gaps = np.subtract(ours, theirs)
        stderr, p, test = statistics.mean(gaps).stderr, _sign_flips(gaps), "paired sign flips"
    elif sparse.stderr is None or dense.stderr is None:
        stderr, p, test = None, None, None
    else:
        stderr, test = math.hypot(sparse.stderr, dense.stderr), "z-test, unpaired"
        p = math.erfc(abs(difference) / stderr / math.sqrt(2)) if stderr else float(difference == 0)
    note = {}
    if p is not None and p < LEVEL:
        than = "lower" if difference < 0 else "higher"
        note = {
            "note": f"significantly {than} than dense: {sparse.value:.4g}, not {dense.value:.4g} (p {p:.2g}, {test})"
        }
    return replace(
        sparse,
        what="task_guard",
        value=difference,
        stderr=stderr,
        samples={"score": [sparse.value], "dense": [dense.value], "p": [p], "test": [test]},
        cell=sparse.cell | note,
    )


def _sign_flips(gaps: np.ndarray) -> float:
    """Two-sided p-value of the mean of paired differences, whose signs are even chances if nothing differs."""
    check_extra("eval", "a test of significance")
    from scipy.stats import permutation_test

    gaps = gaps[gaps != 0]  # their signs change nothing
    if len(gaps) < 2:
        return 1.0
    found = permutation_test(
        (gaps, np.zeros_like(gaps)),
        lambda ours, theirs, axis: (ours - theirs).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        rng=np.random.default_rng(_SEED),
    )
    return float(found.pvalue)
