"""Tuning: the value of a method's setting that meets a density or a time.

Methods are compared at equal realised density, or at equal time, and each has a setting of its own. A `Curve`
remembers what was measured at which setting, so several goals on the same text share their measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seerattn.hf.eval_model import EvalModel
from seerattn.methods.method import SelectorAt, Selectors

STEPS = 32
# So many halvings between two neighbours that give a value of theirs show a step. Fewer take the flat ends of a setting
# with a wide range for one.
REPEATS = 12


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        setting: the setting.
        reached: what was measured there.
        met: whether that is as near to the goal as was asked for.
    """

    setting: float
    reached: float
    met: bool


class Curve:
    """Something measured against the setting of a method, never falling on the way from sparsest to densest.

    Args:
        selectors: what is tuned.
        measure: from a setting to the measured value.
    """

    def __init__(self, selectors: Selectors, measure: Callable[[float], float]) -> None:
        self._selectors, self._measure = selectors, measure
        self._points: dict[float, float] = {}  # by the place of the setting between sparsest (0) and densest (1)

    def setting(self, place: float) -> float:
        """The setting at a place between sparsest (0) and densest (1)."""
        selectors = self._selectors
        if place in (0.0, 1.0):
            return selectors.densest if place else selectors.sparsest
        if selectors.scale == "linear":
            return selectors.sparsest + place * (selectors.densest - selectors.sparsest)
        return math.exp(math.log(selectors.sparsest) + place * math.log(selectors.densest / selectors.sparsest))

    def at(self, place: float) -> float:
        """The value at a place, measured once."""
        if place not in self._points:
            self._points[place] = self._measure(self.setting(place))
        return self._points[place]

    @property
    def measured(self) -> list[tuple[float, float]]:
        """Settings and their values so far, the sparsest first."""
        return [(self.setting(place), self._points[place]) for place in sorted(self._points)]

    def tune(self, goal: float, tolerance: float) -> Tuned:
        """Brackets the goal and closes in, by interpolation and halving in turn.

        Where a policy rounds to whole blocks a density moves in steps, and the nearest one may be further away than the
        tolerance. A step is known by its values: between two neighbours nothing but theirs is found.
        """
        least, most, found = self.at(0.0), self.at(1.0), 0
        for trial in range(STEPS):
            if abs(self._points[self._nearest(goal)] - goal) <= tolerance or not least < goal < most:
                break
            places = sorted(self._points)
            above = next(i for i, place in enumerate(places) if self._points[place] >= goal)
            low, high = places[above - 1], places[above]
            ends = self._points[low], self._points[high]
            share = (goal - ends[0]) / (ends[1] - ends[0])
            # A straight line may stay at one end for ever; half the interval never does.
            middle = self.at(
                low + (high - low) * (min(max(share, 0.02), 0.98) if trial % 2 == 0 and not found else 0.5)
            )
            found = found + 1 if middle in ends else 0
            if found == REPEATS:
                break
        nearest = self._nearest(goal)
        reached = self._points[nearest]
        return Tuned(self.setting(nearest), reached, abs(reached - goal) <= tolerance)

    def tune_density(self, goal: float, tolerance: float) -> Tuned:
        """The same for a density; at once where that is the setting, and the nearest number of blocks is taken."""
        selectors = self._selectors
        if not (selectors.is_density and selectors.sparsest <= goal <= selectors.densest):
            return self.tune(goal, tolerance)
        place = (goal - selectors.sparsest) / (selectors.densest - selectors.sparsest)
        reached = self.at(place)
        return Tuned(goal, reached, abs(reached - goal) <= tolerance)

    def _nearest(self, goal: float) -> float:
        return min(self._points, key=lambda place: (abs(self._points[place] - goal), place))


def realised_density(model: EvalModel, selector_at: SelectorAt, groups: Sequence[Sequence[Sequence[int]]]) -> float:
    """Density counted in the attached model, over all full-attention layers.

    Args:
        model: the model.
        selector_at: what gives the selector of each layer.
        groups: token ids of sequences that run together.
    """
    with model.attached(selector_at) as run, torch.inference_mode():
        for group in groups:
            run.model.base_model(input_ids=torch.tensor(group, device=model.device), use_cache=False)
        return run.density()
