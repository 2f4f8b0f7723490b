"""Tensor parallelism: which heads of an attention layer this process has.

transformers cuts the projections of a model over processes (``tp_plan="auto"``), so that an attention module computes
some of its heads, and the attention function sees those alone. Gates follow their heads: each process has those of
its own.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from seerattn.gate.heads import Heads


def part_of(model: PreTrainedModel, module: nn.Module, num_heads: int, num_kv_heads: int) -> Heads | None:
    """The heads of an attention module that this process has; None where it has all.

    Args:
        model: the model.
        module: the attention module.
        num_heads: query heads that were seen here.
        num_kv_heads: key/value heads that were seen here.

    Raises:
        ValueError: the layer is cut otherwise than by heads.
    """
    ranks = getattr(model, "tp_size", None) or 1
    cut = [p for p in module.parameters() if isinstance(p, DTensor) and any(isinstance(x, Shard) for x in p.placements)]
    if ranks == 1 or not cut:
        return None
    config = model.config.get_text_config()
    whole = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if (num_heads * ranks, num_kv_heads * ranks) != whole:
        raise ValueError(
            f"tensor parallelism must cut a layer by its heads, got {num_heads} query and {num_kv_heads} KV heads in "
            f"one of {ranks} processes, of {whole[0]} and {whole[1]}; use as many processes as divide both"
        )
    mesh = cut[0].device_mesh
    return Heads.of_rank(*whole, mesh.get_local_rank("tp" if mesh.ndim > 1 else None), ranks)
