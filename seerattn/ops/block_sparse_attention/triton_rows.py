"""What the Triton kernels of block-sparse attention share: which queries and which list a program has, and logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.launch import on_device, row_geometry

LOG2_E = 1.4426950408889634


def row_table(
    q_tokens: int, k_tokens: int, lengths: list[int], cu_seqlens: list[int] | None, device: torch.device
) -> Tensor | None:
    """int32 ``[rows, 5]``: batch index, and `row_geometry`; packed rows begin where their sequences do.

    None if all rows are whole: then there is no tensor, and no copy to the device.
    """
    if cu_seqlens is not None:
        table = [(0, begin, begin, 0, n) for begin, n in zip(cu_seqlens, lengths)]
    elif all(n == k_tokens for n in lengths):
        return None
    else:
        table = [(b, *row) for b, row in enumerate(row_geometry(q_tokens, k_tokens, lengths))]
    return on_device(tuple(table), torch.int32, device)


@triton.jit
def row_place(table_ptr, row, whole_start, whole_len, k_lens_ptr=None, num_pages=None):
    """Batch index, first query slot, first key slot, position of the first query and number of queries of a row.

    With `k_lens_ptr` rows are packed and have `num_pages` pages each: the table says where queries begin, and the key
    slot is the row's first entry of the table of pages.
    """
    batch, q_slot, k_slot, q_start, q_len = row, 0, 0, whole_start, whole_len
    if k_lens_ptr is not None:
        batch = row * 0
        q_slot = tl.load(table_ptr + row)
        k_slot = row * num_pages
        q_len = tl.load(table_ptr + row + 1) - q_slot
        q_start = tl.load(k_lens_ptr + row) - q_len
    elif table_ptr is not None:
        batch = tl.load(table_ptr + row * 5)
        q_slot = tl.load(table_ptr + row * 5 + 1)
        k_slot = tl.load(table_ptr + row * 5 + 2)
        q_start = tl.load(table_ptr + row * 5 + 3)
        q_len = tl.load(table_ptr + row * 5 + 4)
    return batch, q_slot, k_slot, q_start, q_len


@triton.jit
def query_tile(
    indices_ptr,
    counts_ptr,
    table_ptr,
    whole_start,
    whole_len,
    heads,
    kv_heads,
    num_q_blocks,
    list_width,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    MASK_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    k_lens_ptr=None,
    num_pages=None,
):
    """The query rows of a program, `TILE_Q` tokens of `MEMBERS` heads, and the steps of `TILE_K` keys that they take.

    Returns:
        Whether there is a query; batch index and KV head; head, token, position of every row and whether it is real;
        first key slot and end of the keys; the list, its steps that need no mask, and all its steps.
    """
    PIECES: tl.constexpr = BLOCK_Q // TILE_Q
    # Programs of one KV head follow each other, so its keys stay in L2; long lists (late rows) go first.
    pid = tl.program_id(0)
    piece = PIECES - 1 - pid % PIECES
    pid = pid // PIECES
    first_head = pid % (GROUP // MEMBERS) * MEMBERS
    pid = pid // (GROUP // MEMBERS)
    block = num_q_blocks - 1 - pid % num_q_blocks
    pid = pid // num_q_blocks
    kv_head = pid % kv_heads
    row = pid // kv_heads
    first_head += kv_head * GROUP
    batch, q_slot, k_slot, q_start, q_len = row_place(table_ptr, row, whole_start, whole_len, k_lens_ptr, num_pages)

    # Positions of this tile and of its query block; slots without a query act as their nearest real neighbour.
    q_end = q_start + q_len
    block_first = (q_start // BLOCK_Q + block) * BLOCK_Q
    tile_first = block_first + piece * TILE_Q
    first = tl.maximum(tile_first, q_start)
    last = tl.minimum(tile_first + TILE_Q, q_end) - 1
    r = tl.arange(0, TILE_Q * MEMBERS)
    position = tile_first + r % TILE_Q
    head = first_head + r // TILE_Q
    real = (position >= q_start) & (position < q_end)
    position = tl.minimum(tl.maximum(position, first), last)
    token = q_slot + position - q_start

    # The list ends with the blocks of the query block's own positions. Steps after this tile are left out, those that
    # hold a key after the tile's first query are masked.
    list_row = (row * (heads // MASK_GROUP) + first_head // MASK_GROUP) * num_q_blocks + block
    entries = indices_ptr + list_row.to(tl.int64) * list_width
    listed_end = ((tl.minimum(block_first + BLOCK_Q, q_end) - 1) // BLOCK_K + 1) * (BLOCK_K // TILE_K)
    steps = tl.load(counts_ptr + list_row) * (BLOCK_K // TILE_K) - (listed_end - 1 - last // TILE_K)
    full = steps - (last // TILE_K - (first + 1) // TILE_K + 1)
    return first <= last, batch, kv_head, head, token, position, real, k_slot, q_end, entries, full, steps


@triton.jit
def capped(scores, inner_scale):
    """``tanh(scores * inner_scale)`` as 1 - 2 / (exp(2 x) + 1), exact at both ends."""
    return 1.0 - 2.0 / (tl.exp2(scores * (inner_scale * 2.8853900817779268)) + 1.0)


@triton.jit
def add_sink(acc, top, total, sink):
    """An online softmax with one more key, whose logit is `sink` and which has no value; maxima in units of log2(e)."""
    sink = sink.to(tl.float32) * 1.4426950408889634
    new_top = tl.maximum(top, sink)
    shrink = tl.exp2(top - new_top)
    return acc * shrink[:, None], new_top, total * shrink + tl.exp2(sink - new_top)


@triton.jit
def row_offset(batch, head, token, strides):
    """Where rows of a tensor begin that has these strides ``(b, h, t)``; int64, as tensors may exceed 2^31 elements."""
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return offset + token.to(tl.int64) * strides[2]
