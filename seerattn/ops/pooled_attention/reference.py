"""`impl="reference"`: dense causal attention with its block maps, in plain torch on any device.

Query blocks are walked in chunks, each against the keys up to its causal edge, so scratch is bounded by a budget and
never holds a ``T x S`` map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seerattn.ops.grid import from_grid, to_grid
from seerattn.ops.pooled_attention.maps import AttentionMaps
from seerattn.selection.block_indices import num_query_blocks

# Scores held at once, in elements; one query block of one KV group at least. CPU time at T = 4096, H 8, D 64: 0.28 s
# with 2^18 to 2^20, 0.41 s with 2^22, 0.68 s with 2^24 (fresh pages for every chunk).
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


@torch.no_grad()
def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    lengths: list[int],
    segment_ids: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    target: bool,
    mass: bool,
    rows: list[int] | None = None,
) -> AttentionMaps:
    """See `api`, which validates the arguments. ``lengths`` holds the keys of every row; no ``v``, no output.

    ``rows`` are the query blocks whose maps are wanted, of whole sequences (``T == S``) and without an output.
    """
    batch, heads, q_tokens, dim = q.shape
    kv_heads = k.shape[1]
    pairs, group = batch * kv_heads, heads // kv_heads
    device, work = q.device, torch.promote_types(q.dtype, torch.float32)

    q_len = [min(q_tokens, n) for n in lengths]
    q_start = [n - t for n, t in zip(lengths, q_len)]
    offset = [s % block_q for s in q_start]
    num_q_blocks = max(num_query_blocks(s, t, block_q) for s, t in zip(q_start, q_len))
    num_k_blocks = -(-max(lengths) // block_k)
    blocks = range(num_q_blocks) if rows is None else rows
    slots, zeros = num_q_blocks * block_q, [0] * batch

    def keys_on_grid(x: Tensor) -> Tensor:
        return to_grid(x, offset=zeros, length=lengths, size=num_k_blocks * block_k).flatten(0, 1)

    # A pair is one KV head of one row with its group of query heads.
    queries = to_grid(q, offset=offset, length=q_len, size=slots).reshape(pairs, group, slots, dim)
    keys = keys_on_grid(k).to(work).transpose(1, 2)
    values = None if v is None else keys_on_grid(v).to(work)
    sinks = None if sinks is None else sinks.to(work).view(kv_heads, group, 1).repeat(batch, 1, 1)

    first, start, count = (torch.tensor(x, device=device)[:, None] for x in (offset, q_start, q_len))
    slot = torch.arange(slots, device=device)
    if rows is not None:
        slot = slot.view(-1, block_q)[torch.tensor(rows, device=device)].flatten()
        queries = queries[:, :, slot]
    q_pos = start - first + slot
    real = ((slot >= first) & (slot < first + count)).repeat_interleave(kv_heads, 0)
    k_segment = q_segment = None
    if segment_ids is not None:
        k_segment = keys_on_grid(segment_ids[:, None, :, None])[..., 0]
        q_segment = k_segment.gather(1, q_pos.clamp(max=k_segment.shape[1] - 1)).repeat_interleave(kv_heads, 0)
        k_segment = k_segment.repeat_interleave(kv_heads, 0)
    q_pos = q_pos.repeat_interleave(kv_heads, 0)
    k_pos = torch.arange(num_k_blocks * block_k, device=device)

    out = None if values is None else q.new_empty(pairs, group, slots, dim)
    shape = (pairs, group, len(blocks), num_k_blocks)
    target_map = torch.zeros(shape, dtype=work, device=device) if target else None
    mass_map = torch.zeros(shape, dtype=work, device=device) if mass else None

    base = [s - o for s, o in zip(q_start, offset)]
    budget = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    at_once = max(1, min(pairs, budget // (group * block_q * num_k_blocks * block_k)))
    for pair in (slice(p, p + at_once) for p in range(0, pairs, at_once)):
        for part, edge in _chunks(blocks, num_k_blocks, max(base), block_q, block_k, budget // (at_once * group)):
            chunk = slice(part.start * block_q, part.stop * block_q)
            begin, end = blocks[part.start] * block_q, (blocks[part.stop - 1] + 1) * block_q
            width = edge * block_k
            some = queries[pair, :, chunk].to(work).flatten(1, 2)
            scores = (some * (scale if softcap is None else scale / softcap)) @ keys[pair, :, :width]
            if softcap is not None:
                scores.tanh_().mul_(softcap)
            scores = scores.view(-1, group, chunk.stop - chunk.start, width)
            # Keys before the first query of the chunk are visible to all of it.
            seen = min(base) + begin
            hidden = k_pos[seen:width] > q_pos[pair, chunk, None]
            scores[..., seen:].masked_fill_(hidden[:, None], -torch.inf)
            if segment_ids is not None:
                other = q_segment[pair, chunk, None] != k_segment[pair, None, :width]
                scores.masked_fill_(other[:, None], -torch.inf)
            p = torch.softmax(scores, -1)
            if sinks is not None:
                p *= torch.sigmoid(torch.logsumexp(scores, -1) - sinks[pair])[..., None]
            if not all(o <= begin and end <= o + n for o, n in zip(offset, q_len)):
                # Slots without a query count for nothing.
                p.masked_fill_(~real[pair, None, chunk, None], 0)
            if out is not None:
                out[pair, :, chunk] = (p.flatten(1, 2) @ values[pair, :width]).view(p.shape[0], group, -1, dim)
            tiles = p.unflatten(2, (-1, block_q))
            if target:
                target_map[pair, :, part, :edge] = tiles.amax(3).unflatten(-1, (-1, block_k)).amax(-1)
            if mass:
                mass_map[pair, :, part, :edge] = tiles.sum(3).unflatten(-1, (-1, block_k)).sum(-1)

    if out is not None:
        out = from_grid(out.view(batch, heads, slots, dim), offset=offset, length=q_len, size=q_tokens)
    return AttentionMaps(out, _distributions(target_map, batch), _distributions(mass_map, batch))


def _distributions(x: Tensor | None, batch: int) -> Tensor | None:
    """Divides every row by its sum, rows of zeros apart, as fp32 ``[B, H, Nq, Nk]``."""
    if x is None:
        return None
    total = x.sum(-1, keepdim=True)
    return (x / torch.where(total > 0, total, 1)).float().view(batch, -1, *x.shape[2:])


def _chunks(
    blocks: Sequence[int], num_k_blocks: int, start: int, block_q: int, block_k: int, budget: int
) -> Iterator[tuple[slice, int]]:
    """Runs of query blocks with the number of key blocks up to their causal edge, each within ``budget`` scores."""

    def edge(stop: int) -> int:
        return min((start + (blocks[stop - 1] + 1) * block_q - 1) // block_k + 1, num_k_blocks)

    begin = 0
    while begin < len(blocks):
        stop = begin + 1
        while stop < len(blocks) and (stop + 1 - begin) * block_q * edge(stop + 1) * block_k <= budget:
            stop += 1
        yield slice(begin, stop), edge(stop)
        begin = stop
