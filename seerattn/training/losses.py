"""Distillation losses: how far gate scores are from the target map.

`B` batch, `H` query heads, `Hm` mask heads (`H` or `HKV`), `Nq`, `Nk` numbers of query and key blocks.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["kl", "mse", "smooth_l1", "overlap", "ranking"]
RowWeight = Literal["uniform", "mass"]

# The blocks of a row that "overlap" and "ranking" want on top: the share that a density of .1 keeps.
BEST_SHARE = 0.1


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
    the official code averages over both. Rows are averaged sample by sample, then samples, so that the loss of a batch
    is the mean of the losses of its samples alone.

    Args:
        scores: logits over key blocks ``[B, Hm, Nq, Nk]``, -inf where nothing is causal.
        target: map ``[B, Hm, Nq, Nk]``, see `group_target`. A zero row holds no query and is left out.
        ignore: bool, broadcastable to the scores: blocks that selection decides by itself. They are removed from both
            distributions, which are then normalised over what is left; rows with nothing left drop out.
        kind: "kl" is KL(target || softmax(scores)), the paper's; "mse" and "smooth_l1" compare probabilities. Two ask
            for the order alone: "overlap" is -log of the softmax mass on the target's best tenth of the row's blocks,
            and "ranking" the mean of softplus(worse - better) over all pairs of one of them and one of the rest
            (RankNet, Burges et al., ICML 2005).
        row_weight: "uniform", or "mass": rows count by the share of their map that is not ignored, so that a row
            whose forced blocks hold everything teaches nothing.

    Returns:
        Scalar; a sample in which no row counts has loss 0.
    """
    return weighted_mean(*gate_loss_sums(scores, target, ignore=ignore, kind=kind, row_weight=row_weight)).mean()


def gate_loss_sums(
    scores: Tensor,
    target: Tensor,
    *,
    ignore: Tensor | None = None,
    kind: LossKind = "kl",
    row_weight: RowWeight = "uniform",
) -> tuple[Tensor, Tensor]:
    """What `gate_loss` divides, for samples that come in pieces; arguments are its own.

    Returns:
        By sample, ``[B]`` each: the losses of its query-block rows times their weights, summed, and the sum of the
        weights.
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
    if kind == "overlap":
        best, is_best = _best_blocks(target, ~hidden)
        per_row = -log_p.gather(-1, best).masked_fill(~is_best, -1e30).logsumexp(-1)
    elif kind == "ranking":
        per_row = _ranking(scores.masked_fill(hidden, 0.0), hidden, *_best_blocks(target, ~hidden))
    elif kind == "kl":
        per_row = torch.where(target > 0, target * (target.clamp_min(1e-30).log() - log_p), 0.0).sum(-1)
    else:
        distance = F.mse_loss if kind == "mse" else F.smooth_l1_loss
        per_row = distance(log_p.exp(), target, reduction="none").masked_fill(hidden, 0.0).sum(-1)
    # Rows without weight may hold anything finite or not, and must not reach the sum.
    total = torch.where(weight > 0, per_row * weight, 0.0)
    return total.sum((1, 2)), weight.sum((1, 2))


def weighted_mean(total: Tensor, weight: Tensor) -> Tensor:
    """Sums of weighted values over the sums of their weights; 0 where nothing counts."""
    return total / weight.clamp_min(torch.finfo(weight.dtype).tiny)


def _best_blocks(target: Tensor, open_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[B, Hm, Nq, K]`` of each row's best blocks, and which of them count: a tenth of the row's open blocks,
    at least one, and none that the target does not see."""
    wanted = (open_blocks.sum(-1, keepdim=True) * BEST_SHARE).ceil()
    width = max(1, math.ceil(target.shape[-1] * BEST_SHARE))
    value, best = target.topk(min(width, target.shape[-1]), dim=-1)
    place = torch.arange(best.shape[-1], device=target.device)
    return best, (place < wanted) & (value > 0)


def _ranking(scores: Tensor, hidden: Tensor, best: Tensor, is_best: Tensor) -> Tensor:
    """Mean of softplus(worse - better) over the pairs of each row ``[B, Hm, Nq]``; 0 where there is no pair."""
    worse = ~hidden
    worse = worse & ~torch.zeros_like(worse).scatter(-1, best, is_best)
    pairs = is_best[..., :, None] & worse[..., None, :]
    gaps = F.softplus(scores[..., None, :] - scores.gather(-1, best)[..., :, None])
    return (gaps * pairs).sum((-1, -2)) / pairs.sum((-1, -2)).clamp_min(1)
