"""Prism against its formula in fp64, one number at a time."""

import math
from dataclasses import replace

import pytest
from baseline_calls import CONTEXT, calls, kept, rows_of, softmax

from seerattn.methods.prism import PrismSelector, channels_by_frequency
from seerattn.selection.selector import RotaryTables

LAYOUTS = {
    "half": (None, lambda d: [c for i in range(d // 2) for c in (i, i + d // 2)]),
    "interleaved": (RotaryTables(width=32, interleaved=True), lambda d: list(range(d))),
    "partial": (
        RotaryTables(width=16),
        lambda d: [*(c for i in range(8) for c in (i, i + 8)), *range(16, d)],
    ),
}


def expected(q, k, head: int, block: int, p: float, order: list[int]) -> dict[int, set[int]]:
    """The blocks of each absolute query block by the formula, in fp64."""
    q_len, k_len, dim = q.shape[2], k.shape[2], q.shape[3]
    q, k = q[0, head].double(), k[0, head * k.shape[1] // q.shape[1]].double()
    rows = rows_of(q_len, k_len, block)
    mean_q = {r: q[[p - (k_len - q_len) for p in places]].mean(0) for r, places in rows.items()}
    mean_k = [k[b * block : (b + 1) * block].mean(0) for b in range(-(-k_len // block))]

    def size(vectors, channels) -> float:
        return math.sqrt(sum(float(v[c]) ** 2 for v in vectors for c in channels) / len(vectors) / len(channels))

    found = {r: {0, r} for r in rows}
    for channels in (order[: dim // 2], order[dim // 4 :]):
        share = math.sqrt(len(channels) / dim)
        parts = [size(v, channels) / size(v, range(dim)) for v in (list(mean_q.values()), mean_k)]
        scale = math.sqrt(len(channels)) * share * parts[0] * parts[1]
        for r in rows:
            scores = [sum(float(mean_q[r][c] * mean_k[b][c]) for c in channels) / scale for b in range(r + 1)]
            probabilities = softmax(scores)
            reached = 0.0
            for b in sorted(range(r + 1), key=lambda b, x=probabilities: -x[b]):
                if reached >= p:
                    break
                found[r].add(b)
                reached += probabilities[b]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("q_len", "k_len"), [(320, 320), (333, 333), (70, 333)])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.8])
def test_prism_matches_its_formula(layout: str, q_len: int, k_len: int, p: float) -> None:
    rotary, order = LAYOUTS[layout]
    q, k = calls(q_len, k_len)
    mask = PrismSelector(p, 32).select(q, k, replace(CONTEXT, rotary=rotary)).to_mask()
    for head in range(q.shape[1]):
        wanted = expected(q, k, head, 32, p, order(32))
        assert kept(mask[0, head * mask.shape[1] // q.shape[1]], (k_len - q_len) // 32) == wanted


def test_channels_are_ordered_from_fast_to_slow_whatever_the_layout() -> None:
    for rotary, order in LAYOUTS.values():
        assert channels_by_frequency(32, rotary) == order(32)


def test_all_of_the_share_is_all_of_the_blocks() -> None:
    """Rounding would leave out the last ones."""
    assert PrismSelector(1.0, 32).select(*calls(1000, 1000), CONTEXT).density().min() == 1


def test_prism_rejects_a_share_that_is_none() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p must"):
            PrismSelector(p)
