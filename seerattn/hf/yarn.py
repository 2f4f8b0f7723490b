"""Extending a model's context with YaRN (arXiv 2309.00071), through the model's own RoPE parameters."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


def extend_context(model: PreTrainedModel, factor: float) -> None:
    """Gives a model YaRN positions for a context ``factor`` times as long; saved with its config.

    Args:
        model: with plain RoPE, not attached to: what was found of its rotation would no longer hold.
        factor: of its ``max_position_embeddings``; 1 changes nothing.

    Raises:
        ValueError: the model has no plain RoPE with one theta for all layers.
    """
    if factor == 1:
        return
    config = model.config.get_text_config()
    rope, longest = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not rope or "rope_theta" not in rope or longest is None:
        raise ValueError(
            f"context_factor needs a model with one RoPE for all layers, got {type(model).__name__} with "
            f"rope_parameters {rope}; use context_factor 1"
        )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"context_factor needs a model with plain RoPE, got one that is scaled already ({rope['rope_type']}); "
            "use context_factor 1"
        )
    config.rope_parameters = dict(rope) | {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": longest,
    }
    config.max_position_embeddings = round(longest * factor)
    # Frequencies and the factor of attention are made when the module is.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(getattr(child, "inv_freq", None), Tensor):
                setattr(parent, name, type(child)(config).to(child.inv_freq.device))
