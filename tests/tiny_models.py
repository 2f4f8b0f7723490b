"""Small random models of the supported architectures, and of some that must be refused."""

from __future__ import annotations

import torch
import transformers as tf
from transformers import PreTrainedModel

# The initial spread makes attention sharp enough for sparse attention to differ from dense attention.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Classes that derive the head dim from the hidden size.
WIDE = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 128}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
HYBRID = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MLA = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}

SUPPORTED = {
    "llama": (tf.LlamaConfig, SIZES),
    "llama-yarn": (tf.LlamaConfig, SIZES | {"rope_parameters": YARN}),
    "llama-llama3": (tf.LlamaConfig, SIZES | {"rope_parameters": LLAMA3}),
    "mistral": (tf.MistralConfig, SIZES | {"sliding_window": None}),
    "qwen2": (tf.Qwen2Config, SIZES),
    "qwen3": (tf.Qwen3Config, SIZES),
    "phi3": (tf.Phi3Config, WIDE | {"sliding_window": 1024}),
    "gemma2": (tf.Gemma2Config, SIZES | HYBRID | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}),
    "olmo2": (tf.Olmo2Config, WIDE),
    "smollm3": (tf.SmolLM3Config, WIDE | {"no_rope_layers": [1, 0]}),
    "gpt-oss": (tf.GptOssConfig, SIZES | HYBRID | MOE),
}
FULL = {"layer_types": ["full_attention", "full_attention"]}
# Further layouts of the rotary embedding: a part of the channels, interleaved pairs, tables per layer type.
ROTARY = {
    "phi": (tf.PhiConfig, WIDE),
    "glm": (tf.GlmConfig, SIZES | {"partial_rotary_factor": 0.5}),
    "cohere": (tf.CohereConfig, WIDE),
    "gemma3": (tf.Gemma3TextConfig, SIZES | HYBRID),
    "stablelm": (tf.StableLmConfig, WIDE),
    "nemotron": (tf.NemotronConfig, SIZES),
    "glm4": (tf.Glm4Config, SIZES | {"partial_rotary_factor": 0.5}),
    "ernie4.5": (tf.Ernie4_5Config, SIZES),
    "bamba": (tf.BambaConfig, WIDE | {"attn_layer_indices": [0, 1], "mamba_n_heads": 4, "mamba_d_head": 64}),
    "qwen3-next": (
        tf.Qwen3NextConfig,
        SIZES | FULL | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    ),
    "qwen3.5": (tf.Qwen3_5TextConfig, SIZES | FULL),
    "nanochat": (tf.NanoChatConfig, WIDE),  # turns by the negative of the angle
    "gpt-neox": (tf.GPTNeoXConfig, {key: value for key, value in WIDE.items() if key != "num_key_value_heads"}),
    "gpt2": (
        tf.GPT2Config,
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": None},
    ),
}
# RoPE whose frequencies depend on the length, with an original length of 128.
LONG_ROPE = {
    "phi3-longrope": (
        tf.Phi3Config,
        WIDE
        | {"sliding_window": None, "original_max_position_embeddings": 128}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}
        },
    ),
    "llama-dynamic": (
        tf.LlamaConfig,
        SIZES
        | {"max_position_embeddings": 128}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
}
LONG_ROPE["phi3-longrope"][1]["rope_parameters"] |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
REFUSED = {
    "mla": (tf.DeepseekV3Config, WIDE | MLA | {"qk_nope_head_dim": 32, "v_head_dim": 32}),
    "mla-equal-widths": (tf.DeepseekV3Config, WIDE | MLA | {"qk_nope_head_dim": 16, "v_head_dim": 32}),
    "llama4": (tf.Llama4TextConfig, SIZES | MOE | {"intermediate_size_mlp": 64, "moe_layers": []}),
    "bloom": (tf.BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 2, "vocab_size": 97}),
    "all-sliding": (tf.MistralConfig, SIZES | {"sliding_window": 64}),
    "t5": (tf.T5Config, {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 32, "vocab_size": 97}),
}


# Their soft cap and their sinks are computed by no other implementation.
EAGER = ("gemma2", "gpt-oss")


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A model in evaluation mode with seeded random weights."""
    config_class, values = (SUPPORTED | ROTARY | LONG_ROPE | REFUSED)[name]
    config = config_class(**values | overrides)
    implementation = {"attn_implementation": "eager"} if name in EAGER else {}
    torch.manual_seed(0)
    if name == "t5":
        return tf.T5ForConditionalGeneration(config)
    return tf.AutoModelForCausalLM.from_config(config, **implementation).to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids without the padding id."""
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))
