"""Distillation losses and recall: how far gate scores are from the max-pooled attention map.

`B` batch, `H` query heads, `Hm` mask heads (`H` or `HKV`), `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["kl", "mse", "smooth_l1"]
RowWeight = Literal["uniform", "mass"]


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


def gate_loss(
    scores: Tensor,
    target: Tensor,
    *,
    ignore: Tensor | None = None,
    kind: LossKind = "kl",
    row_weight: RowWeight = "uniform",
) -> Tensor:
    """Loss of gate scores against the target map, summed over key blocks and averaged over query-block rows.

    Summing over keys keeps the scale of the loss, and so of its gradient, independent of the length of the context;
    the official code averages over both.

    Args:
        scores: logits over key blocks ``[B, Hm, Nq, Nk]``, -inf where nothing is causal.
        target: map ``[B, Hm, Nq, Nk]``, see `group_target`. A zero row holds no query and is left out.
        ignore: bool, broadcastable to the scores: blocks that selection decides by itself. They are removed from both
            distributions, which are then normalised over what is left; rows with nothing left drop out.
        kind: "kl" is KL(target || softmax(scores)), the paper's; "mse" and "smooth_l1" compare probabilities.
        row_weight: "uniform", or "mass": rows count by the share of their map that is not ignored, so that a row
            whose forced blocks hold everything teaches nothing.

    Returns:
        Scalar; 0 if no row counts.
    """
    if kind not in get_args(LossKind):
        raise ValueError(f"kind must be one of {list(get_args(LossKind))}, got {kind!r}")
    if row_weight not in get_args(RowWeight):
        raise ValueError(f"row_weight must be one of {list(get_args(RowWeight))}, got {row_weight!r}")
    hidden = torch.isneginf(scores)
    if ignore is not None:
        hidden = hidden | ignore
    target = target.masked_fill(hidden, 0.0)
    mass = target.sum(-1)
    weight = (mass > 0).to(target.dtype) if row_weight == "uniform" else mass
    target = target / mass.clamp_min(torch.finfo(target.dtype).tiny)[..., None]
    # A finite fill keeps rows with nothing left free of NaN, forward and backward; their weight is zero.
    log_p = scores.masked_fill(hidden, -1e30).log_softmax(-1)
    if kind == "kl":
        per_block = torch.where(target > 0, target * (target.clamp_min(1e-30).log() - log_p), 0.0)
    else:
        distance = F.mse_loss if kind == "mse" else F.smooth_l1_loss
        per_block = distance(log_p.exp(), target, reduction="none").masked_fill(hidden, 0.0)
    return (per_block.sum(-1) * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


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
