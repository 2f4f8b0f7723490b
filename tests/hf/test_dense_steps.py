"""Where "auto" decodes dense: the unpatched model bit for bit, decided once a step for all layers that are alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

import seerattn
from seerattn import AttnGateConfig, TokenBudget, TopP
from seerattn.gate_decode import GateDecoder
from seerattn.hf import attention

BLOCK, NEW = 32, 40
GATE = AttnGateConfig(block_q=BLOCK, block_k=BLOCK, query_subblocks=4, key_subblocks=4, init="normal")
STEPS = TokenBudget(tokens=3 * BLOCK)
Rule = Callable[[dict[str, Any]], bool]


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rule], list[dict[str, Any]]]:
    """Puts another rule in the place of the measured one; what it is asked."""

    def put(rule: Rule) -> list[dict[str, Any]]:
        asked = []

        def prefer_dense_decode(**ask: Any) -> bool:
            asked.append(ask)
            return rule(ask)

        monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", prefer_dense_decode)
        return asked

    return put


def gated(name: str = "llama", policy=STEPS, impl: str = "auto"):
    return seerattn.attach(tiny_model(name), GATE, None, decode_policy=policy, impl=impl).eval()


def write(model, ids: Tensor, **options) -> Tensor:
    return model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "smollm3", "gpt2"])
def test_a_step_that_the_rule_leaves_dense_is_the_unpatched_model_bit_for_bit(name: str, decide, monkeypatch) -> None:
    asked, ids, heard, decode = decide(lambda _: True), tokens(2, 130), [], attention.decode
    monkeypatch.setattr(attention, "decode", lambda *args: heard.append(args[0]) or decode(*args))
    scores = {"return_dict_in_generate": True, "output_logits": True}
    found, expected = write(gated(name), ids, **scores), write(tiny_model(name), ids, **scores)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))
    # gpt2 has no rotary tables, on which a step could hang what its first layer finds.
    layers = 1 if name != "gpt2" else 2
    assert len(asked) == len(heard) == (NEW - 1) * layers


def test_a_step_is_asked_for_once_and_told_its_keys_its_density_and_its_shape(decide) -> None:
    asked, model, lengths = decide(lambda _: True), gated(), [130, 70, 101]
    ids, mask = tokens(3, 130), torch.ones(3, 130, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : 130 - length] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.get_base_model().config)
        model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)
        write(gated(policy=TopP(p=0.5)), tokens(2, 100))
    (ask, other, *_), layer = asked, model.get_base_model().config
    # Blocks of 32 that hold a key: 5, 3 and 4, of which three are read.
    assert ask["density"] == pytest.approx((130 * 3 / 5 + 70 * 3 / 3 + 101 * 3 / 4) / 301)
    assert (ask["keys"], other["keys"], other["density"]) == (301, 202, 0.0)
    sizes = (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
    assert ask["shape"] == (3, *sizes) and other["shape"] == (2, *sizes)
    assert ask["device"].type == "cpu" and not ask["graphs"]


def test_dense_steps_count_as_such_and_sparse_ones_go_on_with_the_lists_of_others(decide, monkeypatch) -> None:
    ids, calls, select = tokens(1, 130), [], GateDecoder.select_token

    def watching(self, q, k, context):
        blocks = select(self, q, k, context)
        calls.append((self, q, k.clone(), context, blocks))
        return blocks

    monkeypatch.setattr(GateDecoder, "select_token", watching)
    decide(lambda ask: ask["keys"] < 150)
    model = gated()
    with seerattn.record_density(model) as meter:
        write(model, ids)
    assert {call[2].shape[2] for call in calls} == {*range(150, 130 + NEW)}
    for decoder, q, k, context, blocks in calls:
        alone = select(decoder, q, k, seerattn.AttentionContext(0, 1.0, None, context.unrotate))
        assert torch.equal(blocks.indices, alone.indices)
    causal = [-(-n // BLOCK) for n in range(131, 130 + NEW)]
    read = [number if n < 150 else 3 for n, number in zip(range(131, 130 + NEW), causal)]
    assert meter.decode.mean() == pytest.approx(sum(read) / sum(causal))


def test_a_named_impl_never_asks(decide) -> None:
    asked = decide(lambda _: True)
    for impl in ("sparse", "reference"):
        with seerattn.record_density(model := gated(impl=impl)) as meter:
            write(model, tokens(1, 200))
        assert meter.decode.mean() < 0.6
    assert not asked
