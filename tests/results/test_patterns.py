"""Patterns of block masks, against masks with a planted pattern and against slow searches."""

import numpy as np
import pytest
from scipy.optimize import linprog

from seerattn.results.maps import BlockMaps
from seerattn.results.patterns import CLEAR, SHAPES, find_pattern, find_patterns

N = 48


def forced_mask(rows: int = N, ratio: int = 1) -> np.ndarray:
    """Sink column and diagonal, with `ratio` key blocks a query block."""
    last = (np.arange(rows) + 1) * ratio - 1
    columns = np.arange(rows * ratio)
    return (columns <= last[:, None]) & ((columns == 0) | (columns > last[:, None] - ratio))


def ages(forced: np.ndarray) -> np.ndarray:
    """Distance from the last forced block of each row."""
    last = np.array([np.flatnonzero(row).max() for row in forced])
    return last[:, None] - np.arange(forced.shape[1])


def planted(shape: str, ratio: int = 1) -> np.ndarray:
    age, column = ages(forced_mask(ratio=ratio)), np.arange(N * ratio)[None]
    return {
        "a_shape": (column < 4) | (age < 5),
        "vertical": np.isin(column, [7, 19, 20, 31]) | (age < 0),
        "slash": np.isin(age, [9, 17, 30]),
    }[shape]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1, 2])
def test_planted_pattern_is_found_and_held_whole(shape: str, ratio: int) -> None:
    pattern = find_pattern(planted(shape, ratio), forced_mask(ratio=ratio))
    assert pattern.label == shape
    assert pattern.held[shape] == pytest.approx(1.0) and pattern.score[shape] == pytest.approx(1.0)
    others = [pattern.score[other] for other in SHAPES if other != shape]
    assert max(others) < 0.9


def test_window_of_recent_blocks_is_an_a_shape_and_not_a_slash() -> None:
    age = ages(forced_mask())
    pattern = find_pattern((age >= 0) & (age < 6), forced_mask())
    assert pattern.label == "a_shape" and pattern.held["slash"] == pytest.approx(1.0)


def test_pattern_with_noise_keeps_its_label_and_loses_score() -> None:
    rng = np.random.default_rng(1)
    chosen = planted("slash")
    noisy = np.where(rng.random(chosen.shape) < 0.05, ~chosen, chosen)
    pattern = find_pattern(noisy, forced_mask())
    assert pattern.label == "slash" and CLEAR < pattern.score["slash"] < 0.9


def test_random_blocks_score_zero_for_every_shape_although_they_are_held_in_part() -> None:
    forced = forced_mask()
    decided = (ages(forced) >= 0) & ~forced
    scores = []
    for seed in range(8):
        draw = np.where(decided, np.random.default_rng(100 + seed).random(decided.shape), -1.0)
        chosen = draw >= np.sort(draw, -1)[:, [-6]]
        pattern = find_pattern(chosen, forced)
        assert pattern.label == "mixed" and min(pattern.held.values()) > 0.1
        scores.append([pattern.score[shape] for shape in SHAPES])
    # 8 masks and the 8 that chance is taken from leave an error of about .01.
    assert np.abs(np.mean(scores, 0)).max() < 0.03


def test_half_columns_and_half_diagonals_are_mixed() -> None:
    age, column = ages(forced_mask()), np.arange(N)[None]
    chosen = np.isin(column, [5, 11, 17, 23, 29]) | np.isin(age, [8, 15, 22, 28])
    rng = np.random.default_rng(0)
    pattern = find_pattern(chosen & (rng.random(chosen.shape) < 0.8), forced_mask())
    assert pattern.label == "mixed"


def test_held_shares_match_linear_programs_and_a_slow_search() -> None:
    rng = np.random.default_rng(3)
    forced = forced_mask(13, 2)
    age, columns = ages(forced), np.arange(26)
    decided = (age >= 0) & ~forced
    chosen = (rng.random(decided.shape) < 0.25 + 0.5 * (columns % 5 == 0)) & decided
    n, held = chosen.sum(), find_pattern(chosen, forced).held

    def best_lines(lines: list[np.ndarray]) -> float:
        area = np.array([(line & decided).sum() for line in lines])
        hits = np.array([(line & chosen).sum() for line in lines])
        return -linprog(-hits, A_ub=area[None], b_ub=[n], bounds=(0, 1)).fun / n

    assert held["vertical"] == pytest.approx(best_lines([np.broadcast_to(columns == j, age.shape) for j in columns]))
    assert held["slash"] == pytest.approx(best_lines([age == a for a in range(26)]))

    def in_order(lines: list[np.ndarray]) -> float:
        left, found, rest = n, 0.0, decided.copy()
        for line in lines:
            area = (line & rest).sum()
            part = min(1.0, left / area) if area else 0.0
            found += part * (line & rest & chosen).sum()
            left, rest = left - part * area, rest & ~line
        return found / n

    tries = [
        in_order([np.broadcast_to(columns == j, age.shape) for j in range(s)] + [age == a for a in range(26)])
        for s in range(27)
    ]
    assert held["a_shape"] == pytest.approx(max(tries))


def test_forced_and_later_blocks_make_no_difference() -> None:
    chosen, forced = planted("vertical"), forced_mask()
    above = ages(forced) < 0
    assert find_pattern(chosen | forced | above, forced) == find_pattern(chosen & ~forced & ~above, forced)


def test_head_that_chose_nothing_or_all_has_no_pattern() -> None:
    forced = forced_mask()
    for chosen in (forced, np.ones_like(forced)):
        pattern = find_pattern(chosen, forced)
        assert (pattern.label, pattern.held, pattern.score) == ("none", {}, {})


def test_true_map_is_cut_to_as_many_blocks_in_every_row_as_the_gate_chose() -> None:
    forced = forced_mask()
    target = np.where(planted("vertical"), 1.0, 1e-3 * np.random.default_rng(0).random((N, N)))
    target = np.tril(target)[None]
    # The gate sees slashes where the truth has columns.
    chosen = (planted("slash") | forced)[None]
    maps = BlockMaps([(0, 0)], target, target, chosen, forced, "g", 0.1)
    ((mine, true),) = find_patterns(maps)
    assert mine.label == "slash" and true.label == "vertical"


def test_find_pattern_rejects_masks_of_other_shapes_and_rows_without_a_forced_block() -> None:
    with pytest.raises(ValueError, match="equal shape"):
        find_pattern(np.ones((4, 4), bool), np.ones((4, 5), bool))
    with pytest.raises(ValueError, match="forced block in every row"):
        find_pattern(np.ones((4, 4), bool), np.zeros((4, 4), bool))
