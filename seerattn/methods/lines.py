"""Vertical and slash lines of an attention map: scores from the last queries, and lines laid on the block grid.

A *column* is a key that every query attends to, an *offset* a distance from query to key at which every query attends.
Both are bool ``[B, H, S]``. A line is one token wide and a block is not, so a column becomes its key block and an
offset the one or two key blocks that it crosses in each row of query blocks; `token_density` says what the lines alone
would have cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.selector import AttentionContext

# Probabilities of the last queries, or places of the block map, that are held at once.
STRIP_ELEMENTS = 1 << 26


def last_query_scores(q: Tensor, k: Tensor, context: AttentionContext, *, last: int = 64) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, summed along columns and along diagonals.

    Args:
        q: post-RoPE ``[B, H, T, D]``; the last query is the last key.
        k: post-RoPE ``[B, HKV, S, D]``.
        context: scale, soft cap and sinks of the logits.
        last: how many of the last queries; all of a shorter call.

    Returns:
        By key position and by offset ``query - key``, fp32 ``[B, H, S]`` each.
    """
    batch, dim = q.shape[0], q.shape[3]
    kv_heads, k_len = k.shape[1:3]
    q = q[:, :, -last:] * context.scale
    rows = q.shape[2]
    q = q.reshape(batch, kv_heads, -1, dim)
    sinks = None if context.sinks is None else context.sinks.float().view(kv_heads, -1, 1, 1)
    future = torch.ones(rows, k_len, dtype=torch.bool, device=q.device).triu_(k_len - rows + 1)
    vertical, slash = [], []
    at_once = max(1, STRIP_ELEMENTS // (batch * q.shape[2] * k_len))
    for some in (slice(h, h + at_once) for h in range(0, kv_heads, at_once)):
        logits = (q[:, some] @ k[:, some].transpose(-1, -2)).float().unflatten(2, (-1, rows))
        if context.softcap is not None:
            logits = context.softcap * torch.tanh(logits / context.softcap)
        logits.masked_fill_(future, -torch.inf)
        p = logits.softmax(-1)
        if sinks is not None:
            p *= torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks[some])
        vertical.append(p.sum(-2).flatten(1, 2))
        slash.append(sum_diagonals(p).flatten(1, 2))
    return torch.cat(vertical, 1), torch.cat(slash, 1)


def sum_diagonals(p: Tensor) -> Tensor:
    """Sums ``[..., rows, S]`` over equal distances: ``[..., S]``; the last row is the last position."""
    rows, k_len = p.shape[-2:]
    # From the end of a row on, distance grows by one a key, and one later in the next row: with rows that are one
    # shorter than they are long, equal distances stand below each other.
    flat = F.pad(p.flip(-1), (0, rows - 1)).flatten(-2)[..., rows - 1 :]
    width = k_len + rows - 2
    return flat[..., : rows * width].unflatten(-1, (rows, width))[..., :k_len].sum(-2)


def keep_best(scores: Tensor, count: Tensor) -> Tensor:
    """True at the ``count`` best places of the last dimension, the earlier first among equals.

    Args:
        scores: ``[B, H, ...]``.
        count: int ``[H]``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count.view(-1, *[1] * (scores.ndim - 2))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))


def lines_to_blocks(columns: Tensor, offsets: Tensor, *, q_len: int, block_q: int, block_k: int) -> Tensor:
    """The blocks that hold a token of a line.

    Args:
        columns: bool ``[B, H, S]``.
        offsets: bool ``[B, H, S]``.
        q_len: queries of the call, the last of the ``S`` positions.
        block_q: query block size in tokens.
        block_k: key block size in tokens.

    Returns:
        Bool ``[B, H, Nq, Nk]``; blocks of the future may be true in columns.
    """
    k_len, device = columns.shape[-1], columns.device
    start = k_len - q_len
    rows, blocks = num_query_blocks(start, q_len, block_q), -(-k_len // block_k)
    first_key = torch.arange(blocks, device=device) * block_k
    first = ((start // block_q + torch.arange(rows, device=device)) * block_q)[:, None]
    last = (first + block_q - 1).clamp(max=k_len - 1)
    first = first.clamp(min=start)
    # The queries first .. last see the keys of a block at the offsets nearest .. farthest.
    farthest = (last - first_key + 1).clamp(min=0)
    nearest = torch.minimum((first - first_key - block_k + 1).clamp(min=0), farthest)
    before = F.pad(offsets.cumsum(-1, dtype=torch.int32), (1, 0))
    in_columns = F.pad(columns, (0, blocks * block_k - k_len)).unflatten(-1, (blocks, block_k)).any(-1)
    mask = in_columns[:, :, None].repeat(1, 1, rows, 1)
    at_once = max(1, STRIP_ELEMENTS // (mask[:, :, 0].numel()))
    for some in (slice(r, r + at_once) for r in range(0, rows, at_once)):
        mask[:, :, some] |= before[..., farthest[some]] > before[..., nearest[some]]
    return mask


def token_density(columns: Tensor, offsets: Tensor, *, q_len: int) -> Tensor:
    """Share of the causal (query, key) pairs that lie on a line, float64 ``[B, H]``."""
    k_len = columns.shape[-1]
    start = k_len - q_len
    place = torch.arange(k_len, device=columns.device)
    seen = (k_len - place.clamp(min=start)).double()
    before = F.pad(columns.cumsum(-1, dtype=torch.int32), (1, 0))
    # Columns that an offset meets at some query.
    met = before[..., k_len - place] - before[..., (start - place).clamp(min=0)]
    pairs = (columns * seen).sum(-1) + (offsets * (seen - met)).sum(-1)
    return pairs / ((start + 1 + k_len) * q_len / 2)
