"""What of vLLM cannot be had together with gates, refused before a model is loaded."""

from __future__ import annotations

from typing import Any

# Of caches whose pages hold keys as attention takes them.
_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32", "half", "float")


def check_engine(config: Any) -> None:
    """Refuses an engine that gates cannot follow.

    Args:
        config: vLLM's whole one.

    Raises:
        ValueError: names the first option that must go.
    """
    parallel = config.parallel_config
    wrong = {
        "speculative_config": (config.speculative_config is not None, "drafts are written where keys were counted"),
        "kv_transfer_config": (config.kv_transfer_config is not None, "keys would come that nobody was seen to write"),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size > 1, "no process has all keys"),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size > 1, "no process has all keys"),
        "enable_dbo": (parallel.enable_dbo, "a batch would be cut in two"),
    }
    for name, (is_set, reason) in wrong.items():
        if is_set:
            raise ValueError(f"{name} must not be set where gates are asked for, as {reason}; leave it out")


def check_decoding(config: Any) -> None:
    """Refuses ranks that have no KV group in whole, whose heads choose the blocks of a decoded token together.

    Args:
        config: vLLM's whole one.

    Raises:
        ValueError: there are more ranks than KV heads.
    """
    ranks, heads = config.parallel_config.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    if ranks > heads:
        raise ValueError(
            f"tensor_parallel_size must be at most the {heads} KV heads with a decode_policy, got {ranks}; use fewer "
            'ranks, or decode densely with "decode_policy": null'
        )


def check_layer(layer: Any) -> None:
    """Refuses an attention layer that gates cannot choose for, and whose output nobody would miss them in.

    Args:
        layer: vLLM's implementation of it.

    Raises:
        ValueError: says what it has.
    """
    if str(getattr(layer.attn_type, "value", layer.attn_type)) != "decoder":
        raise ValueError(
            f"attention layers must be those of a decoder where gates are asked for, got one of kind "
            f"{getattr(layer.attn_type, 'value', layer.attn_type)}; serve encoders without gates"
        )
    if layer.kv_cache_dtype not in _PLAIN_CACHES:
        raise ValueError(
            f"kv_cache_dtype must be that of the model where gates are asked for, got {layer.kv_cache_dtype}; leave "
            "--kv-cache-dtype out"
        )
    if layer.alibi_slopes is not None:
        raise ValueError("attention must have no ALiBi slopes where gates are asked for, got some; serve this model "
                         "without gates")  # fmt: skip
    if layer.kv_sharing_target_layer_name is not None:
        raise ValueError(
            "attention layers must have keys of their own where gates are asked for, got one that has those of "
            f"{layer.kv_sharing_target_layer_name}; serve this model without gates"
        )
