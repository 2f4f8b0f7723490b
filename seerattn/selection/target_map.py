"""Target maps: what a KV group shares of them, and how much of them chosen blocks hold.

`B` batch, `H` query heads, `Hm` mask heads (`H` or `HKV`), `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_target(target: Tensor, mask_heads: int) -> Tensor:
    """The map that a gate with ``mask_heads`` heads learns from.

    Args:
        target: ``[B, H, Nq, Nk]``, rows sum to 1 (or 0 where a row holds no query).
        mask_heads: ``H``, or ``HKV`` for a gate that a KV group shares.

    Returns:
        ``[B, Hm, Nq, Nk]``: a shared block matters as much as to the head of the group that needs it most, so the
        maximum over the group, every row divided by its sum.
    """
    heads = target.shape[1]
    if heads == mask_heads:
        return target
    grouped = target.unflatten(1, (mask_heads, heads // mask_heads)).amax(2)
    return grouped / grouped.sum(-1, keepdim=True).clamp_min(torch.finfo(grouped.dtype).tiny)


def target_recall(mask: Tensor, target: Tensor) -> Tensor:
    """Share of the target map that the kept blocks hold, averaged over the rows that hold a query.

    Args:
        mask: bool ``[B, Hm, Nq, Nk]``, broadcast over a KV group if ``Hm < H``.
        target: ``[B, H, Nq, Nk]``, rows sum to 1 or 0.

    Returns:
        ``[B, H]``.
    """
    if mask.shape[1] != target.shape[1]:
        mask = mask.repeat_interleave(target.shape[1] // mask.shape[1], dim=1)
    rows = (target.sum(-1) > 0).sum(-1)
    return (target * mask).sum((-1, -2)) / rows.clamp_min(1)
