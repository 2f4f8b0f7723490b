"""The lists of a call seen from the keys: which queries visit each key block, for the backward pass over keys.

One list a key block of a KV head, over all query heads of its group, in one array without padding. It is built on the
device by counting, without atomics, without a sort and without waiting for the host: lists become a map of bytes, whose
columns are summed and then numbered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.block_sparse_attention.triton_rows import row_place
from seerattn.selection.block_indices import BlockIndices

# An entry is the mask head within its KV group and the row of the query block, in one number.
ROW_BITS = 20
# Lists longer than this many times the mean start first, whatever their KV head: every query visits the first key
# block, say, and whichever program takes that list last would work alone.
LONG = 4


@dataclass(frozen=True)
class KeyLists:
    """The queries of every key block.

    A *list* belongs to ``(row, KV head, key block)``, the last one varying fastest.

    Attributes:
        entries: int32, all lists one after the other. First those blocks whose queries must be masked: the diagonal
            crosses the block, or the call begins or ends inside it. Within both parts by head, then by row.
        starts: int64 ``[rows * HKV * Nk]``, where a list begins in ``entries``.
        counts: int32, the length of a list.
        masked: int32, how many entries of a list must be masked.
        order: int32, the lists in the order in which programs take them.
        num_k_blocks: key blocks of the longest row, ``Nk``.
    """

    entries: Tensor
    starts: Tensor
    counts: Tensor
    masked: Tensor
    order: Tensor
    num_k_blocks: int


def key_lists(blocks: BlockIndices, kv_heads: int, table: Tensor | None) -> KeyLists:
    """Transposes lists; see `KeyLists`.

    Scratch is a byte for every pair of a query block and a key block, 134 MB for 128k tokens, 32 heads, 64 x 64.

    Args:
        blocks: int32 lists of ``H`` or ``HKV`` heads on the device of the call.
        kv_heads: ``HKV``.
        table: `triton_rows.row_table` of the call.
    """
    indices, device = blocks.indices.contiguous(), blocks.indices.device
    rows, mask_heads, num_q_blocks, width = indices.shape
    num_k_blocks = blocks.num_k_blocks
    listed = torch.zeros(rows * mask_heads * num_q_blocks, num_k_blocks, dtype=torch.uint8, device=device)
    _mark[(len(listed),)](listed, indices, blocks.counts.contiguous(), width, num_k_blocks, CHUNK=256, num_warps=2)
    of_group = listed.view(rows * kv_heads, -1, num_k_blocks)
    counts = of_group.sum(1, dtype=torch.int32).flatten()
    starts = counts.cumsum(0) - counts
    masked = torch.empty_like(counts)
    entries = torch.empty(indices.numel(), dtype=torch.int32, device=device)
    columns = 32
    _number[(rows * kv_heads * triton.cdiv(num_k_blocks, columns),)](
        listed,
        starts,
        entries,
        masked,
        table,
        int(blocks.q_start[0]),
        int(blocks.q_len[0]),
        kv_heads,
        num_q_blocks,
        num_k_blocks,
        SHARES=mask_heads // kv_heads,
        BLOCK_Q=blocks.block_q,
        BLOCK_K=blocks.block_k,
        ROW_BITS=ROW_BITS,
        ROWS=64,
        COLUMNS=columns,
        num_warps=4,
    )
    order = (counts <= LONG * counts.float().mean()).to(torch.uint8).argsort(stable=True).to(torch.int32)
    return KeyLists(entries, starts, counts, masked, order, num_k_blocks)


@triton.jit
def _mark(listed_ptr, indices_ptr, counts_ptr, width, num_k_blocks, CHUNK: tl.constexpr):
    """Writes a one for every entry of a list."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        block = tl.load(indices_ptr + row * width + i, mask=i < count, other=0)
        tl.store(listed_ptr + row * num_k_blocks + block, 1, mask=i < count)


@triton.jit
def _number(
    listed_ptr,
    starts_ptr,
    entries_ptr,
    masked_ptr,
    table_ptr,
    whole_start,
    whole_len,
    kv_heads,
    num_q_blocks,
    num_k_blocks,
    SHARES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the lists of some neighbouring key blocks: what must be masked on a first walk, the rest on a second."""
    tiles = tl.cdiv(num_k_blocks, COLUMNS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    _, _, _, q_start, q_len = row_place(table_ptr, group // kv_heads, whole_start, whole_len)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_k_blocks
    key_list = group * num_k_blocks + column
    last_key = column * BLOCK_K + BLOCK_K - 1
    start = tl.load(starts_ptr + key_list, mask=inside, other=0)
    total = tl.zeros([COLUMNS], tl.int32)
    for full in tl.static_range(2):
        for share in range(SHARES):
            map_ptr = listed_ptr + (group * SHARES + share).to(tl.int64) * num_q_blocks * num_k_blocks
            for first in range(0, num_q_blocks, ROWS):
                row = first + tl.arange(0, ROWS)
                place = map_ptr + row.to(tl.int64)[:, None] * num_k_blocks + column[None, :]
                kept = tl.load(place, mask=(row < num_q_blocks)[:, None] & inside[None, :], other=0) != 0
                query = (q_start // BLOCK_Q + row) * BLOCK_Q
                cut = (query < q_start) | (query + BLOCK_Q > q_start + q_len)
                crossed = cut[:, None] | (query[:, None] < last_key[None, :])
                chosen = kept & (crossed != (full == 1))
                number = total[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
                entry = (share << ROW_BITS) + row
                tl.store(entries_ptr + start[None, :] + number, entry[:, None], mask=chosen)
                total += tl.sum(chosen.to(tl.int32), 0)
        if full == 0:
            tl.store(masked_ptr + key_list, total, mask=inside)
