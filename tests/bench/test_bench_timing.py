import time

import numpy as np
import pytest
import torch

from seerattn.bench import timing

CPU = torch.device("cpu")


def test_fields_hold_median_and_quantiles_of_the_runs() -> None:
    runs = (3.0, 1.0, 2.0, 10.0)
    fields = timing.Timing(runs).fields()
    assert fields["value"] == 2.5 and fields["n"] == 4
    assert fields["samples"]["ms"] == pytest.approx(np.quantile(runs, [0, 0.2, 0.5, 0.8, 1]))


@pytest.mark.parametrize("clock", [timing.device_time, timing.pipeline_time])
def test_times_are_those_of_one_call_in_milliseconds_whatever_the_burst(clock) -> None:
    calls = []

    def run():
        calls.append(1)
        time.sleep(0.002)

    found = clock(run, CPU, budget_ms=60.0)
    assert len(found.runs) >= 3 and len(calls) > len(found.runs)
    # A sleep never ends early; on a busy machine it may end much later, but not every time.
    assert 2.0 <= min(found.runs) < 5.0


def test_long_runs_are_repeated_twice_and_short_ones_as_asked(monkeypatch) -> None:
    seconds, results = timing.long_runs(iter(range(9)).__next__, CPU, repeats=4)
    assert len(seconds) == 4 and results == [0, 1, 2, 3]
    monkeypatch.setattr(timing, "LONG_RUN", 0.0)
    assert len(timing.long_runs(lambda: None, CPU, repeats=4)[0]) == 2
