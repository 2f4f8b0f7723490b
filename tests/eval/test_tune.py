import math

import pytest
import torch

from seerattn.data.windows import cut_windows
from seerattn.eval.tune import STEPS, Curve, realised_density
from seerattn.methods.method import Selectors
from seerattn.methods.streaming import Streaming


def selectors(sparsest: float, densest: float, scale: str = "linear") -> Selectors:
    return Selectors(lambda setting: lambda layer: None, sparsest, densest, scale)


def counted(measure):
    seen = []

    def see(setting: float) -> float:
        seen.append(setting)
        return measure(setting)

    return see, seen


@pytest.mark.parametrize("goal", [0.05, 0.1, 0.3, 0.7])
@pytest.mark.parametrize(
    ("tuned_on", "density", "inverse"),
    [
        (selectors(0, 1), lambda x: x**3, lambda d: d ** (1 / 3)),
        (selectors(1, 1e-6, "log"), lambda x: -math.log10(x) / 6, lambda d: 10 ** (-6 * d)),
        (selectors(8, -40), lambda x: 1 / (1 + math.exp(x)), lambda d: math.log(1 / d - 1)),
        # All of the change lies in the last thousandth of the range.
        (selectors(0, 1), lambda x: max(0.0, (x - 0.999) * 1000), lambda d: 0.999 + d / 1000),
    ],
    ids=["cubic", "log", "sigmoid", "late"],
)
def test_tuning_meets_a_continuous_density(tuned_on, density, inverse, goal: float) -> None:
    measure, seen = counted(density)
    tuned = Curve(tuned_on, measure).tune(goal, 0.003)
    assert tuned.met and abs(tuned.reached - goal) <= 0.003 and tuned.reached == density(tuned.setting)
    low, high = sorted((inverse(max(goal - 0.0031, 1e-9)), inverse(goal + 0.0031)))
    assert low <= tuned.setting <= high
    assert len(seen) <= STEPS + 2


@pytest.mark.parametrize("steps", [5, 16, 33])
def test_tuning_finds_the_nearest_step_of_a_quantised_density(steps: int) -> None:
    curve = Curve(selectors(0, 1), lambda x: (1 + round(x * (steps - 1))) / steps)
    levels = [(1 + i) / steps for i in range(steps)]
    for goal in (0.07, 0.21, 0.5, 0.93):
        tuned = curve.tune(goal, 0.003)
        assert tuned.reached == min(levels, key=lambda level: (abs(level - goal), level))


def test_goals_beyond_the_ends_give_the_ends() -> None:
    curve = Curve(selectors(0, 1), lambda x: 0.2 + 0.6 * x)
    low, high = curve.tune(0.1, 0.003), curve.tune(0.9, 0.003)
    assert (low.setting, low.reached, low.met) == (0, 0.2, False)
    assert (high.setting, high.met) == (1, False) and high.reached == pytest.approx(0.8)


def test_goals_share_what_was_measured() -> None:
    measure, seen = counted(lambda x: x)
    curve = Curve(selectors(0, 1), measure)
    curve.tune(0.3, 0.003)
    before = len(seen)
    assert curve.tune(0.3, 0.003).reached == pytest.approx(0.3, abs=0.003) and len(seen) == before
    curve.tune(0.1, 0.003)
    assert len(set(seen)) == len(seen) and [setting for setting, _ in curve.measured] == sorted(seen)


def test_tuned_streaming_is_the_nearest_number_of_blocks(model, documents) -> None:
    groups = [[window.input_ids for window in cut_windows(documents, context=450, count=1, bos_token_id=1)]]
    streaming = Streaming(block_q=32, block_k=32).selectors()
    curve = Curve(streaming, lambda setting: realised_density(model, streaming.at(setting), groups))
    causal = torch.arange(1, 16)
    # A sink and the diagonal are kept in any case: one block in the first row, two in the others.
    levels = [float(torch.minimum(causal, torch.tensor(k)).sum() / causal.sum()) for k in range(2, 16)]
    for goal in (0.3, 0.5, 0.77):
        nearest = min(levels, key=lambda level: abs(level - goal))
        for tuned in (curve.tune(goal, 0.003), curve.tune_density(goal, 0.003)):
            # The levels are quotients in fp32.
            assert tuned.reached == pytest.approx(nearest, abs=1e-6)
            assert tuned.met == (abs(nearest - goal) <= 0.003)
    before = len(curve.measured)
    assert curve.tune_density(0.62, 0.003).setting == 0.62 and len(curve.measured) == before + 1
