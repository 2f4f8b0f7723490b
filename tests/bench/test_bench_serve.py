"""Requests that are timed: what they ask of the engine, and that a wrong answer is not timed."""

from pathlib import Path

import pytest
import torch

from seerattn.bench.model import TINY
from seerattn.bench.serve import ServeBench
from seerattn.bench.session import Session
from seerattn.hf import paged
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result
from seerattn.serve.engine import Ask, Engine

CPU = torch.device("cpu")
OPTIONS = {"model": "tiny", "contexts": (300, 200), "densities": (0.3,), "repeats": 2, "answer": 5, "batch_tokens": 256}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """What the engine is asked, in order."""
    asked: list[Ask] = []
    whole = Engine.whole
    monkeypatch.setattr(Engine, "whole", lambda self, ask: asked.append(ask) or whole(self, ask))
    return asked


def run(output: Path | None = None, **options) -> tuple[Session, list[Result]]:
    session = Session(CPU, ResultsFile(output, CPU), time_limit=options.pop("time_limit", None))
    return session, ServeBench(**OPTIONS | {"at_once": (3, 1)} | options).run(session, TINY)


def test_prompts_are_of_the_lengths_and_densities_that_were_asked_for_and_all_differ(asked: list[Ask]) -> None:
    session, rows = run()
    assert not session.failures
    # Two answers that are checked, of prompts that do not fit one forward; two of each length warm the engine up.
    checked = [ask for ask in asked if len(ask.tokens) > 300]
    assert [(len(ask.tokens), ask.new, ask.density) for ask in checked] == [(556, 8, 1.0), (556, 8, None)]
    timed = [ask for ask in asked if ask.new == 5]
    assert len(timed) == 2 * 2 + 2 * 2 * (1 + 3) * 2
    prompts = {(tuple(ask.tokens), ask.density) for ask in timed}
    # The same for both densities.
    assert len({tokens for tokens, _ in prompts}) == 2 + 2 * 2 * (1 + 3)
    assert {len(ask.tokens) for ask in timed} == {200, 300}
    assert [(row.context, row.cell["at_once"], row.density) for row in rows[::2]] == [
        (tokens, n, density) for n in (1, 3) for tokens in (200, 300) for density in (None, 0.3)
    ]
    for row in rows:
        assert (
            row.value > 0 and len(row.samples["first"]) == 2 * row.cell["at_once"] and len(row.samples["seconds"]) == 2
        )
        assert (row.realised_density == 1) == (row.density is None) and row.cell["batch_tokens"] == 256


def test_throughput_counts_the_tokens_of_prompts_and_answers_to_the_last_one() -> None:
    _, rows = run(contexts=(200,))
    for first, speed in zip(rows[::2], rows[1::2]):
        seconds, n = sorted(speed.samples["seconds"]), speed.cell["at_once"]
        expected = [n * 205 / one for one in seconds]
        assert speed.value == pytest.approx(sum(expected) / 2, rel=1e-3)
        assert 0 < first.value <= seconds[-1]


def test_engine_that_says_something_else_than_the_unpatched_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = paged.attend_counted

    def wrong(q, k, v, blocks, **options):
        return -sparse(q, k, v, blocks, **options)

    monkeypatch.setattr(paged, "attend_counted", wrong)
    session, rows = run(contexts=(200,), at_once=(1,))
    assert {row.method for row in rows} == {"dense"}
    assert len(session.failures) == 1 and "does not match a forward of the unpatched model" in session.failures[0]


def test_time_that_is_up_leaves_what_was_measured_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "out_of_time", property(lambda self: len(read_results([tmp_path / "r.jsonl"])) >= 4))
    (tmp_path / "r.jsonl").touch()
    session, _ = run(tmp_path / "r.jsonl")
    assert len(read_results([tmp_path / "r.jsonl"])) == 4 and len(session.left_out) == 6
    monkeypatch.undo()
    run(tmp_path / "r.jsonl")
    assert len(read_results([tmp_path / "r.jsonl"])) == 16
