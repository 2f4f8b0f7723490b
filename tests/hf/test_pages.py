"""Decoding over pages: the tokens of every request alone, whichever way its keys are read."""

import pytest
import torch
from batched_model import BLOCK, GATE, SPARSE, alone, config, greedy, model, prompts
from tiny_models import tiny_model
from torch import Tensor

import seerattn
from seerattn.hf import batching, pages
from seerattn.hf.identity import transformers_model
from seerattn.hf.pages import Pages
from seerattn.ops.decode_attention import decode_attention

NEW, SECONDS = 40, 60
# Some end a token behind a block, so that the rest of a prompt is one token long.
LENGTHS = (1, 37, 129, 300, 65, 257)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers does so twice a batch, which takes longer than these models.
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class Watched:
    """Counts the rows that were gathered and those that a kernel read, which the op's reference stands for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
        self.gathered = self.read = self.updated = 0
        gather, decode, update = Pages.row, Pages.decode, pages.PagedAttentionCache.update

        def row(*args) -> tuple[Tensor, Tensor]:
            self.gathered += 1
            return gather(*args)

        def together(self_, query: Tensor, numbers: list[int], logits: dict) -> Tensor | None:
            self.read += len(numbers)
            return decode(self_, query, numbers, logits)

        def updates(*args, **kwargs):
            self.updated += kwargs.get("kwargs", {}).get("block_table") is None
            return update(*args, **kwargs)

        monkeypatch.setattr(Pages, "row", row)
        monkeypatch.setattr(pages.PagedAttentionCache, "update", updates)
        if kernel:
            monkeypatch.setattr(Pages, "decode", together)
            monkeypatch.setattr(pages, "preferred", lambda *_: "triton")
            monkeypatch.setattr(pages, "refusal", lambda *_, **__: None)
            monkeypatch.setattr(pages, "decode_attention", _by_reference)


def _by_reference(*args, impl: str, **kwargs) -> Tensor:
    return decode_attention(*args, **kwargs, impl="reference")


def run(gated, asked: list[list[int]], **options) -> list[list[int]]:
    found = gated.generate_batch(asked, greedy(NEW), config(**options))
    assert [output.error for output in found.values()] == [None] * len(asked)
    return [output.generated_tokens for output in found.values()]


@pytest.mark.parametrize("kernel", [False, True], ids=["gathered", "by a kernel"])
@pytest.mark.parametrize("name", ["llama", "smollm3", "glm"])
def test_decoding_over_pages_gives_the_tokens_of_each_alone(name: str, kernel: bool, monkeypatch) -> None:
    gated, asked = model(name), prompts(LENGTHS)
    expected = [alone(gated, prompt, NEW) for prompt in asked]
    watched = Watched(monkeypatch, kernel=kernel)
    assert run(gated, asked, max_batch_tokens=128) == expected
    # Of two layers; some of the first tokens are written beside parts of prompts.
    many = 2 * len(asked) * (NEW - 10)
    assert (watched.read > many > 10 > watched.gathered) if kernel else (watched.gathered > many)


def test_rest_of_a_prompt_that_is_one_token_long_is_read_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, prompt = model(), prompts((BLOCK * 4 + 1,))[0]
    with seerattn.record_density(gated) as single:
        expected = alone(gated, prompt, NEW)
    watched = Watched(monkeypatch, kernel=True)
    with seerattn.record_density(gated) as together:
        assert run(gated, [prompt], max_batch_tokens=BLOCK) == [expected]
    assert together.mean() == single.mean() < 0.9
    assert watched.gathered == 2, "one row in each of two layers, which is the rest of the prompt"


def test_requests_that_run_dense_are_decoded_as_in_the_unpatched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, (first, second) = model(), prompts((100, 90))
    with seerattn.policy(gated, None):
        dense = alone(gated, second, NEW)
    expected = [alone(gated, first, NEW), dense]
    watched = Watched(monkeypatch, kernel=True)
    manager = gated.init_continuous_batching(greedy(), config(max_batch_tokens=1024))
    for name, prompt, policy in (("first", first, SPARSE), ("second", second, None)):
        batching.choose_for(manager, name, policy, seerattn.DensityMeter())
        manager.add_request(prompt, request_id=name, max_new_tokens=NEW)
    manager.start()
    found = {output.request_id: output for output in (manager.get_result(timeout=SECONDS) for _ in range(2))}
    manager.stop()
    assert [found[name].generated_tokens for name in ("first", "second")] == expected
    assert watched.gathered == watched.read == 2 * (NEW - 1)


def test_attention_without_a_policy_is_the_same_bits_with_tables_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = seerattn.attach(tiny_model("llama", torch.float32), GATE, None)
    asked = prompts((1, 37, 130, 300))
    seen: list[Tensor] = []
    projection = transformers_model(gated).model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    outputs = []
    for tables in (0, 16):
        seen.clear()
        watched = Watched(monkeypatch, kernel=True)
        run(gated, asked, max_blocks_per_request=tables, max_batch_tokens=1024)
        assert bool(watched.gathered) == bool(tables) and not watched.read
        outputs.append(list(seen))
        monkeypatch.undo()
    assert len(outputs[0]) == len(outputs[1]) == NEW
    assert all(torch.equal(a, b) for a, b in zip(*outputs))


def test_what_a_table_has_no_room_for_is_decoded_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, prompt = model(), prompts((50,))[0]
    expected = alone(gated, prompt, NEW)
    for number in (0, 1, 2, 3):
        watched = Watched(monkeypatch, kernel=True)
        assert run(gated, [prompt], max_blocks_per_request=number) == [expected]
        # Of two layers. The first of the tokens is that of the prompt, and the last is never read.
        fitting = min(NEW - 1, max(0, number * BLOCK - len(prompt)))
        assert watched.read == 2 * fitting and watched.updated >= 2 * (NEW - fitting)
        monkeypatch.undo()


def test_models_with_windows_have_no_tables() -> None:
    for name, has in (("llama", True), ("gemma3", False)):
        gated = model(name)
        manager = gated.init_continuous_batching(greedy(), config())
        assert (manager.continuous_batching_config.max_blocks_per_request > 0) == has
