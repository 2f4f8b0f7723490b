"""`impl="reference"`: block-sparse attention in plain torch, on any device, differentiable.

An *item* is one query block with its list: all query heads that share the list against the listed key blocks. Items
are sorted by the length of their lists and walked in chunks of about equal cost; a chunk gathers its key and value
blocks and is two batched products around a softmax. Only listed blocks are read, so cost follows the kept area.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seerattn.ops.grid import from_grid, to_grid
from seerattn.ops.launch import needs_gradients
from seerattn.selection.block_indices import BlockIndices

# Scores held at once, in elements. CPU, T = 16384: 0.30, 0.27, 0.24, 0.23, 0.25 s with 2^18 to 2^22 (call overhead
# against caches).
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
# Training on a CPU takes larger chunks: the gradient of a gather has the size of the whole input, once a chunk.
TRAIN_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
# Lists are padded to the longest of their span; a list below this share of it starts a new span.
MIN_FILL = 0.8


class _Buffers:
    """Scratch for `out=` arguments, reused by all chunks of a call; None where autograd forbids `out=`.

    On a CPU fresh pages for every chunk cost more than the arithmetic: 0.63 s against 0.24 s at 16k tokens.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, reuse: bool) -> None:
        self._empty = torch.empty(0, dtype=dtype, device=device) if reuse else None
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        if self._empty is None:
            return None
        size = math.prod(shape)
        if self._flat.get(name, self._empty).numel() < size:
            self._flat[name] = self._empty.new_empty(size)
        return self._flat[name][:size].view(shape)


