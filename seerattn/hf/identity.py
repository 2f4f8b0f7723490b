"""Which models a set of gates belongs to: those of the same sizes and the same RoPE, whatever their class.

A causal model, its backbone, a reward model and the text model inside of a vision-language model attend alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from seerattn.gate_files import plain_json
from seerattn.hf.state import AttentionLayer


def identity(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> dict[str, Any]:
    """What decides whether gates fit a model, in plain JSON types.

    Sizes that differ between the gated layers are lists, one entry a layer.
    """
    config = model.config.get_text_config()

    def common(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": common([layer.whole_heads[0] for layer in layers]),
        "num_key_value_heads": common([layer.whole_heads[1] for layer in layers]),
        "head_dim": common([layer.head_dim for layer in layers]),
        "rope": plain_json(getattr(config, "rope_parameters", None) or {}),
    }


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of whatever adapters it is wrapped in."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "model", None) or getattr(model, "base_model", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
        model = inner
    return model
