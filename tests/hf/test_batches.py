"""Any batch: a row gives what it gives alone, or the call runs dense under "auto" and counts so."""

import logging
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, masking_utils

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.mask import CallMask

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
WIDTH = 130
PATTERNS = {
    "right": [[1] * WIDTH, [1] * 97 + [0] * 33, [1] * 3 + [0] * 127],
    "left": [[1] * WIDTH, [0] * 33 + [1] * 97, [0] * 127 + [1] * 3],
    "middle": [[1] * 60 + [0] * 30 + [1] * 40, [0] * 10 + [1] * 50 + [0] * 40 + [1] * 30, [1] * WIDTH],
    "both ends": [[0] * 20 + [1] * 90 + [0] * 20, [1] * 100 + [0] * 30, [0] * 64 + [1] * 66],
    "filler row": [[1] * 100 + [0] * 30, [0] * WIDTH, [0] * 5 + [1] * 125],
    "every other": [[1, 0] * 65, [1] * WIDTH, [0, 1] * 65],
}


def model(name: str = "llama", impl: str = "reference", policy=SPARSE) -> nn.Module:
    return seerattn.attach(tiny_model(name, torch.float64), GATE, policy, impl=impl).eval()


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, **options) -> Tensor:
    return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("positions", [True, False], ids=["positions of the content", "positions of the slots"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["llama", "smollm3", "glm"])
def test_row_of_any_padding_gives_what_it_gives_alone(name: str, pattern: str, positions: bool) -> None:
    gated, mask = model(name), torch.tensor(PATTERNS[pattern])
    ids = tokens(3, WIDTH) * mask
    content = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"position_ids": content} if positions else {}
    with seerattn.record_density(gated) as meter:
        found = run(gated, ids, attention_mask=mask, **options)
    alone = seerattn.DensityMeter()
    for row, real in enumerate(mask.bool()):
        if not real.any():
            continue
        at = content[row][real][None] if positions else torch.arange(WIDTH)[real][None]
        # Positions with gaps look like packed documents to transformers, which asks for none where a mask is given.
        whole = {"position_ids": at, "attention_mask": torch.ones_like(at)}
        with seerattn.record_density(gated) as single:
            expected = run(gated, ids[row][real][None], **whole)
        assert (found[row][real] - expected[0]).abs().max() < 1e-9
        for layer in single.layers:
            alone._computed[layer] = alone._computed.get(layer, 0) + single._computed[layer]
            alone._causal[layer] = alone._causal.get(layer, 0) + single._causal[layer]
    assert meter.mean() == pytest.approx(alone.mean()) and meter.mean() < 0.9


@pytest.mark.parametrize("cut", [64, 90])
def test_second_turn_of_a_batch_in_which_a_row_ended_early_gives_what_it_gives_alone(cut: int) -> None:
    gated = model()
    mask = torch.tensor([[1] * WIDTH, [0] * 20 + [1] * (cut - 50) + [0] * 30 + [1] * (WIDTH - cut)])
    ids, positions = tokens(2, WIDTH) * mask, (mask.cumsum(1) - 1).clamp(min=0)
    cache, pieces = DynamicCache(), []
    for begin, end in ((0, cut), (cut, WIDTH)):
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end], "past_key_values": cache}
        pieces.append(run(gated, ids[:, begin:end], **options))
    found = torch.cat(pieces, 1)
    for row, real in enumerate(mask.bool()):
        cache, rest, expected = DynamicCache(), ids[row][real][None], []
        for piece in rest.tensor_split([int(real[:cut].sum())], dim=1):
            expected.append(run(gated, piece, past_key_values=cache))
        assert (found[row][real] - torch.cat(expected, 1)[0]).abs().max() < 1e-9


def test_row_that_is_padding_alone_in_a_later_call_disturbs_no_other() -> None:
    gated, ids = model(), tokens(2, WIDTH)
    mask = torch.ones(2, WIDTH, dtype=torch.long)
    mask[1, 64:] = 0
    caches = DynamicCache(), DynamicCache()
    for begin, end in ((0, 64), (64, WIDTH)):
        together = run(gated, ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=caches[0])
        alone = run(gated, ids[:1, begin:end], past_key_values=caches[1])
    assert (together[0] - alone[0]).abs().max() < 1e-9


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_prompt_is_sparse_where_it_is_text_alone_and_dense_where_images_attend_both_ways(images: bool) -> None:
    """transformers lays the pattern of images over the causal mask, also where there is none."""
    plain, ids = tiny_model("gemma3", torch.float64), tokens(1, WIDTH)
    gated = model("gemma3", policy=KeepAll())
    kinds = torch.zeros(1, WIDTH, dtype=torch.long)
    kinds[:, 40:80] = int(images)

    def masks(one: nn.Module) -> dict[str, Any]:
        embedded = one.get_input_embeddings()(ids)
        arguments = {"config": one.config, "inputs_embeds": embedded, "attention_mask": None, "past_key_values": None}
        arguments["or_mask_function"] = lambda b, h, q, k: (kinds[b, q] == 1) & (kinds[b, k] == 1)
        return {
            "full_attention": masking_utils.create_causal_mask(**arguments),
            "sliding_attention": masking_utils.create_sliding_window_causal_mask(**arguments),
        }

    def found() -> Tensor:
        made = masks(gated.get_base_model())
        assert isinstance(made["full_attention"], CallMask)
        return run(gated, ids, attention_mask=made)

    expected = run(plain, ids, attention_mask=masks(plain))
    with seerattn.record_density(gated) as meter:
        if images:
            with pytest.raises(ValueError, match="such as that of images"):
                found()
            seerattn.set_policy(gated, SPARSE, impl="auto")
        assert (found() - expected).abs().max() < 1e-9
    assert meter.mean() == 1.0
    assert (expected - run(plain, ids)).abs().max() > 1e-3 or not images


