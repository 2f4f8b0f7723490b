"""What a distillation run will need of memory, estimated before it starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from seerattn.gate import AttnGate

_FP32 = 4
# Copies of a block map that live at once: scores, target, their masked and normalised forms, softmax, gradient.
_MAPS = 8


def estimate_memory(model: nn.Module, gates: list[AttnGate], *, micro_batch_size: int, context: int) -> dict[str, int]:
    """Bytes that one process needs on its device, by what they are for.

    The base runs without a graph and each gate's graph is freed before the next layer runs, so activations and graph
    count for one layer, whatever the depth of the model.

    Args:
        model: the model with its gates.
        gates: its gates.
        micro_batch_size: samples that run at once.
        context: tokens of a sample.
    """
    base = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config.get_text_config()
    tokens = micro_batch_size * context
    gate = max(gates, key=lambda g: g.num_heads)
    heads, kv_heads, width = gate.num_heads, gate.num_kv_heads, gate.head_dim
    form = gate.config

    attention = 2 * (heads + kv_heads) * width
    mlp = 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    activations = tokens * (2 * config.hidden_size + max(attention, mlp)) * base[0].element_size()

    q_windows = tokens * form.query_subblocks // form.block_q
    k_windows = tokens * form.key_subblocks // form.block_k
    pooled = q_windows * (len(form.q_pooling) * heads * width + gate.mask_heads * gate.gate_dim)
    pooled += k_windows * (len(form.k_pooling) + 1) * gate.k_weight.shape[0] * width
    # Vectors before RoPE and the two halves that un-rotation makes of them.
    unrotated = 2 * tokens * (heads + kv_heads) * width
    blocks = math.ceil(context / form.block_q) * math.ceil(context / form.block_k)
    return {
        "base model": sum(p.numel() * p.element_size() for p in base),
        "gates, gradients, AdamW": 4 * trained * _FP32,
        "activations of a layer": activations,
        "gate inputs and graph of a layer": (unrotated + 2 * pooled) * _FP32,
        "target and score maps of a layer": _MAPS * micro_batch_size * heads * blocks * _FP32,
    }
