"""Which models a set of gates belongs to: those of the same sizes and the same RoPE, whatever their class.

A causal model, its backbone, a reward model and the text model inside of a vision-language model attend alike.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from seerattn.hf.state import AttentionLayer

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


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
        "num_attention_heads": common([layer.num_heads for layer in layers]),
        "num_key_value_heads": common([layer.num_kv_heads for layer in layers]),
        "head_dim": common([layer.head_dim for layer in layers]),
        "rope": _plain(getattr(config, "rope_parameters", None) or {}),
    }


def check_identity(gates: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuses gates of another model; what gates of earlier versions do not say is not asked.

    Raises:
        ValueError: names the first field that differs.
    """
    for field in (*_SIZES, "rope"):
        same = _same_rope if field == "rope" else operator.eq
        if field in gates and not same(gates[field], model[field]):
            raise ValueError(
                f"gates must belong to the model, got gates for {field} = {gates[field]} and a model with "
                f"{field} = {model[field]}; attach them to the model that they were trained for"
            )


def _same_rope(gates: Any, model: Mapping[str, Any]) -> bool:
    """Whether two models rotate alike, or one is the other with its context extended by YaRN.

    Gates of the shorter context are then what fine-tuning starts from. What only one side names, another version of
    transformers named.
    """
    if not isinstance(gates, Mapping):
        return False
    kinds = gates.get("rope_type", "default"), model.get("rope_type", "default")
    if kinds == ("default", "yarn"):
        return gates.get("rope_theta") == model.get("rope_theta")
    return kinds[0] == kinds[1] and all(gates[key] == model[key] for key in gates.keys() & model.keys())


def check_sizes(base: Any, layers: Sequence[int] | None) -> None:
    """Refuses a description that is none, before anything is built by it.

    Raises:
        ValueError: a size is missing or no positive number.
    """
    if not isinstance(base, Mapping):
        raise ValueError(f"base_model of gates must hold the sizes of their model, got {type(base).__name__}")
    for field in _SIZES:
        value = base.get(field)
        by_layer = isinstance(value, list) and field != "num_hidden_layers"
        whole = by_layer and value and (layers is None or len(value) == len(layers))
        each = value if whole else [value]
        if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1 << 24 for size in each):
            raise ValueError(f"{field} in base_model of gates must be a positive number, got {str(value)[:40]}")
    if base["num_hidden_layers"] <= max(layers or [], default=0):
        raise ValueError(f"layers of gates must be below num_hidden_layers {base['num_hidden_layers']}, got {layers}")


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of whatever adapters it is wrapped in."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "model", None) or getattr(model, "base_model", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
        model = inner
    return model


def _plain(value: Any) -> Any:
    """JSON types, numbers as floats, so that 10000 and 10000.0 are one."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
