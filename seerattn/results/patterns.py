"""Which known pattern a choice of blocks resembles: A-shape, vertical, slash, or a mixture.

Systems of fixed patterns give each head one of these shapes beforehand (MInference, arXiv 2407.02490, section 2); a
learned gate is told of none. Only *decided* blocks are looked at: causal ones that are not kept in any case. Of the
``n`` decided blocks that were chosen, `held` is the share in the best mask of a shape with ``n`` blocks. Such a mask is

- ``a_shape``: the first ``s`` key-block columns, then whole diagonals from the newest on; the best ``s``,
- ``vertical``: whole key-block columns, the best ones,
- ``slash``: whole diagonals, lines of equal distance from the diagonal block, the best ones.

If ``n`` ends inside of a column or diagonal, that is taken in part and holds the same part of what was chosen there. So
columns or diagonals in order of their share of chosen blocks are exactly the best ones (a fractional knapsack).

More columns are free to be chosen than ends of an A-shape, and the best of many fit even noise. So `score` compares
with random masks of as many blocks in every row, each fitted in the same way: 0 is their average, 1 is all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from seerattn.results.maps import BlockMaps

Shape = Literal["a_shape", "vertical", "slash"]
Label = Literal["a_shape", "vertical", "slash", "mixed", "none"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

# A head has a shape if that explains at least half of what chance leaves to be explained.
CLEAR = 0.5
# Scores this near to each other are equal: a band is also the slash of the newest diagonals, give or take a few blocks.
EQUAL = 0.05
# Over 8 masks the mean share that chance holds has a standard error below 0.01 from 32 x 32 blocks on.
DRAWS = 8


@dataclass(frozen=True)
class Pattern:
    """How well each shape explains the chosen blocks of one head.

    Attributes:
        label: the shape of highest score, of those within `EQUAL` of it the first in `SHAPES`; "mixed" if it is below
            `CLEAR`; "none" where no decided block was chosen or all were.
        held: by shape, the share of the chosen blocks in the best mask of that shape; empty for "none".
        score: the same between chance (0) and all (1), below 0 where chance does better; empty for "none".
    """

    label: Label
    held: dict[Shape, float]
    score: dict[Shape, float]


def find_pattern(chosen: np.ndarray, forced: np.ndarray) -> Pattern:
    """Names the pattern of the chosen blocks of one head.

    Args:
        chosen: bool ``[Nq, Nk]``; what lies above the diagonal or is forced is ignored.
        forced: bool ``[Nq, Nk]``, blocks kept in any case; the last one of a row is its diagonal block.

    Raises:
        ValueError: the masks differ in shape, or a row has no forced block.
    """
    if chosen.shape != forced.shape or chosen.ndim != 2 or not forced.any(-1).all():
        raise ValueError(
            "chosen and forced must be masks of equal shape [Nq, Nk] with a forced block in every row, "
            f"got {chosen.shape} and {forced.shape}"
        )
    age = _age(forced)
    decided = (age >= 0) & ~forced
    chosen = chosen & decided
    if not chosen.any() or (chosen == decided).all():
        return Pattern("none", {}, {})
    held = _held(chosen, decided, age)
    rng = np.random.default_rng(0)
    counts = chosen.sum(-1, keepdims=True)
    masks = (_first(np.where(decided, rng.random(decided.shape), -1.0), counts) for _ in range(DRAWS))
    drawn = [_held(mask, decided, age) for mask in masks]
    score = {}
    for shape, share in held.items():
        chance = float(np.mean([one[shape] for one in drawn]))
        # Where few blocks are left to choose from, any mask may hold everything.
        score[shape] = (share - chance) / (1 - chance) if chance < 1 else 0.0
    best = max(score.values())
    label: Label = next(shape for shape in SHAPES if score[shape] >= best - EQUAL) if best >= CLEAR else "mixed"
    return Pattern(label, held, score)


def find_patterns(maps: BlockMaps) -> list[tuple[Pattern, Pattern]]:
    """Patterns of each head of a file: of the chosen blocks, and of the oracle's choice of as many in every row."""
    decided = maps.decided
    found = []
    for target, chosen in zip(maps.target, maps.chosen):
        counts = (chosen & decided).sum(-1, keepdims=True)
        best = _first(np.where(decided, target, -1.0), counts)
        found.append((find_pattern(chosen, maps.forced), find_pattern(best, maps.forced)))
    return found


def _age(forced: np.ndarray) -> np.ndarray:
    """Distance of each key block from the diagonal block of its row, in key blocks; negative after it."""
    width = forced.shape[1]
    diagonal = width - 1 - forced[:, ::-1].argmax(-1)
    return diagonal[:, None] - np.arange(width)


def _first(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mask of the ``counts`` highest scores of each row."""
    ranks = (-scores).argsort(-1, kind="stable").argsort(-1, kind="stable")
    return ranks < counts


def _held(chosen: np.ndarray, decided: np.ndarray, age: np.ndarray) -> dict[Shape, float]:
    """Share of the chosen blocks in the best mask of each shape with as many blocks."""
    n = int(chosen.sum())
    columns, ages = decided.shape[1], int(age.max()) + 1
    place = np.arange(columns) * ages + age
    # Decided and chosen blocks by column and age.
    area, hits = (
        np.bincount(place[mask], minlength=columns * ages).reshape(columns, ages).astype(float)
        for mask in (decided, chosen)
    )
    return {
        "a_shape": _best_a_shape(area, hits, n) / n,
        "vertical": _best_lines(area.sum(1), hits.sum(1), n) / n,
        "slash": _best_lines(area.sum(0), hits.sum(0), n) / n,
    }


def _best_lines(area: np.ndarray, hits: np.ndarray, n: int) -> float:
    """Chosen blocks in ``n`` blocks' worth of lines, fullest first."""
    order = np.argsort(-hits / np.maximum(area, 1), kind="stable")
    return _taken(area[order], hits[order], n)


def _best_a_shape(area: np.ndarray, hits: np.ndarray, n: int) -> float:
    """Chosen blocks in ``n`` blocks' worth of first columns and newest diagonals, over all numbers of columns."""
    # What is left for diagonals beside the first s columns is a sum over the columns from s on.
    left_area = np.concatenate([area[::-1].cumsum(0)[::-1], np.zeros_like(area[:1])])
    left_hits = np.concatenate([hits[::-1].cumsum(0)[::-1], np.zeros_like(hits[:1])])
    best = 0.0
    for s in range(len(area) + 1):
        lines_area = np.concatenate([area[:s].sum(1), left_area[s]])
        lines_hits = np.concatenate([hits[:s].sum(1), left_hits[s]])
        best = max(best, _taken(lines_area, lines_hits, n))
        if lines_area[:s].sum() >= n:
            break
    return best


def _taken(area: np.ndarray, hits: np.ndarray, n: int) -> float:
    """Chosen blocks in the first ``n`` blocks of these lines, the last line taken in part."""
    part = np.clip((n - (area.cumsum() - area)) / np.maximum(area, 1), 0.0, 1.0)
    return float((hits * part).sum())