class _Chunk(NamedTuple):
    """``N`` items with lists padded to ``W``, right-aligned: diagonal blocks stand last, padding first."""

    q_rows: Tensor  # [N, members] rows of the query grid
    k_rows: Tensor  # [N, W] rows of the key grid; padding repeats a block of the list itself
    heads: Tensor  # [N, members] query heads
    tiles: Tensor  # [N, diagonal] causal tiles of the last blocks
    padding: Tensor  # bool [N, P], P <= W columns of which some are padding
    forced: Tensor  # bool [N, W] blocks that are never skipped; [N, 0] where none is
    real: Tensor  # bool [N, block_q] whether a row is a query; [N, 0] where no block is skipped


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    lengths: list[int],
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens: list[int] | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `api.block_sparse_attention`, which validates the arguments.

    ``lengths`` holds the keys of every row; with ``cu_seqlens`` the rows lie one after the other in a batch of one.
    Where blocks may be skipped, ``counts`` int32 ``[rows, H, Nq]`` gets the number of those that were not.
    """
    if cu_seqlens is not None:
        rows = [_left_padded(x, cu_seqlens) for x in (q, k, v)]
        call = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse, "counts": counts}
        out, lse = block_sparse_attention(*rows, blocks, lengths=lengths, **call)
        return _packed(out, lengths), None if lse is None else _packed(lse, lengths)
    batch, heads, q_tokens, dim = q.shape
    block_q, block_k, num_q_blocks = blocks.block_q, blocks.block_k, blocks.num_q_blocks
    num_k_blocks = max(1, -(-max(lengths) // block_k))
    work = torch.promote_types(q.dtype, torch.float32)

    q_len = [min(q_tokens, n) for n in lengths]
    offset = [(n - t) % block_q for n, t in zip(lengths, q_len)]
    q_grid = to_grid(q, offset=offset, length=q_len, size=num_q_blocks * block_q).reshape(-1, block_q * dim)
    k_grid, v_grid = (
        to_grid(x, offset=[0] * batch, length=lengths, size=num_k_blocks * block_k).to(work).reshape(-1, block_k * dim)
        for x in (k, v)
    )
    k_grid = k_grid * (scale if softcap is None else scale / softcap)
    causal = _causal_tiles(block_q, block_k, work, q.device)
    train = needs_gradients(q, k, v, sinks)
    buffer = _Buffers(work, q.device, reuse=not train)

    def attend(chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        n, members = chunk.q_rows.shape
        shape = (n, members * block_q, chunk.k_rows.shape[1] * block_k)
        listed = chunk.k_rows.flatten()
        queries = q_grid.index_select(0, chunk.q_rows.flatten()).to(work).view(n, -1, dim)
        keys = torch.index_select(k_grid, 0, listed, out=buffer("gathered", len(listed), block_k * dim))
        scores = torch.bmm(queries, keys.view(n, -1, dim).transpose(1, 2), out=buffer("scores", *shape))
        if softcap is not None:
            scores = torch.tanh(scores) * softcap
        _mask(scores.view(n, members, block_q, -1), chunk, causal)
        if blocks.skip_threshold is not None:
            kept = _skip(scores.view(n, members, block_q, -1, block_k), chunk, sinks, blocks.skip_threshold)
            if counts is not None:
                counts.view(-1).index_copy_(0, chunk.q_rows.flatten(), kept.flatten())
        # One fused softmax: maximum, difference, exponential and sum as passes of their own took 1.2x as long in all.
        p = torch.softmax(scores, -1, out=buffer("probabilities", *shape))
        values = torch.index_select(v_grid, 0, listed, out=buffer("gathered", len(listed), block_k * dim))
        out = torch.bmm(p, values.view(n, -1, dim), out=buffer("out", n, shape[1], dim))
        if sinks is None and not return_lse:
            return out, None
        lse = torch.logsumexp(scores, -1).view(n, members, block_q)
        if sinks is not None:
            sink = sinks.to(work)[chunk.heads][..., None]
            out = out * torch.sigmoid(lse - sink).view(n, -1, 1)
            lse = torch.logaddexp(lse, sink)
        return out, lse

    budget = (TRAIN_ELEMENTS if train else CHUNK_ELEMENTS)["cpu" if q.device.type == "cpu" else "cuda"]
    # Only rows that hold no query have an empty list, and `from_grid` drops those.
    out = q.new_empty(q_grid.shape)
    lse = q.new_empty(q_grid.shape[0], block_q, dtype=torch.float32) if return_lse else None
    for chunk in _chunks(blocks, heads, k.shape[1], num_k_blocks, budget):
        if train:  # backward computes the chunk again, so that no probabilities are kept
            part, part_lse = checkpoint(attend, chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            part, part_lse = attend(chunk)
        rows = chunk.q_rows.flatten()
        out.index_copy_(0, rows, part.to(q.dtype).view(-1, block_q * dim))
        if lse is not None:
            lse.index_copy_(0, rows, part_lse.float().view(-1, block_q))

    out = out.view(batch, heads, num_q_blocks * block_q, dim)
    out = from_grid(out, offset=offset, length=q_len, size=q_tokens)
    if lse is not None:
        lse = lse.view(batch, heads, num_q_blocks * block_q)
        lse = from_grid(lse, offset=offset, length=q_len, size=q_tokens, fill=-torch.inf)
    return out, lse


def _left_padded(x: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Sequences of one row ``[1, h, n, D]`` as the rows of a left-padded batch."""
    longest = max(end - begin for begin, end in pairwise(cu_seqlens))
    return torch.cat(
        [F.pad(x[:, :, begin:end], (0, 0, longest - end + begin, 0)) for begin, end in pairwise(cu_seqlens)]
    )


def _packed(x: Tensor, lengths: list[int]) -> Tensor:
    """The inverse of `_left_padded`, for ``[N, h, n, ...]``."""
    return torch.cat([x[b : b + 1, :, x.shape[2] - n :] for b, n in enumerate(lengths)], 2)


