"""Decoded tokens of whole models, behind caches that no prompt filled."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from seerattn.bench.decode import DecodeBench, random_cache, static_cache
from seerattn.bench.model import TINY, random_model
from seerattn.bench.session import Session
from seerattn.results.file import ResultsFile

CPU = torch.device("cpu")


def test_a_cache_with_room_holds_what_a_cache_of_transformers_holds() -> None:
    model, roomy, copied = random_model(TINY, CPU), random_cache(TINY, 2, 70, 3, CPU), DynamicCache()
    for number, layer in enumerate(roomy.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), number)
    for token in (5, 9, 3):
        ids = torch.tensor([[token], [token + 1]])
        with torch.no_grad():
            found, expected = (model(input_ids=ids, past_key_values=c, use_cache=True).logits for c in (roomy, copied))
        assert torch.equal(found, expected)
    assert roomy.get_seq_length() == 73
    for ours, theirs in zip(roomy.layers, copied.layers):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_static_cache_holds_the_same() -> None:
    model = random_model(TINY, CPU)
    caches = static_cache(model, TINY, 2, 70, 3, CPU), random_cache(TINY, 2, 70, 3, CPU)
    for token in (5, 9, 3):
        ids = torch.tensor([[token], [token + 1]])
        with torch.no_grad():
            found, expected = (model(input_ids=ids, past_key_values=c, use_cache=True).logits for c in caches)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def run(**options) -> tuple[Session, list]:
    session = Session(CPU, ResultsFile(None))
    bench = DecodeBench(**{"contexts": (640, 200), "batches": (3, 1), "densities": (0.5, 0.3), "steps": 2} | options)
    return session, bench.run(session, TINY)


def test_steps_are_of_the_lengths_batches_and_densities_that_were_asked_for() -> None:
    session, rows = run()
    assert not session.failures
    assert [(r.context, r.cell["batch"], r.density) for r in rows] == [
        (tokens, batch, density) for tokens in (200, 640) for batch in (1, 3) for density in (None, 0.3, 0.5)
    ]
    # Of 11 blocks at 640 tokens, 4 and 6; of 4 at 200, 2 and 2.
    expected = {(640, 0.3): 4 / 11, (640, 0.5): 6 / 11, (200, 0.3): 0.5, (200, 0.5): 0.5}
    for row in rows:
        assert row.value > 0 and row.value == pytest.approx(1e3 * sorted(row.samples["seconds"])[1], rel=1e-2)
        assert row.realised_density == pytest.approx(expected.get((row.context, row.density), 1.0))


def test_results_are_read_again_and_not_measured_twice(tmp_path: Path) -> None:
    bench, found = DecodeBench(contexts=(200,), batches=(1,), densities=(0.3,), steps=2), []
    for _ in range(2):
        found.append(bench.run(Session(CPU, ResultsFile(tmp_path / "r.jsonl")), TINY))
    assert [row.value for row in found[0]] == [row.value for row in found[1]] and len(found[0]) == 2


def test_steps_that_differ_from_the_unpatched_model_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from seerattn.hf import decode as steps

    attend = steps.decode_attention
    monkeypatch.setattr(steps, "decode_attention", lambda *args, **options: 2 * attend(*args, **options))
    session, rows = run(contexts=(200,), batches=(1,))
    assert [row.method for row in rows] == ["dense"] and len(session.failures) == 1


def test_steps_that_should_be_a_graph_and_are_none_are_not_timed() -> None:
    # On a CPU no kernel chooses; to attend to all keys needs none.
    session, rows = run(contexts=(200,), batches=(2,), densities=(0.3,), launches=("graph",))
    assert [(row.method, row.cell["launch"], row.realised_density) for row in rows] == [("dense", "graph", 1.0)]
    assert len(session.failures) == 1 and "the kernel of single tokens does not have" in session.failures[0]
