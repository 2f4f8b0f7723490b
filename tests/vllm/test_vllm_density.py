"""What is counted of prompts. Nothing here needs vLLM."""

from __future__ import annotations

import pytest
import torch

from seerattn import BlockIndices
from seerattn.vllm import density


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "_PROMPTS", type(density._PROMPTS)())


def begin(name: str, start: int, end: int, prompt: int = 96, **more) -> density.Counted:
    return density.begin_part(name, prompt, start, end, **{"is_dense": False, "layers": 2, "log": False} | more)


def test_parts_of_a_prompt_are_counted_together_and_a_request_that_begins_anew_is_counted_anew() -> None:
    first = begin("a", 0, 32)
    assert begin("a", 0, 32) is first  # layers with a table of pages of their own
    assert begin("a", 32, 64) is first and begin("b", 32, 96) is not first
    again = begin("a", 0, 96)
    assert again is not first and again.cached == 0 and begin("b", 32, 96).cached == 32
    assert [one.name for one in density.prompts()] == ["b", "a"]


def test_density_is_that_of_the_blocks_and_1_of_a_prompt_that_is_read_densely() -> None:
    counted = begin("a", 0, 64)
    # Of two heads the first keeps 2 and the second 3 of 3 blocks.
    mask = torch.tensor([[[[True, False], [False, True]], [[True, False], [True, True]]]])
    for layer in (0, 1):
        counted.add(layer, 2, BlockIndices.from_mask(mask, block_q=32, block_k=32, q_start=0, q_len=64))
    assert counted.density == pytest.approx(5 / 6)
    assert begin("b", 0, 64, is_dense=True).density == 1
    with pytest.raises(ValueError, match="must have seen at least one"):
        _ = begin("c", 0, 64).density


def test_only_so_many_prompts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "PLACES", 3)
    for number in range(5):
        begin(f"{number}", 0, 96)
    assert [one.name for one in density.prompts()] == ["2", "3", "4"]


def counted_of(name: str = "a", prompt: int = 96, log: bool = False) -> density.Counted:
    return density.of_request(name, prompt, layers=2, log=log)


def test_decoded_tokens_are_counted_once_and_those_that_read_all_without_being_asked_count_as_such() -> None:
    counted = begin("a", 0, 96)
    assert counted_of() is counted and counted_of("b").cached == 96
    with pytest.raises(ValueError, match="must have seen at least one token"):
        _ = counted.decode_density
    # Tokens with 97 and 98 keys: the first reads all of its 4 blocks.
    assert counted.decode(96, 97, 1, 32) == 0 and counted.decode_density == 1
    for layer in (0, 1):
        assert counted.decode(97, 98, 0, 32) == 0  # told again by layers with pages of their own
        counted.meter.decode.add(layer, 4, torch.tensor([[2, 3]]), 98, 32)
    assert counted.decode_density == pytest.approx((4 + 2.5) / 8)
    # Read again behind room that was made for others, and one more.
    assert counted.decode(96, 99, 1, 32) == 2 and counted.decoded == 3
    assert counted.decode_density == pytest.approx((4 + 2.5) / 8)
    assert density.of_request("a", 95, layers=2, log=False) is not counted


def test_an_answer_is_told_when_vllm_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(density.logger, "info", lambda text, *args: told.append(text % args))
    for name, log in (("a", True), ("b", False), ("c", True)):
        begin(name, 0, 96, log=log)
    for name in ("a", "b"):
        counted_of(name).decode(96, 97, 1, 32)
    density.end_requests(["a", "b", "c", "unknown"])
    assert told == ["request a: 1 decoded tokens, density 1.0000"]
