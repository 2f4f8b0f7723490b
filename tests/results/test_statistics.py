import numpy as np
import pytest

from seerattn.results import statistics

LOSSES = [310.0, 640.5, 95.25, 1210.0, 402.0]
BASELINE = [300.0, 641.0, 90.0, 1180.0, 390.5]
TOKENS = [100, 211, 40, 399, 130]


def infinitesimal_jackknife(estimator, *samples: list[float]) -> float:
    """Standard error of an estimator of weighted documents from its numerical derivatives by the weights."""
    n, step = len(samples[0]), 1e-6
    slopes = []
    for i in range(n):
        up, down = np.ones(n), np.ones(n)
        up[i] += step
        down[i] -= step
        slopes.append((estimator(up, *map(np.array, samples)) - estimator(down, *map(np.array, samples))) / (2 * step))
    return np.sqrt(n / (n - 1) * np.square(slopes).sum())


def weighted_perplexity(weights, losses, tokens):
    return np.exp((weights * losses).sum() / (weights * tokens).sum())


def test_perplexity_matches_numpy_and_its_error_the_infinitesimal_jackknife() -> None:
    value, stderr = statistics.perplexity(LOSSES, TOKENS)
    assert value == pytest.approx(np.exp(np.sum(LOSSES) / np.sum(TOKENS)))
    assert stderr == pytest.approx(infinitesimal_jackknife(weighted_perplexity, LOSSES, TOKENS), rel=1e-5)


def test_paired_error_matches_the_infinitesimal_jackknife_and_is_smaller_than_either_error() -> None:
    value, stderr = statistics.perplexity_difference(LOSSES, BASELINE, TOKENS)

    def difference(weights, losses, baseline, tokens):
        return weighted_perplexity(weights, losses, tokens) - weighted_perplexity(weights, baseline, tokens)

    assert value == pytest.approx(difference(np.ones(5), np.array(LOSSES), np.array(BASELINE), np.array(TOKENS)))
    assert stderr == pytest.approx(infinitesimal_jackknife(difference, LOSSES, BASELINE, TOKENS), rel=1e-5)
    assert stderr < statistics.perplexity(LOSSES, TOKENS).stderr


def test_error_of_equal_documents_matches_the_textbook_formula() -> None:
    losses = np.array([200.0, 230.0, 250.0])
    value, stderr = statistics.perplexity(list(losses), [100] * 3)
    assert stderr == pytest.approx(value * (losses / 100).std(ddof=1) / np.sqrt(3))


def test_one_document_has_no_error() -> None:
    assert statistics.perplexity([100.0], [50]).stderr is None
    assert statistics.mean([3.0]) == (3.0, None)


def test_mean_matches_numpy() -> None:
    assert statistics.mean(LOSSES) == pytest.approx((np.mean(LOSSES), np.std(LOSSES, ddof=1) / np.sqrt(5)))


def test_error_of_a_share_is_the_binomial_one_of_an_adjusted_share_and_never_zero() -> None:
    assert statistics.proportion(30, 100).value == 0.3
    assert statistics.proportion(3000, 10000).stderr == pytest.approx(np.sqrt(0.3 * 0.7 / 10000), rel=1e-3)
    assert statistics.proportion(20, 20) == pytest.approx((1.0, np.sqrt(21 / 22 * 1 / 22 / 20)))