def never_prefer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long prompts are, which this suite has none of."""
    monkeypatch.setattr("seerattn.hf.attention.prefer_dense", lambda **_: False)


def packed() -> dict[str, Tensor]:
    return {"position_ids": torch.cat((torch.arange(60), torch.arange(70)))[None], "use_cache": False}


def finished_mask() -> dict[str, Tensor]:
    return {"attention_mask": torch.ones(1, 1, WIDTH, WIDTH, dtype=torch.bool).tril()}


def test_auto_runs_dense_what_sparse_attention_cannot_follow_and_counts_and_tells_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never_prefer_dense(monkeypatch)
    plain, gated, ids = tiny_model("llama", torch.float64), model(impl="auto"), tokens(1, WIDTH)
    assert (run(gated, ids) - run(plain, ids)).abs().max() > 1e-2
    for options, reason in ((packed(), "packed documents"), (finished_mask(), "2-D padding mask")):
        with seerattn.record_density(gated) as meter, caplog.at_level(logging.WARNING):
            assert torch.equal(run(gated, ids, **options), run(plain, ids, **options))
        assert meter.mean() == 1.0 and reason in caplog.text
        seerattn.set_policy(gated, SPARSE, impl="sparse")
        with pytest.raises(ValueError, match=reason):
            run(gated, ids, **options)
        seerattn.set_policy(gated, SPARSE, impl="auto")


def test_auto_decides_for_dense_attention_before_it_looks_at_the_batch() -> None:
    plain, gated, ids = tiny_model("llama", torch.float64), model(impl="auto"), tokens(1, WIDTH)
    for options in (packed(), finished_mask()):
        assert torch.equal(run(gated, ids, **options), run(plain, ids, **options))


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 5}, {"assistant": True, "num_assistant_tokens": 4}],
    ids=["prompt lookup", "assistant"],
)
@pytest.mark.parametrize("impl", ["sparse", "reference"])
def test_speculative_decoding_with_all_blocks_gives_the_tokens_of_greedy_decoding(impl: str, options: dict) -> None:
    """With fewer it need not: its first call holds the prompt and candidates, so other blocks may be the best."""
    gated, ids = model(impl=impl), tokens(1, 40).repeat(1, 5)[:, :190]
    seerattn.set_policy(gated, KeepAll())
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", torch.float64, num_hidden_layers=1)
    greedy = gated.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    with seerattn.record_density(gated) as meter:
        found = gated.generate(input_ids=ids, max_new_tokens=24, do_sample=False, **options)
    assert torch.equal(found, greedy) and meter.mean() == 1


def test_call_of_fewer_tokens_than_a_block_against_a_cache_is_decoding() -> None:
    plain, gated, ids = tiny_model("llama", torch.float64), model(), tokens(1, 200)
    for count, dense in ((31, True), (32, False)):
        caches = DynamicCache(), DynamicCache()
        with seerattn.policy(gated, None):
            run(gated, ids[:, :160], past_key_values=caches[0])
        run(plain, ids[:, :160], past_key_values=caches[1])
        with seerattn.record_density(gated) as meter:
            found = run(gated, ids[:, 160 : 160 + count], past_key_values=caches[0])
        expected = run(plain, ids[:, 160 : 160 + count], past_key_values=caches[1])
        assert torch.equal(found, expected) == dense and bool(meter.layers) != dense


def test_bidirectional_attention_is_refused() -> None:
    flagged, configured = tiny_model("llama"), tiny_model("llama")
    flagged.model.layers[1].self_attn.is_causal = False
    configured.config.is_causal = False
    for one in (flagged, configured):
        with pytest.raises(ValueError, match=r"is_causal=False|softmax of scaled products"):
            seerattn.attach(one, GATE, SPARSE)
    late = model(impl="reference")
    late.get_base_model().model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        run(late, tokens(1, WIDTH))
