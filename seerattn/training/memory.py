"""What a training run will need of memory, estimated before it starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from seerattn.hf.chunked_loss import LOGITS_ELEMENTS

if TYPE_CHECKING:
    from seerattn.gate import AttnGate

_FP32, _BF16 = 4, 2
# Copies of a block map that live at once: scores, target, their masked and normalised forms, softmax, gradient.
_MAPS = 8


def estimate_memory(
    model: nn.Module,
    gates: list[AttnGate],
    *,
    micro_batch_size: int,
    context: int,
    target_share: float = 1.0,
    decode_rows: int = 0,
) -> dict[str, int]:
    """Bytes that one process needs on its device, by what they are for.

    The base runs without a graph and each gate's graph is freed before the next layer runs, so activations and graph
    count for one layer, whatever the depth of the model.

    Args:
        model: the model with its gates.
        gates: its gates.
        micro_batch_size: samples that run at once.
        context: tokens of a sample.
        target_share: share of the query blocks that gates learn from.
        decode_rows: single tokens of a sample that gates learn from.
    """
    base = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config.get_text_config()
    tokens = micro_batch_size * context
    gate = max(gates, key=lambda g: g.num_heads)
    heads, kv_heads, width = gate.num_heads, gate.num_kv_heads, gate.head_dim

    attention = 2 * (heads + kv_heads) * width
    mlp = 3 * _intermediate(config)
    activations = tokens * (2 * config.hidden_size + max(attention, mlp)) * base[0].element_size()
    return {
        "base model": sum(p.numel() * p.element_size() for p in base),
        "gates, gradients, AdamW": 4 * trained * _FP32,
        "activations of a layer": activations,
        "gate inputs and graph of a layer": _gate_bytes(gate, tokens, share=target_share),
        "target and score maps of a layer": _map_bytes(gate, micro_batch_size, context, share=target_share)
        + _token_bytes(gate, micro_batch_size, context, rows=min(decode_rows, context)),
    }


def estimate_finetuning(
    model: nn.Module,
    gates: list[AttnGate],
    *,
    micro_batch_size: int,
    context: int,
    checkpointing: bool,
    autocast: bool,
    target_share: float,
    masked: bool,
    processes: int = 1,
    sharded: bool = False,
) -> dict[str, int]:
    """Bytes that one process needs on its device to train everything, by what they are for.

    Args:
        model: the model with its gates.
        gates: its gates; none for a dense run.
        micro_batch_size: samples that run at once.
        context: tokens of a sample.
        checkpointing: whether layers run again in the backward pass.
        autocast: whether fp32 weights compute in bfloat16.
        target_share: share of the query blocks that gates learn from.
        masked: whether packed documents run through dense attention, under a mask over all pairs of tokens.
        processes: that train together.
        sharded: whether FSDP2 spreads weights, gradients and optimizer over them; otherwise DDP keeps all whole.
    """
    config = model.config.get_text_config()
    layers, hidden, tokens = config.num_hidden_layers, config.hidden_size, micro_batch_size * context
    parameters = list(model.parameters())
    held = sum(p.numel() * p.element_size() for p in parameters)
    count = sum(p.numel() for p in parameters)
    stream = parameters[0].element_size()
    compute = _BF16 if autocast else stream
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    shards = processes if sharded else 1

    # Saved for the backward pass: norms and residuals, q and k before and after RoPE, v and output, the MLP.
    layer = tokens * (4 * hidden * stream + 3 * (heads + kv_heads) * width * stream)
    layer += tokens * 4 * _intermediate(config) * compute
    shown = {
        "weights": held // shards,
        # FSDP has to reduce those of every micro-batch for that: until then they are whole.
        "gradients": held // shards,
        "AdamW": 2 * held // shards,
        "inputs of all layers" if checkpointing else "activations of all layers": layers
        * (tokens * hidden * stream if checkpointing else layer),
        "logits": min(LOGITS_ELEMENTS, tokens * config.vocab_size) * (2 * _FP32 + compute),
    }
    if checkpointing:
        shown["activations of a layer"] = layer
    if processes > 1 and not sharded:
        # The buffers that DDP reduces; the gradients lie beside them (gradient_as_bucket_view is off).
        shown["buckets of gradients"] = held
    if masked:
        # A byte each, and what scaled_dot_product_attention makes of it to add to the logits, saved by every layer.
        kept = 1 if checkpointing else layers
        shown["mask of packed documents"] = tokens * context * (1 + kept * compute)
    # Autocast keeps its copies of all weights for the length of a forward.
    copies = count * compute if autocast else 0
    if shards > 1:
        # FSDP2 holds two layers whole, and copies made of them are freed with them unless the graph needs them.
        copies = 2 * held // layers + (copies // layers if checkpointing else copies)
    if copies:
        shown["working copies of weights"] = copies
    if gates:
        gate = max(gates, key=lambda g: g.num_heads)
        shown["gate inputs and graph of a layer"] = _gate_bytes(gate, tokens, share=target_share)
        shown["target and score maps of a layer"] = _map_bytes(gate, micro_batch_size, context, share=target_share)
    return shown


def _intermediate(config: object) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def _gate_bytes(gate: AttnGate, tokens: int, *, share: float) -> int:
    """Inputs of a gate and its graph over a share of the query blocks."""
    form, heads, kv_heads, width = gate.config, gate.num_heads, gate.num_kv_heads, gate.head_dim
    q_windows = tokens * form.query_subblocks // form.block_q
    k_windows = tokens * form.key_subblocks // form.block_k
    pooled = q_windows * (len(form.q_pooling) * heads * width + share * gate.mask_heads * gate.gate_dim)
    pooled += k_windows * (len(form.k_pooling) + 1) * gate.k_weight.shape[0] * width
    # Vectors before RoPE and the two halves that un-rotation makes of them.
    unrotated = 2 * tokens * (heads + kv_heads) * width
    return int((unrotated + 2 * pooled) * _FP32)


def _map_bytes(gate: AttnGate, micro_batch_size: int, context: int, *, share: float) -> int:
    blocks = math.ceil(share * math.ceil(context / gate.config.block_q)) * math.ceil(context / gate.config.block_k)
    return _MAPS * micro_batch_size * gate.num_heads * blocks * _FP32


def _token_bytes(gate: AttnGate, micro_batch_size: int, context: int, *, rows: int) -> int:
    """Targets of single tokens, and their scores of sub-blocks, which a gate keeps a few copies of."""
    pieces = _MAPS + 3 * gate.config.key_subblocks
    return pieces * micro_batch_size * gate.num_heads * rows * math.ceil(context / gate.config.block_k) * _FP32
