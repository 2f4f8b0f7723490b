"""The forward pass over index lists as one Triton kernel, whose keys lie in one piece or in pages.

A program takes some query rows that share a list - a query block of one head, or of all heads of a KV group - and
walks the list: scores, online softmax, weighted values. Keys and values arrive through tensor descriptors (TMA on
Hopper), or through pointers where pages are smaller than a step. Only blocks that the diagonal crosses are masked.
Where blocks may be skipped a program has the rows of one query block of one head, and a step is a key block: what a
program skips is then what the op defines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seerattn.ops.block_sparse_attention.triton_rows import LOG2_E, add_sink, capped, query_tile, row_offset
from seerattn.ops.checks import scale_refusal
from seerattn.ops.launch import power_of_2, tma_fits
from seerattn.ops.triton_keys import key_page, key_tile
from seerattn.selection.block_indices import BlockIndices

BLOCK_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
        rows: query rows of a program, over all heads that share its list.
        keys: keys of one step, a divisor of the key block.
        num_warps: warps of a program.
        num_stages: depth of the pipeline of key and value blocks.
        max_registers: per thread, so that more programs fit on a multiprocessor; None leaves it to the compiler.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def choose_launch(*, block_q: int, block_k: int, members: int, head_dim: int, element_size: int, tokens: int) -> Launch:
    """Picks a launch from the shapes of a call; ``members`` heads share a list, ``tokens`` are those of the keys."""
    width = power_of_2(head_dim)
    if element_size == 2 and width <= 128:
        # One H100, bf16, D 128, density .1, ms at 128k / 32k by (rows, keys, warps, stages, registers):
        #   64 x 64 a head:   (64, 64, 4, 1, 128) 32.0 / 2.36    (64, 64, 4, 1, -) 34.1 / 2.17
        #   64 x 64 a group:  (128, 64, 8, 2, 128) 27.1 / 1.84   (128, 64, 8, 2, -) 33.7 / 2.29
        #   128 x 128 a head: (128, 64, 8, 2, 128) 29.6 / 1.99   (128, 128, 8, 2, -) 31.1 / 2.12
        # Fewer registers let more programs share a multiprocessor and so cover each other's softmax.
        if block_q * members >= 128:
            return Launch(rows=128, keys=min(block_k, 64), num_warps=8, num_stages=2, max_registers=128)
        fewer = 128 if tokens > 1 << 16 else None
        return Launch(
            rows=min(block_q * members, 64), keys=min(block_k, 64), num_warps=4, num_stages=1, max_registers=fewer
        )
    keys = min(block_k, 64 if width * element_size <= 512 else 32)
    return Launch(rows=min(block_q * members, 64), keys=keys, num_warps=4, num_stages=2)


def choose_skipping_launch(*, block_q: int, block_k: int, head_dim: int, element_size: int) -> Launch | None:
    """Picks a launch whose programs see a whole query block, and a whole key block at every step; None without room."""
    width = power_of_2(head_dim)
    if element_size == 2 and width <= 128:
        # Those of lists for every head without skipping, as far as the blocks allow; others were not tried. H200, 32/8
        # heads of 128, 32k tokens, full lists, 64 x 64: 16.2 ms without, 21.1 looking alone; 128 x 128: 16.1 and 24.8.
        if block_q == 128:
            return Launch(rows=128, keys=block_k, num_warps=8, num_stages=2 if block_k <= 64 else 1)
        return Launch(rows=block_q, keys=block_k, num_warps=4, num_stages=1)
    if block_q > 64 or block_k > (64 if width * element_size <= 512 else 32):
        return None
    return Launch(rows=block_q, keys=block_k, num_warps=4, num_stages=2)


def list_refusal(q: Tensor, blocks: BlockIndices, scale: float, softcap: float | None) -> str | None:
    """Why the kernel cannot serve queries ``[.., D]`` with these lists, in a sentence; None if it can."""
    if q.dtype not in DTYPES:
        return f"it takes fp16, bf16 or fp32, got {q.dtype}"
    if q.shape[-1] * q.element_size() % 16:
        return f"it takes head dims of whole 16 bytes, got {q.shape[-1]} x {q.element_size()} bytes"
    if blocks.block_q not in BLOCK_SIZES or blocks.block_k not in BLOCK_SIZES:
        return f"it takes blocks of {BLOCK_SIZES} tokens, got {blocks.block_q} x {blocks.block_k}"
    if blocks.skip_threshold is not None and skipping_launch(q, blocks) is None:
        return (
            f"it skips smaller blocks of heads of {q.shape[-1]} channels in {q.dtype}, got {blocks.block_q} x "
            f"{blocks.block_k}"
        )
    return scale_refusal(scale, softcap)


def skipping_launch(q: Tensor, blocks: BlockIndices) -> Launch | None:
    """`choose_skipping_launch` for queries ``[.., D]`` and lists."""
    return choose_skipping_launch(
        block_q=blocks.block_q, block_k=blocks.block_k, head_dim=q.shape[-1], element_size=q.element_size()
    )


@dataclass(frozen=True)
class Pages:
    """Where the keys of rows lie, if not in one piece.

    Attributes:
        table: int32 ``[rows, P]``, contiguous, the pages of every row.
        k_lens: int32 ``[rows]``, contiguous, the keys of every row.
        size: tokens of a page.
    """

    table: Tensor
    k_lens: Tensor
    size: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    blocks: BlockIndices,
    *,
    table: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    cut: bool,
    counts: Tensor | None = None,
    launch: Launch | None = None,
    pages: Pages | None = None,
) -> None:
    """Launches the kernel.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, HKV, S, D]``, of strides that TMA reads; with ``pages`` ``[pages, HKV, size, D]``, adjacent channels.
        v: as ``k``.
        out: as ``q``, written where a row has a query.
        lse: fp32 ``[B, H, T]`` or None, written likewise.
        blocks: the lists, a batch element a row.
        table: `triton_rows.row_table`; with ``pages`` int32 ``[rows + 1]``, where queries of rows begin in a batch of
            one. None if all rows are whole.
        scale: factor of q.k.
        softcap: see the op.
        sinks: ``[H]`` or None.
        cut: whether keys of others may follow those of a row, which then are not read.
        counts: int32 ``[rows, H, Nq]`` or None, gets the blocks that were not skipped.
        launch: by default the fastest known.
        pages: where the keys of the rows lie.
    """
    heads, q_tokens, dim = q.shape[1:]
    kv_heads = k.shape[1]
    k_tokens = k.shape[2] if pages is None else pages.table.shape[1] * pages.size
    group = heads // kv_heads
    skips = blocks.skip_threshold is not None
    # Heads that share a list become rows of one program; tensor cores want a power of two of them. What one of them may
    # skip another may need.
    members = group if blocks.num_heads == kv_heads and group & (group - 1) == 0 and not skips else 1
    if skips:
        launch = launch or skipping_launch(q, blocks)
    launch = launch or choose_launch(
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        members=members,
        head_dim=dim,
        element_size=q.element_size(),
        tokens=k_tokens,
    )
    tile_q = min(blocks.block_q, max(1, launch.rows // members))

    q = q if q.stride(3) == 1 else q.contiguous()
    block_dim = power_of_2(dim)
    tile = [1, 1, launch.keys, block_dim]
    # A cache is never copied: what TMA does not read is read by pointers.
    tiled = pages is None or (pages.size % launch.keys == 0 and tma_fits(k) and tma_fits(v))
    num_q_blocks = blocks.num_q_blocks
    grid = (len(blocks.indices) * kv_heads * num_q_blocks * (group // members) * (blocks.block_q // tile_q),)
    _forward[grid](
        q,
        TensorDescriptor.from_tensor(k, tile) if tiled else k,
        TensorDescriptor.from_tensor(v, tile) if tiled else v,
        out,
        lse,
        sinks,
        blocks.indices.contiguous(),
        blocks.counts.contiguous(),
        table,
        k_tokens - q_tokens,
        q_tokens,
        q.stride()[:3],
        out.stride()[:3],
        heads,
        kv_heads,
        num_q_blocks,
        blocks.indices.shape[3],
        (scale if softcap is None else softcap) * LOG2_E,
        0.0 if softcap is None else scale / softcap,
        # In the kernel's units; a threshold of fp64 may be none of fp32.
        math.log2(blocks.skip_threshold) if skips else None,
        counts,
        None if pages is None else pages.k_lens,
        None if pages is None else pages.table,
        None if pages is None else pages.table.shape[1],
        None if tiled else k.stride()[:3],
        None if tiled else v.stride()[:3],
        GROUP=group,
        MEMBERS=members,
        MASK_GROUP=heads // blocks.num_heads,
        BLOCK_Q=blocks.block_q,
        BLOCK_K=blocks.block_k,
        TILE_Q=tile_q,
        TILE_K=launch.keys,
        D=dim,
        BLOCK_D=block_dim,
        PAGE=0 if pages is None else pages.size,
        CUT=cut,
        CAPPED=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )


@triton.jit
def _walk(
    acc,
    top,
    total,
    q,
    position,
    k_tiles,
    v_tiles,
    k_strides,
    v_strides,
    pages_ptr,
    batch,
    kv_head,
    k_slot,
    k_end,
    entries,
    begin,
    end,
    scale,
    inner_scale,
    skip_level,
    sink,
    forced,
    kept,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    CUT: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the steps ``begin .. end`` of a list; maxima are in units of log2(e).

    With a ``skip_level`` a step that lies below all maxima so far by more than that ends at its scores, but for the
    first one and those from ``forced`` on; the others are counted in ``kept``.
    """
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    for i in range(begin, end):
        first_key = tl.load(entries + i // STEPS) * BLOCK_K + i % STEPS * TILE_K
        place = key_page(pages_ptr, batch, k_slot, first_key, k_end, PAGE, TILE_K)
        k = key_tile(
            k_tiles, k_strides, place, kv_head, k_slot, first_key, k_end, PAGE, TILE_K, D, BLOCK_D, MASKED and CUT
        )
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        factor = scale
        if CAPPED:
            scores = scale * capped(scores, inner_scale)
            factor = 1.0
        if MASKED:
            key = first_key + tl.arange(0, TILE_K)
            scores = tl.where(key[None, :] <= position[:, None], scores, -float("inf"))
        largest = tl.max(scores, 1) * factor
        new_top = tl.maximum(top, largest)
        needed = True
        if skip_level is not None and not MASKED:
            met = new_top
            if sink is not None:
                met = tl.maximum(new_top, sink)
            needed = (tl.max(largest - met, 0) >= skip_level) | (i == 0) | (i >= forced)
        # No row has a new maximum in a block that is skipped, so all that it knows stays as it is.
        if needed:
            p = tl.exp2(scores * factor - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            v = key_tile(
                v_tiles, v_strides, place, kv_head, k_slot, first_key, k_end, PAGE, TILE_K, D, BLOCK_D, MASKED and CUT
            )
            if MASKED and CUT and v_strides is None:
                # What follows this sequence belongs to another one, and 0 x NaN would let it leak.
                own_key = first_key + tl.arange(0, TILE_K)
                v = tl.where((own_key < k_end)[:, None], v, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            top = new_top
            kept += 1
    return acc, top, total, kept


# Numbers that change from call to call, which would compile anew where 16 divides them.
@triton.jit(do_not_specialize=["whole_start", "whole_len", "num_q_blocks", "list_width", "num_pages"])
def _forward(
    q_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    indices_ptr,
    counts_ptr,
    table_ptr,
    whole_start,
    whole_len,
    q_strides,
    out_strides,
    heads,
    kv_heads,
    num_q_blocks,
    list_width,
    scale,
    inner_scale,
    skip_level,
    kept_ptr,
    k_lens_ptr,
    pages_ptr,
    num_pages,
    k_strides,
    v_strides,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    MASK_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CUT: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = TILE_Q * MEMBERS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    some, batch, kv_head, head, token, position, real, k_slot, q_end, entries, full, steps = query_tile(
        indices_ptr,
        counts_ptr,
        table_ptr,
        whole_start,
        whole_len,
        heads,
        kv_heads,
        num_q_blocks,
        list_width,
        GROUP,
        MEMBERS,
        MASK_GROUP,
        BLOCK_Q,
        BLOCK_K,
        TILE_Q,
        TILE_K,
        k_lens_ptr,
        num_pages,
    )
    if not some:
        return
    d = tl.arange(0, BLOCK_D)
    q_offset = row_offset(batch, head, token, q_strides)
    q = tl.load(q_ptr + q_offset[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sink = None
    if sinks_ptr is not None and skip_level is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
    # Blocks that hold one of the queries are never skipped: those that need a mask, and one that ends with the first.
    forced = steps - (tl.max(position, 0) // TILE_K - tl.min(position, 0) // TILE_K + 1)
    kept = 0
    for masked in tl.static_range(2):
        acc, top, total, kept = _walk(
            acc,
            top,
            total,
            q,
            position,
            k_tiles,
            v_tiles,
            k_strides,
            v_strides,
            pages_ptr,
            batch,
            kv_head,
            k_slot,
            q_end,
            entries,
            full if masked else 0,
            steps if masked else full,
            scale,
            inner_scale,
            skip_level,
            sink,
            forced,
            kept,
            BLOCK_K=BLOCK_K,
            TILE_K=TILE_K,
            D=D,
            BLOCK_D=BLOCK_D,
            PAGE=PAGE,
            MASKED=masked == 1,
            CUT=CUT,
            CAPPED=CAPPED,
            PRECISION=PRECISION,
        )

    if sinks_ptr is not None:
        acc, top, total = add_sink(acc, top, total, tl.load(sinks_ptr + head))
    out_offset = row_offset(batch, head, token, out_strides)
    out = (acc / total[:, None]).to(DTYPE)
    tl.store(out_ptr + out_offset[:, None] + d[None, :], out, mask=real[:, None] & (d[None, :] < D))
    if lse_ptr is not None:
        lse_offset = (batch * heads + head).to(tl.int64) * (whole_len) + token
        tl.store(lse_ptr + lse_offset, (top + tl.log2(total)) * 0.6931471805599453, mask=real)
    if kept_ptr is not None:
        # A program is one query block of one head; see `query_tile` for their order.
        pid = tl.program_id(0)
        group_row = pid // (GROUP * num_q_blocks)
        list_row = (group_row * GROUP + pid % GROUP) * num_q_blocks + num_q_blocks - 1 - pid // GROUP % num_q_blocks
        tl.store(kept_ptr + list_row, kept)
