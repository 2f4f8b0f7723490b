"""Tuning: the value of a family's knob that meets a density or a time.

Systems are compared at equal realised density, or at equal time, and each has a knob of its own. A `Curve` remembers
what was measured at which knob, so several goals on the same text share their measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seerattn.eval.arms import EvalModel
from seerattn.methods.family import Family, SelectorAt
from seerattn.selection.policies import TopK

STEPS = 32
# So many halvings between two neighbours that give a value of theirs show a step. Fewer take the flat ends of a knob
# with a wide range for one.
REPEATS = 12


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        knob: the knob.
        reached: what was measured there.
        met: whether that is as near to the goal as was asked for.
    """

    knob: float
    reached: float
    met: bool


class Curve:
    """Something measured against the knob of a family, never falling on the way from sparsest to densest.

    Args:
        family: what is tuned.
        measure: from a knob to the measured value.
    """

    def __init__(self, family: Family, measure: Callable[[float], float]) -> None:
        self._family, self._measure = family, measure
        self._points: dict[float, float] = {}  # by the place of the knob between sparsest (0) and densest (1)

    def knob(self, place: float) -> float:
        """The knob at a place between sparsest (0) and densest (1)."""
        family = self._family
        if place in (0.0, 1.0):
            return family.densest if place else family.sparsest
        if family.scale == "linear":
            return family.sparsest + place * (family.densest - family.sparsest)
        return math.exp(math.log(family.sparsest) + place * math.log(family.densest / family.sparsest))

    def at(self, place: float) -> float:
        """The value at a place, measured once."""
        if place not in self._points:
            self._points[place] = self._measure(self.knob(place))
        return self._points[place]

    @property
    def measured(self) -> list[tuple[float, float]]:
        """Knobs and their values so far, the sparsest first."""
        return [(self.knob(place), self._points[place]) for place in sorted(self._points)]

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
        return Tuned(self.knob(nearest), reached, abs(reached - goal) <= tolerance)

    def tune_density(self, goal: float, tolerance: float) -> Tuned:
        """The same for a density; at once where it is the knob of `TopK`, which takes the nearest number of blocks."""
        inside = self._family.scale == "linear" and self._family.sparsest <= goal <= self._family.densest
        policy = getattr(self._family.at(goal)(0), "policy", None) if inside else None
        if not isinstance(policy, TopK) or policy.rule != "same_k" or policy.density != goal:
            return self.tune(goal, tolerance)
        place = (goal - self._family.sparsest) / (self._family.densest - self._family.sparsest)
        reached = self.at(place)
        return Tuned(goal, reached, abs(reached - goal) <= tolerance)

    def _nearest(self, goal: float) -> float:
        return min(self._points, key=lambda place: (abs(self._points[place] - goal), place))


def realised_density(subject: EvalModel, selector_at: SelectorAt, groups: Sequence[Sequence[Sequence[int]]]) -> float:
    """Density counted in the attached model, over all full-attention layers.

    Args:
        subject: the model.
        selector_at: what gives the selector of each layer.
        groups: token ids of sequences that run together.
    """
    with subject.observed(selector_at) as run, torch.inference_mode():
        for group in groups:
            run.model.base_model(input_ids=torch.tensor(group, device=subject.device), use_cache=False)
        return run.density()