def _causal_tiles(block_q: int, block_k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias ``[tiles, block_q, block_k]`` that hides keys after their query.

    Tile ``i`` holds a key block that starts ``i * step - block_k`` tokens after its query block, ``step`` being the
    smaller block size: from all visible (0) to all hidden (last). The bias is finite: a query slot before the first
    token of a call may see no listed key at all, and a NaN there would spread in the backward pass.
    """
    step = min(block_q, block_k)
    shift = torch.arange(-block_k, block_q + 1, step, device=device)
    q_pos, k_pos = torch.arange(block_q, device=device), torch.arange(block_k, device=device)
    future = shift[:, None, None] + k_pos > q_pos[:, None]
    return torch.zeros(future.shape, dtype=dtype, device=device).masked_fill_(future, torch.finfo(dtype).min / 2)


def _mask(scores: Tensor, chunk: _Chunk, causal: Tensor) -> None:
    """Adds the causal and the padding bias to scores ``[N, members, block_q, W * block_k]``."""
    _, block_q, block_k = causal.shape
    n, diagonal = chunk.tiles.shape
    bias = causal.flatten(1).index_select(0, chunk.tiles.flatten()).view(n, 1, diagonal, block_q, block_k)
    scores[..., -diagonal * block_k :].unflatten(-1, (diagonal, block_k)).add_(bias.transpose(2, 3))
    if chunk.padding.shape[1]:
        bias = chunk.padding.repeat_interleave(block_k, 1).to(scores.dtype) * (torch.finfo(scores.dtype).min / 2)
        scores[..., : bias.shape[1]].add_(bias[:, None, None])


def _skip(scores: Tensor, chunk: _Chunk, sinks: Tensor | None, threshold: float) -> Tensor:
    """Leaves negligible blocks out of masked scores ``[N, members, block_q, W, block_k]``, and counts the others.

    Returns:
        int32 ``[N, members]``, blocks of a list that are not skipped.
    """
    largest = scores.amax(-1)
    met = largest.cummax(-1).values
    if sinks is not None:
        met = torch.maximum(met, sinks.to(met.dtype)[chunk.heads][..., None, None])
    needed = (largest - met >= math.log(threshold)) & chunk.real[:, None, :, None]
    needed = needed.any(2) | chunk.forced[:, None]
    scores.masked_fill_(~needed[:, :, None, :, None], torch.finfo(scores.dtype).min / 2)
    listed = F.pad(~chunk.padding, (0, needed.shape[2] - chunk.padding.shape[1]), value=True)
    return (needed & listed[:, None]).sum(-1, dtype=torch.int32)


def _chunks(blocks: BlockIndices, heads: int, kv_heads: int, num_k_blocks: int, budget: int) -> Iterator[_Chunk]:
    """Cuts the items, longest lists first, into chunks of at most ``budget`` scores (or one item)."""
    device, block_q, block_k = blocks.indices.device, blocks.block_q, blocks.block_k
    num_q_blocks, mask_heads = blocks.num_q_blocks, blocks.num_heads
    indices = blocks.indices.flatten(0, 2)
    counts, order = blocks.counts.flatten().sort(descending=True, stable=True)
    members = torch.arange(heads // mask_heads, device=device)
    begin = 0
    for widest, narrowest, size in _spans(counts):
        item, count = order[begin : begin + size], counts[begin : begin + size]
        begin += size
        row, head, block = item // (mask_heads * num_q_blocks), item // num_q_blocks % mask_heads, item % num_q_blocks
        q_heads = head[:, None] * len(members) + members
        column = torch.arange(widest, device=device) - (widest - count)[:, None]
        listed = indices[item].gather(1, column.clamp(min=0)).long()
        k_heads = row * kv_heads + head * kv_heads // mask_heads
        diagonal = listed[:, -max(1, block_q // block_k) :]
        start = blocks.q_start.to(device)[row]
        q_block = start // block_q + block
        ahead = diagonal * block_k - (q_block * block_q)[:, None]
        span = _Chunk(
            q_rows=(row[:, None] * heads + q_heads) * num_q_blocks + block[:, None],
            k_rows=k_heads[:, None] * num_k_blocks + listed,
            heads=q_heads,
            tiles=(ahead.clamp(-block_k, block_q) + block_k) // min(block_q, block_k),
            padding=column[:, : widest - narrowest] < 0,
            forced=column[:, :0] > 0,
            real=column[:, :0] > 0,
        )
        if blocks.skip_threshold is not None:
            position = (q_block * block_q)[:, None] + torch.arange(block_q, device=device)
            end = start + blocks.q_len.to(device)[row]
            first = torch.maximum(q_block * block_q, start)
            span = span._replace(
                forced=(column == 0) | (listed >= (first // block_k)[:, None]),
                real=(position >= start[:, None]) & (position < end[:, None]),
            )
        per_chunk = max(1, budget // (len(members) * block_q * block_k * widest))
        yield from (_Chunk(*(x[i : i + per_chunk] for x in span)) for i in range(0, size, per_chunk))


def _spans(counts: Tensor) -> list[tuple[int, int, int]]:
    """Cuts descending list lengths into spans ``(longest, shortest, number)`` of similar length; empty lists go."""
    spans: list[tuple[int, int, int]] = []
    for width, number in torch.stack(torch.unique_consecutive(counts, return_counts=True), 1).tolist():
        if width == 0:
            break
        if spans and width >= MIN_FILL * spans[-1][0]:
            spans[-1] = (spans[-1][0], width, spans[-1][2] + number)
        else:
            spans.append((width, width, number))
    return spans
