import math

import pytest
import torch

from seerattn.bench.session import CheckFailed, Session, shown
from seerattn.results.file import ResultsFile, read_results

CPU = torch.device("cpu")


def make(tmp_path=None, **options):
    said = []
    session = Session(CPU, ResultsFile(tmp_path and tmp_path / "r.jsonl"), said.append, **options)
    blank = session.blank("attention_ms", model="m", context=64, impl="triton", cell={"block_q": 64})
    return session, blank, said


def test_a_finished_cell_is_found_and_not_measured_again(tmp_path) -> None:
    session, blank, _ = make(tmp_path)
    row = session.measured(blank, lambda: {"value": 2.0, "n": 3, "realised_density": 0.5}, label="x")
    assert (row.value, row.n, row.realised_density) == (2.0, 3, 0.5)
    assert row.cell["device"] == row.device and row.seconds is not None
    session, blank, said = make(tmp_path)
    assert session.measured(blank, pytest.fail, label="x") == row and said == []
    assert read_results([tmp_path / "r.jsonl"]) == [row]


def test_quantities_of_one_run_are_measured_by_one_run_and_only_missing_ones_appended(tmp_path) -> None:
    session, blank, _ = make(tmp_path)
    other = session.blank("extra_memory_mib", model="m", context=64, impl="triton", cell={"block_q": 64})
    session.measured(blank, lambda: {"value": 2.0}, label="x")
    runs = []

    def run():
        runs.append(1)
        return {"attention_ms": {"value": 9.0}, "extra_memory_mib": {"value": 5.0}}

    rows = session.measured_together([blank, other], run, label="x")
    assert [r.value for r in rows] == [2.0, 5.0] and len(runs) == 1
    assert session.measured_together([blank, other], pytest.fail, label="x") == rows
    assert len(read_results([tmp_path / "r.jsonl"])) == 2


def raising(error):
    def run():
        raise error

    return run


def test_what_fails_costs_no_other_variant_its_measurement(tmp_path) -> None:
    session, blank, said = make(tmp_path)
    assert session.measured(blank, raising(ValueError("needs a GPU")), label="x") is None
    assert session.failures == [] and said == ["left out, triton: needs a GPU"]
    for _ in range(2):
        assert session.measured(blank, raising(RuntimeError("illegal\n access")), label="x") is None
    assert session.failures == ["triton: illegal access"] and said[1:] == ["FAILED triton: illegal access"]
    assert not (tmp_path / "r.jsonl").exists()
    row = session.measured(blank, raising(torch.OutOfMemoryError("too much")), label="x")
    assert row.value is None and shown(row) == "out of memory" and session.file.find(blank) == row


def test_a_variant_that_does_not_match_its_oracle_is_not_timed() -> None:
    session, blank, said = make()
    checks, timed = [], []

    def run(error, bound):
        def check():
            checks.append(1)
            return error, bound

        session.check(f"kernel {error}", check)
        timed.append(1)
        return {"value": 1.0}

    for error in (0.2, math.nan, math.inf):
        for _ in range(2):
            assert session.measured(blank, lambda e=error: run(e, 0.1), label="x") is None
    assert len(checks) == 3 and timed == []
    assert session.failures[0] == "kernel 0.2 does not match its fp64 oracle, error 2.00e-01, bound 1.00e-01"
    assert len(session.failures) == 3
    with pytest.raises(CheckFailed):
        session.check("kernel 0.2", pytest.fail)
    assert session.measured(blank, lambda: run(0.05, 0.1), label="x").value == 1.0
    assert "checked kernel 0.05: error 5.00e-02, bound 1.00e-01" in said


def test_nothing_new_begins_after_the_time_limit() -> None:
    session, blank, _ = make(time_limit=1e-9)
    assert session.measured(blank, pytest.fail, label="the cell") is None
    assert session.left_out == ["the cell"] and session.failures == []
