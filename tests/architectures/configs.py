"""Tiny models of every family of causal language models in transformers, made from what its config class declares."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

Values = dict[str, Any]

# By the name of the field, whatever the class. Four layers hold one period of most patterns of layers.
SIZES: Values = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 128)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads", "mamba_num_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "num_local_experts", "num_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_num_experts", "linear_conv_kernel_dim"), 4)
    | dict.fromkeys(("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2)
    | dict.fromkeys(("num_experts_per_tok", "moe_k", "index_n_heads"), 2)
    | dict.fromkeys(("n_group", "topk_group"), 1)
    | dict.fromkeys(("head_dim", "swa_head_dim", "linear_head_dim", "mamba_head_dim", "mamba_d_head"), 32)
    | dict.fromkeys(("index_head_dim", "shared_expert_intermediate_size", "shared_intermediate_size"), 32)
    | {"moe_intermediate_size": 32}
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 64)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "linear_key_head_dim", "linear_value_head_dim"), 16)
    | {"hidden_size_per_layer_input": 16, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_n_heads": 8}
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 1024)
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "is_decoder": True}
    # This spread makes attention sharp enough for sparse attention to differ from dense attention.
    | {"initializer_range": 0.15}
    # Granite's scale of the logits; with the default of 1 its logits move by 4e-4 where fp32 rounds anything.
    | {"attention_multiplier": 0.18}
)
# Of what a model has beside its text layers.
TOWER: Values = (
    dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "out_hidden_size", "d_model"), 32)
    | dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 1)
    | dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 2)
    | {"image_size": 28, "patch_size": 14, "vocab_size": 97, "num_position_embeddings": 16}
)
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * 2}
HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"] * 2}
MLA = {"num_key_value_heads": 4, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}}}
PARTIAL_MROPE = {"text_config": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}}}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32}
# What sizes alone do not make: patterns of layers, and sizes that belong together.
OVERRIDES: dict[str, Values] = (
    dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"), MLA)
    | dict.fromkeys(("minicpm3", "youtu", "hy_v4"), MLA)
    | dict.fromkeys(("gemma3_text", "ministral", "kolibri1"), SLIDING)
    | dict.fromkeys(("bailing_hybrid", "kimi_linear"), MLA | RECURRENT)
    | dict.fromkeys(("paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"), MROPE)
    | dict.fromkeys(("glm4v", "glm4v_moe"), PARTIAL_MROPE)
    | dict.fromkeys(("inkling_text", "inkling2_text"), HYBRID)
    | {
        "aria": {
            "text_config": {"model_type": "aria_text"},
            "vision_config": {"model_type": "idefics3_vision"},
        },
        "bamba": {"attn_layer_indices": [1, 3]},
        "blt": {"encoder_hash_byte_group_vocab": 97},
        "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
        "cpmant": {"dim_ff": 64},
        "ctrl": {"dff": 64},
        "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64}},
        "dots1": {"n_shared_experts": 1},
        "dots3_note_text": MLA | {f"swa_{key}": value for key, value in MLA.items()},
        "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4},
        "gemma3": {"text_config": SLIDING},
        "gemma3n_text": SLIDING | {"num_kv_shared_layers": 2},
        "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "longcat_flash": MLA
        | {"num_layers": 2, "head_dim": 16, "zero_expert_num": 2, "moe_topk": 2}
        | {"expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
        "mamba2": {"num_heads": 8},
        "minimax": {"sliding_window": None},
        "nemotron_h": {"n_groups": 1},
        "qwen4_exp_text": INDEXER | {"indexer_budget": 64, "indexer_compress_ratio": 4},
        "reformer": {"axial_pos_embds": False},
        "roc_bert": {"shape_vocab_size": 97, "pronunciation_vocab_size": 97},
        "t5": {"d_kv": 32, "d_ff": 64},
        "video_llama_3": {
            "text_config": {"model_type": "qwen2"},
            "vision_config": {"model_type": "video_llama_3_vision"},
        },
        "xlm": {"emb_dim": 128, "causal": True},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
        "zamba": {"num_hidden_layers": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
        "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
        "zaya": {"num_experts_per_tok": 1},
    }
)
OVERRIDES["dots3_note_text"] |= {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_num_attention_heads": 4}
OVERRIDES["dots3_note_text"] |= {"swa_head_dim": 48}
# Families once more, with a setting that decides how they are served.
VARIANTS: dict[str, tuple[str, Values]] = {
    "falcon (new decoder)": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma4_text (heads of 64)": ("gemma4_text", {"global_head_dim": 64}),
    "granitemoehybrid (RoPE)": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "mimo_v2_flash (values of 32)": ("mimo_v2_flash", {"v_head_dim": 32}),
    "mistral (window of 32)": ("mistral", {"sliding_window": 32}),
    "zamba2 (RoPE)": ("zamba2", {"use_mem_rope": True}),
}
# Their soft cap or their sinks are computed by no other implementation.
EAGER = ("flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash (values of 32)", "vaultgemma")
# Parts of their forward multiply fp32 by what they are loaded in, or lose the mask of fp64 in a softmax in fp32.
FLOAT32 = ("inkling2_text", "xglm", *EAGER)


def model_type(name: str) -> str:
    """The name by which transformers knows a family, or the family of a variant."""
    return VARIANTS[name][0] if name in VARIANTS else name


def is_known(name: str) -> bool:
    """Whether the transformers at hand has the family."""
    return model_type(name) in CONFIG_MAPPING


def fields(config_class: type) -> set[str]:
    """Names that a config class declares, with those of its bases."""
    return {name for one in config_class.__mro__ for name in getattr(one, "__annotations__", {})}


def tiny_values(config_class: type, overrides: Values, sizes: Values = SIZES) -> Values:
    """Arguments of a config class: sizes of the fields that it has, the same for its parts, then ``overrides``."""
    names = fields(config_class)
    values = {key: value for key, value in sizes.items() if key in names}
    if {"sliding_window", "layer_types"} <= names:
        values["sliding_window"] = 32
    for key, part in (getattr(config_class, "sub_configs", None) or {}).items():
        inner = overrides.get(key, {})
        if part is AutoConfig:
            # Its default is the family's affair; sizes go by the same names in all of them.
            part = CONFIG_MAPPING[inner.get("model_type", "llama" if key == "text_config" else "siglip_vision_model")]
        # A part that names no sizes of its own, such as attn_config of MPT, takes the overrides alone.
        values[key] = tiny_values(part, inner, SIZES if key == "text_config" else TOWER)
    return values | {key: value for key, value in overrides.items() if key not in values or not isinstance(value, dict)}


def tiny_model(name: str) -> PreTrainedModel:
    """A model of a family in evaluation mode, with seeded random weights, in fp64 where the family allows it."""
    family, more = model_type(name), VARIANTS[name][1] if name in VARIANTS else {}
    config_class = CONFIG_MAPPING[family]
    config = config_class(**copy.deepcopy(tiny_values(config_class, OVERRIDES.get(family, {}) | more)))
    kinds = {tf.AutoModelForCausalLM: CAUSAL, tf.AutoModelForImageTextToText: WITH_IMAGES}
    loader = next((kind for kind, names in kinds.items() if family in names), tf.AutoModelForSeq2SeqLM)
    torch.manual_seed(0)
    implementation = {"attn_implementation": "eager"} if name in EAGER else {}
    model = loader.from_config(config, **implementation).to(torch.float32 if name in FLOAT32 else torch.float64).eval()
    # The default groups tokens by expert, which torch does not do in fp64.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            _vary(parameter)
    return model


def _vary(parameter: Tensor) -> None:
    """Norms, biases and sinks begin as constants, which hide what reads them."""
    if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
        parameter += 0.1 * torch.randn_like(parameter)
