"""`impl="reference"`: listed keys and values are gathered, and attended to in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattn.selection.decode_blocks import DecodeBlocks

# Blocks that a dense call is cut into; their size is nowhere seen.
DENSE_BLOCK = 64


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    blocks: DecodeBlocks | None,
    block_table: Tensor | None,
    starts: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `api.decode_attention`, which validates the arguments; returns the log-sum-exp in any case."""
    batch, heads, dim = q.shape
    kv_heads = k.shape[1 if block_table is None else 2]
    if blocks is None:
        tokens = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1]
        width = -(-tokens // DENSE_BLOCK)
        blocks = DecodeBlocks.dense(lengths, kv_heads=kv_heads, block_k=DENSE_BLOCK, width=width)
    listed = torch.arange(blocks.indices.shape[2], device=q.device) < blocks.counts[..., None]
    place = torch.arange(blocks.block_k, device=q.device)
    position = (blocks.indices.long()[..., None] * blocks.block_k + place).flatten(2)  # [B, HKV, L]
    seen = listed.repeat_interleave(blocks.block_k, 2) & (position < lengths[:, None, None])
    if starts is not None:
        position = position + starts.long()[:, None, None]
    position = position.masked_fill(~seen, 0)
    work = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_gathered(x, position, seen, block_table).to(work) for x in (k, v))

    queries = q.to(work).view(batch, kv_heads, heads // kv_heads, dim)
    scores = queries @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(work).view(kv_heads, -1))
    # Where there is no key all scores are -inf, and so may the log-sum-exp be.
    weights = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0))
    return (weights @ values).to(q.dtype).view(q.shape), lse.float().view(batch, heads)


def _gathered(x: Tensor, position: Tensor, seen: Tensor, block_table: Tensor | None) -> Tensor:
    """Keys or values ``[B, HKV, L, D]`` at positions ``[B, HKV, L]``; 0 where they are not seen."""
    row = torch.arange(position.shape[0], device=x.device)[:, None, None]
    head = torch.arange(position.shape[1], device=x.device)[:, None]
    if block_table is None:
        found = x[row, head, position] if x.shape[2] else x.new_zeros(*position.shape, x.shape[3])
    else:
        page = block_table[row, position // x.shape[1]].long().masked_fill(~seen, 0)
        found = x[page, position % x.shape[1], head]
    return found.masked_fill(~seen[..., None], 0)
