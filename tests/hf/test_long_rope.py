"""RoPE whose frequencies depend on the length: cached keys keep those of their own call."""

from typing import Any

import pytest
import torch
from tiny_models import LONG_ROPE, tiny_model, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import seerattn
from seerattn import AttnGateConfig, KeepAll, TopK
from seerattn.hf.probe import probe

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE = TopK(density=0.4, rule="row_share", sink_blocks=0)
ORIGINAL, IDS = 128, tokens(1, 300)


def gated(name: str, policy: Any = SPARSE, impl: str = "reference") -> nn.Module:
    return seerattn.attach(tiny_model(name, torch.float64), GATE, policy, impl=impl).eval()


@torch.no_grad()
def turns(model: nn.Module, *cuts: int) -> list[Tensor]:
    cache = DynamicCache()
    pieces = IDS[:, : cuts[-1]].tensor_split(cuts[:-1], dim=1)
    return [model(input_ids=piece, past_key_values=cache).logits for piece in pieces]


def rotary_state(model: PreTrainedModel) -> dict[str, Any]:
    rotary = model.model.rotary_emb
    tensors = {name: x.clone() for name, x in rotary.named_buffers()}
    return tensors | {name: x for name, x in vars(rotary).items() if isinstance(x, (int, float, str, set))}


@pytest.mark.parametrize("name", LONG_ROPE)
def test_probe_leaves_frequencies_and_counters_as_they_were(name: str) -> None:
    model = tiny_model(name, torch.float64)
    for tokens_before in (10, 200, 20):
        model(input_ids=IDS[:, :tokens_before])
        before = rotary_state(model)
        layers = probe(model)
        after = rotary_state(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(x, after[k]) if isinstance(x, Tensor) else x == after[k] for k, x in before.items())
        assert [layer.rotation.depends_on_length for layer in layers] == [True, True]


@pytest.mark.parametrize("name", LONG_ROPE)
@pytest.mark.parametrize("length", [100, 128, 129, 300])
def test_keep_all_matches_the_unpatched_model_on_both_sides_of_the_original_length(name: str, length: int) -> None:
    # After a long call as well, whose frequencies dynamic NTK holds on to.
    for cuts in ((length,), (300,), (length,)):
        found, expected = (turns(m, *cuts)[0] for m in (gated(name, KeepAll()), tiny_model(name, torch.float64)))
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", LONG_ROPE)
def test_turns_within_the_original_length_are_one_call(name: str) -> None:
    model = gated(name)
    one_shot = turns(model, ORIGINAL)[0]
    assert (torch.cat(turns(model, 64, ORIGINAL), 1) - one_shot).abs().max() < 1e-9
    assert (one_shot - turns(tiny_model(name, torch.float64), ORIGINAL)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", LONG_ROPE)
@pytest.mark.parametrize("first", [64, 200])
def test_later_turn_beyond_the_original_length_is_dense_or_refused(
    name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seerattn.hf.attention.prefer_dense", lambda **_: False)
    plain, model = tiny_model(name, torch.float64), gated(name, KeepAll(), impl="auto")
    with seerattn.record_density(model) as meter:
        found, expected = turns(model, first, 300), turns(plain, first, 300)
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected)) and meter.mean() == 1.0
    seerattn.set_policy(model, SPARSE, impl="sparse")
    with pytest.raises(ValueError, match=f"a prompt beyond {ORIGINAL} tokens must come in one call"):
        turns(model, first, 300)
