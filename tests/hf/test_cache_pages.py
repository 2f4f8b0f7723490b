"""Keys in pages: the tokens of every request alone, whichever way its keys are read, and what is copied."""

import pytest
import torch
from batched_model import BLOCK, GATE, SPARSE, alone, config, greedy, model, prompts
from tiny_models import tiny_model
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache

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
    """Counts rows of layers that were gathered, and those that a kernel read, for which the op's reference stands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, kernel: bool) -> None:
        self.gathered = self.read = 0
        gather, decode, update = Pages.row, Pages.decode, PagedAttentionCache.update

        def row(self_, number: int) -> tuple[Tensor, Tensor]:
            self.gathered += 1
            return gather(self_, number)

        def together(self_, query: Tensor, logits: dict) -> Tensor | None:
            self.read += len(self_.layout.decoded)
            return decode(self_, query, logits)

        def written(*args, **options):
            indices = options.get("kwargs", options)["read_index"]
            assert [index.numel() for index in indices] == [0], "no key is copied by its index"
            return update(*args, **options)

        monkeypatch.setattr(Pages, "row", row)
        monkeypatch.setattr(PagedAttentionCache, "update", written)
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
@pytest.mark.parametrize("budget", [64, 4096], ids=["in chunks", "at once"])
@pytest.mark.parametrize("name", ["llama", "smollm3", "glm"])
def test_keys_in_pages_give_the_tokens_of_each_alone(name: str, budget: int, kernel: bool, monkeypatch) -> None:
    gated, asked = model(name), prompts(LENGTHS)
    expected = [alone(gated, prompt, NEW) for prompt in asked]
    watched = Watched(monkeypatch, kernel=kernel)
    assert run(gated, asked, max_batch_tokens=budget) == expected
    # Of two layers; the first token of an answer comes of its prompt.
    written = 2 * len(asked) * (NEW - 1)
    assert watched.read == written * kernel
    parts = 2 * sum(-(-n // 64) - 1 for n in LENGTHS) if budget == 64 else 0
    assert parts * kernel <= watched.gathered - written * (not kernel) <= 3 * parts


def test_forward_that_reads_a_prompt_gathers_the_keys_of_that_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, (first, second) = model(), prompts((100, 200))
    expected = [alone(gated, first, NEW), alone(gated, second, NEW)]
    watched = Watched(monkeypatch, kernel=True)
    assert run(gated, [first, second], max_batch_tokens=BLOCK + 1) == expected
    # The parts of 100 tokens behind the first one, and those of 200, of which most are read while the first one writes.
    assert watched.gathered == 2 * (3 + 6) and watched.read == 2 * 2 * (NEW - 1)


def test_rest_of_a_prompt_that_is_one_token_long_is_read_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, prompt = model(), prompts((BLOCK * 4 + 1,))[0]
    with seerattn.record_density(gated) as single:
        expected = alone(gated, prompt, NEW)
    watched = Watched(monkeypatch, kernel=True)
    with seerattn.record_density(gated) as together:
        assert run(gated, [prompt], max_batch_tokens=BLOCK) == [expected]
    assert together.mean() == single.mean() < 0.9
    assert watched.gathered == 2 * 4 and watched.read == 2 * (NEW - 1)


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


def test_attention_without_a_policy_is_the_same_bits_from_pages_and_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = seerattn.attach(tiny_model("llama", torch.float32), GATE, None)
    asked = prompts((1, 37, 130, 300))
    seen: list[Tensor] = []
    projection = transformers_model(gated).model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    outputs = []
    for budget in (64, 1024):
        for by_index in (True, False):
            seen.clear()
            if by_index:
                monkeypatch.setattr(batching, "leave_in_pages", lambda cache: None)
                run(gated, asked, max_batch_tokens=budget)
            else:
                watched = Watched(monkeypatch, kernel=True)
                run(gated, asked, max_batch_tokens=budget)
                assert watched.gathered and not watched.read
            outputs.append(list(seen))
            monkeypatch.undo()
        by_index, in_pages = outputs[-2:]
        assert len(by_index) == len(in_pages) >= NEW
        assert all(torch.equal(a, b) for a, b in zip(by_index, in_pages))


def test_caches_of_models_with_windows_are_left_as_they_are() -> None:
    for name, has in (("llama", True), ("gemma3", False), ("phi3", False)):
        manager = model(name).init_continuous_batching(greedy(), config())
        assert pages.is_left_in_pages(manager._create_batch_processor().cache) == has
