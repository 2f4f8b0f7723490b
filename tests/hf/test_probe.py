"""What the probe proves, and what it refuses."""

from typing import Any

import pytest
import torch
from tiny_models import REFUSED, ROTARY, SUPPORTED, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

import seerattn
from seerattn import AttentionContext, AttnGateConfig, BlockIndices
from seerattn.hf.attention import layer_states
from seerattn.hf.probe import probe
from seerattn.hf.rotary import gate_frequencies

REASONS = {
    "mla": "multi-head latent attention",
    "mla-equal-widths": "DeepseekV3ForCausalLM",
    "llama4": "rotary tables",
    "gpt-neox": "head_dim",
    "gpt2": "rotary tables",
    "bloom": "attention interface",
    "all-sliding": "all sliding-window",
    "t5": "encoder-decoder",
}
# Architectures whose keys before RoPE are just the output of k_proj.
PLAIN_KEYS = ("llama", "llama-yarn", "llama-llama3", "mistral", "qwen2", "smollm3", "gpt-oss", "phi", "glm", "cohere")


class Eavesdropper:
    """Keeps all blocks and remembers un-rotated keys by layer."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        self.keys[context.layer] = context.unrotate(k, 0)
        start = k.shape[2] // 2
        assert torch.equal(context.unrotate(k[:, :, start:], start), self.keys[context.layer][:, :, start:])
        sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": 64, "block_k": 64}
        return BlockIndices.dense(batch=q.shape[0], heads=k.shape[1], **sizes)


@pytest.mark.parametrize("name", PLAIN_KEYS)
def test_unrotated_keys_of_a_cache_match_the_projection(name: str) -> None:
    model = tiny_model(name)
    projected: dict[int, list[Tensor]] = {}

    def remember(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        projected.setdefault(module.layer_idx, []).append(output.unflatten(-1, (-1, 32)).transpose(1, 2))

    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.layer_idx = module.layer_idx
            module.k_proj.register_forward_hook(remember)
    selector = Eavesdropper()
    seerattn.attach(model, selector, impl="reference")
    projected.clear()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in tokens(2, 200).split([90, 1, 109], dim=1):
            model(input_ids=piece, past_key_values=cache)
    assert selector.keys
    for layer, keys in selector.keys.items():
        expected = torch.cat(projected[layer], 2)
        # A rotation and its inverse round every entry a handful of times in fp32.
        assert (keys - expected).abs().max() < 16 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("name", sorted(SUPPORTED | ROTARY))
def test_probe_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name)
    before = (model.config._attn_implementation, [len(m._forward_pre_hooks) for m in model.modules()])
    layers = probe(model)
    assert (model.config._attn_implementation, [len(m._forward_pre_hooks) for m in model.modules()]) == before
    windowed = set(getattr(model.config, "layer_types", None) or ()) == {"sliding_attention", "full_attention"}
    assert [layer.layer for layer in layers] == ([1] if windowed else [0, 1])


@pytest.mark.parametrize("name", REFUSED)
def test_probe_rejects_with_the_reason(name: str) -> None:
    model = tiny_model(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=REASONS[name]):
        seerattn.attach(model, AttnGateConfig())
    assert model.config._attn_implementation == before
    assert not layer_states(model)


def test_attach_rejects_keys_that_are_changed_after_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def rotate_and_shift(q, k, cos, sin):
        q, k = rotate(q, k, cos, sin)
        return q + sin[:, None], k

    model = tiny_model("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_shift)
    with pytest.raises(ValueError, match="negating the sine"):
        seerattn.attach(model, AttnGateConfig())


def test_attach_rejects_an_implementation_that_it_cannot_fall_back_on() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        seerattn.attach(model, AttnGateConfig())


def test_gate_frequencies_match_the_models_own_tables() -> None:
    for name in ("llama", "llama-yarn", "llama-llama3"):
        (layer, _) = probe(tiny_model(name))
        frequencies = gate_frequencies(layer.rotation, gate_dim=32)
        positions = torch.tensor([[0, 1, 64, 1000]])
        cos, sin = layer.rotation.tables(positions, torch.ones(1))
        angle = positions[0, :, None] * frequencies
        assert torch.allclose(torch.atan2(sin, cos)[0, :, :16].sin(), angle.sin(), atol=1e-4)
    theta = 10000.0
    half = gate_frequencies(probe(tiny_model("llama"))[0].rotation, gate_dim=16)
    assert torch.allclose(half, theta ** (-torch.arange(0, 16, 2) / 16))


def test_gates_rotate_the_share_of_channels_that_the_model_rotates() -> None:
    partial = gate_frequencies(probe(tiny_model("phi"))[0].rotation, gate_dim=32)
    assert (partial[:8] > 0).all() and (partial[8:] == 0).all()
    without = probe(tiny_model("smollm3"))[1]
    assert without.rotation is None
    assert (gate_frequencies(None, gate_dim=32) == 0).all()
