"""`impl="reference"`: block maps of dense causal attention, and its output, in plain torch on any device.

Query blocks are walked in chunks, each against the keys up to its causal edge, so scratch is bounded by a budget and
never holds a ``T x S`` map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seerattn.ops.attention_map.maps import AttentionMaps
from seerattn.ops.grid import from_grid, to_grid
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.map_form import MASS, PUBLISHED, MapForm

# Scores held at once, in elements; one query block of one KV group at least. CPU time at T = 4096, H 8, D 64: 0.28 s
# with 2^18 to 2^20, 0.41 s with 2^22, 0.68 s with 2^24 (fresh pages for every chunk).
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


@torch.no_grad()
def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    forms: tuple[MapForm, ...],
    query_blocks: list[int] | None,
    block_q: int,
    block_k: int,
    scale: float,
    lengths: list[int],
    segment_ids: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionMaps:
    """See `api`, which validates the arguments. ``lengths`` holds the keys of every row; no ``v``, no output.

    ``query_blocks`` are the rows of the maps that are wanted, of whole sequences (``T == S``) and without an output.
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
    blocks = range(num_q_blocks) if query_blocks is None else query_blocks
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
    if query_blocks is not None:
        slot = slot.view(-1, block_q)[torch.tensor(query_blocks, device=device)].flatten()
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
    maps = [torch.zeros(shape, dtype=work, device=device) for _ in forms]

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
            for x, form in zip(maps, forms):
                x[pair, :, part, :edge] = _reduced(tiles, form, block_k)

    if out is not None:
        out = from_grid(out.view(batch, heads, slots, dim), offset=offset, length=q_len, size=q_tokens)
    return AttentionMaps(out, tuple(_distributions(x, batch) for x in maps))


def _reduced(tiles: Tensor, form: MapForm, block_k: int) -> Tensor:
    """Tiles ``[.., block_q, keys]`` as one number a key block, up to a factor that all of a row share."""
    # These two may take rows first, along whole lines of memory: a fifth of the time on a CPU.
    if form == PUBLISHED:
        return tiles.amax(-2).unflatten(-1, (-1, block_k)).amax(-1)
    if form == MASS:
        return tiles.sum(-2).unflatten(-1, (-1, block_k)).sum(-1)
    shares = tiles.unflatten(-1, (-1, block_k))
    shares = shares.amax(-1) if form.keys == "max" else shares.sum(-1)
    if form.power == 1:
        return shares.sum(-2)
    largest = shares.amax(-2)
    if form.power == math.inf:
        return largest
    # Relative to the largest row, whose power may be too small a number.
    relative = shares / torch.where(largest > 0, largest, 1)[..., None, :]
    return largest * relative.pow(form.power).sum(-2).pow(1 / form.power)


def _distributions(x: Tensor, batch: int) -> Tensor:
    """Divides every row by its sum, rows of zeros apart, as fp32 ``[B, H, Nq, Nk]``."""
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
