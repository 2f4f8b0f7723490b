"""What the probe proves, and what it refuses."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import REFUSED, ROTARY, SUPPORTED, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import seerattn
from seerattn import AttentionContext, AttnGateConfig, BlockIndices
from seerattn.hf.probe import probe
from seerattn.hf.rotary import gate_frequencies
from seerattn.hf.state import layer_states

REASONS = {
    "mla": "multi-head latent attention",
    "mla-equal-widths": "DeepseekV3ForCausalLM",
    "llama4": "rotary tables",
    "bloom": "attention interface",
    "all-sliding": "all sliding-window",
    "t5": "encoder-decoder",
}
# Architectures whose keys before RoPE are just the output of k_proj.
PLAIN_KEYS = ("llama", "llama-yarn", "llama-llama3", "mistral", "qwen2", "smollm3", "gpt-oss", "phi", "glm", "cohere")


def without_weights(name: str, **overrides: Any) -> PreTrainedModel:
    with init_empty_weights():
        model = tiny_model(name, **overrides)
    model.tie_weights()
    return model


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


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("name", REFUSED)
def test_probe_rejects_with_the_reason(name: str, weights: bool) -> None:
    if name == "mla-equal-widths" and not weights:
        pytest.skip("only numbers tell it from other attention")
    model = tiny_model(name) if weights else without_weights(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=REASONS[name]):
        seerattn.attach(model, AttnGateConfig())
    assert model.config._attn_implementation == before
    assert not layer_states(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SUPPORTED | ROTARY))
def test_model_without_weights_shows_the_layers_and_shapes_that_are_proven_with_them(
    name: str, dtype: torch.dtype
) -> None:
    model = without_weights(name, dtype=dtype)
    before = vars(model.config).copy()
    seen, proven = probe(model), probe(tiny_model(name))
    assert vars(model.config) == before
    for one, other in zip(seen, proven, strict=True):
        assert one.module is model.get_submodule(other.name) and one.layer == other.layer
        shapes = [(x.num_heads, x.num_kv_heads, x.head_dim) for x in (one, other)]
        assert shapes[0] == shapes[1]
    gates = [seerattn.attach(m, AttnGateConfig()) for m in (without_weights(name, dtype=dtype), tiny_model(name))]
    sizes = [{key: p.shape for key, p in gated.named_parameters()} for gated in gates]
    assert sizes[0] == sizes[1]
    assert all(p.is_meta != ("seer_gate" in key) for key, p in gates[0].named_parameters())


def test_layers_that_were_seen_without_weights_do_not_run_sparse() -> None:
    model = without_weights("llama")
    gated = seerattn.attach(model, AttnGateConfig(), policy=seerattn.TopK(density=0.5), impl="reference")
    for name, parameter in tiny_model("llama").named_parameters():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, parameter)
    with pytest.raises(ValueError, match="must be attached to a model with weights"):
        gated(tokens(1, 200))
    with gated.disable_adapter():
        assert torch.equal(gated(tokens(1, 200)).logits, tiny_model("llama")(tokens(1, 200)).logits)


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


def test_head_dim_that_no_kernel_takes_is_refused_at_attach() -> None:
    for head_dim in (24, 288):
        model = tiny_model("llama", head_dim=head_dim)
        with pytest.raises(ValueError, match=f"the head dim must be 32 to 256, got {head_dim} in LlamaForCausalLM"):
            seerattn.attach(model, AttnGateConfig())
        assert model.config._attn_implementation == "sdpa" and not layer_states(model)


def test_overflow_is_told_as_an_overflow() -> None:
    model = tiny_model("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"must be finite, got an overflow in torch.float16 .* load the model in bfloat16"
    ):
        seerattn.attach(model, AttnGateConfig())


def test_model_is_proven_in_fp32_where_the_process_rounds_products(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def as_tf32(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if torch.get_float32_matmul_precision() == "highest":
            return attend(query, key, value, **options)
        # 10 bits of the fraction are left.
        return attend(
            *(x.view(torch.int32).bitwise_and(-1 << 13).view(x.dtype) for x in (query, key, value)), **options
        )

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_tf32)
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        layers = probe(tiny_model("llama"))
        assert layers and torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ValueError, match="must be the softmax of scaled products"):
            monkeypatch.setattr("seerattn.hf.probe._exact_products", nullcontext)
            probe(tiny_model("llama"))
    finally:
        torch.set_float32_matmul_precision(allowed)


@pytest.mark.parametrize("number", [-1, 1, None])
def test_layers_that_share_a_number_are_refused(number: int | None) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = number
    # With a cache such a model would fail by itself; nothing here asks for one.
    with pytest.raises(ValueError, match="attention modules must have a layer_idx of their own, got"):
        seerattn.attach(model, AttnGateConfig())


def test_module_that_is_called_twice_a_forward_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="attention modules must be called once a forward"):
        seerattn.attach(model, AttnGateConfig())


def test_module_that_drops_keywords_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def without_keywords(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **_):
        return forward(self, hidden_states, position_embeddings, attention_mask, past_key_values)

    monkeypatch.setattr(LlamaAttention, "forward", without_keywords)
    with pytest.raises(ValueError, match="must pass keywords on to their attention function"):
        seerattn.attach(tiny_model("llama"), AttnGateConfig())


def test_attention_that_adds_something_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def with_a_bias(module, query, key, value, attention_mask, **kwargs):
        bias = torch.arange(key.shape[2], dtype=query.dtype)
        causal = torch.ones(query.shape[2], key.shape[2]).tril().log()
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, causal + bias, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", with_a_bias)
    with pytest.raises(ValueError, match="attention must be the softmax of scaled products"):
        seerattn.attach(tiny_model("llama"), AttnGateConfig())


def test_model_that_keeps_no_cache_is_served_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def other_keys(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            past_key_values.layers[self.layer_idx].keys.mul_(2)
        return forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", other_keys)
    model = seerattn.attach(tiny_model("llama"), AttnGateConfig(), seerattn.TopK(density=0.5), impl="reference")
    cache = model(tokens(1, 130), use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"a prompt must come in one call, got 70 tokens against a cache, .* other keys"
    ):
        model(tokens(1, 70), past_key_values=cache)


def test_gates_that_learn_refuse_labels_without_their_own_loss() -> None:
    ids = tokens(1, 70)
    model = seerattn.attach(tiny_model("llama"), AttnGateConfig()).train()
    with pytest.raises(ValueError, match="gates must be trained by their own loss"):
        model(input_ids=ids, labels=ids)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    for state in layer_states(model):
        state.gate.requires_grad_(False)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
