"""Load on a server: a small one, whole; and that whatever is wrong with an answer is seen."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import load_requests
import serve_load
from load_requests import Asked, Outcome, make_load, senseless
from serve_load import Alone, judge, run


def test_every_request_of_a_small_load_gets_what_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "CACHE_TOKENS", 8192)
    record = run(requests=20, longest=600, at_once=6, seed=1)
    assert record["failures"] == []
    assert sum(record["verdicts"].values()) == 20 and record["verdicts"]["equal"] >= 13
    assert record["counted"]["active"] == record["counted"]["failed"] == 0 and record["counted"]["refused"] == 2
    assert record["killed"]["told"] and json.dumps(record)


class Known(NamedTuple):
    """An oracle that knows one answer."""

    ties: bool = False

    def __call__(self, asked: Asked) -> Alone:
        return Alone("said", [1, 2], 0.25)

    def is_tie(self, *_) -> bool:
        return self.ties


WHOLE, LEFT, BAD = Asked(0, "whole"), Asked(1, "left", leave=1), Asked(2, "senseless", status=400)


@pytest.mark.parametrize(
    ("asked", "outcome", "verdict"),
    [
        (WHOLE, Outcome(200, "said", 0.25, True), "equal"),
        (WHOLE, Outcome(200, "other", 0.25, True), "another answer"),
        (WHOLE, Outcome(200, "said", 0.3, True), "another density"),
        (WHOLE, Outcome(200, "said", 0.25, False), "lost, status 200"),
        (WHOLE, Outcome(0, "sa"), "lost, status 0"),
        (WHOLE, Outcome(503), "lost, status 503"),
        (LEFT, Outcome(-1), "left"),
        (LEFT, Outcome(200, "said", 0.25, True), "left"),
        (LEFT, Outcome(500), "left, status 500"),
        (BAD, Outcome(400, "", None, True), "refused"),
        (BAD, Outcome(400, "", None, False), "senseless, status 400 for 400"),
        (BAD, Outcome(500, "", None, True), "senseless, status 500 for 400"),
        (BAD, Outcome(200, "said", 0.25, True), "senseless, status 200 for 400"),
    ],
)
def test_what_came_of_a_request_is_seen(asked: Asked, outcome: Outcome, verdict: str) -> None:
    assert judge(asked, outcome, Known()) == verdict
    if verdict == "another answer":
        assert judge(asked, outcome, Known(ties=True)) == "tie"


def test_load_is_a_function_of_its_seed_and_holds_every_kind() -> None:
    book = list(range(10_000))
    load = make_load(book, 200, shortest=100, longest=8000, seed=3)
    assert load == make_load(book, 200, shortest=100, longest=8000, seed=3)
    assert load != make_load(book, 200, shortest=100, longest=8000, seed=4)
    kinds = [asked.kind for asked in load]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"whole": 110, "stream": 40, "left": 30, "senseless": 20}
    assert sorted(asked.number for asked in load) == list(range(200)) != [asked.number for asked in load]
    prompts = [asked.tokens for asked in load if asked.tokens]
    assert min(map(len, prompts)) >= 100 and max(map(len, prompts)) <= 8000
    assert sum(tokens[0] == 0 for tokens in prompts) > 10, "some begin alike"
    sent = {asked.body for asked in load if asked.kind == "senseless"}
    assert sent == {body for _, body, _ in senseless()}
    assert json.loads(load_requests.Asked(0, "stream", [5], 3).sent)["stream"] is True
