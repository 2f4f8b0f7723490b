"""The backward pass of block-sparse attention as two Triton kernels, for the outputs of `gluon` and of `triton`.

Probabilities are computed again from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3.1.2); formulas are
in the README beside this file. Neither kernel uses atomics: two runs are bitwise equal.

- *Queries*: a program takes query rows that share a list, as in the forward pass, and walks it for dq. It also leaves
  what the other kernel needs of every row: the log-sum-exp in powers of 2, and delta = sum(dout * out) - dlse.
- *Keys*: a program takes a key tile of a KV head, walks the queries of all heads that visit it (`KeyLists`) and sums dk
  and dv in registers. Scores are computed transposed, keys as rows, so that they are the left operand of both sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seerattn.ops.block_sparse_attention.triton_lists import ROW_BITS, KeyLists, key_lists
from seerattn.ops.block_sparse_attention.triton_rows import (
    LOG2_E,
    capped,
    query_tile,
    row_offset,
    row_place,
    row_table,
)
from seerattn.ops.launch import new_output, power_of_2, tma_ready
from seerattn.selection.block_indices import BlockIndices


@dataclass(frozen=True)
class Launch:
    """How one of the two kernels is launched.

    Attributes:
        queries: query rows of a program over all heads that share its list, or of one step of the kernel for keys.
        keys: keys of a program of the kernel for keys, or of one step of the other; a divisor of the key block.
        num_warps: warps of a program.
        num_stages: depth of the pipeline of the tiles that are walked.
        max_registers: per thread, so that more programs fit on a multiprocessor; None leaves it to the compiler.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def choose_query_launch(*, block_q: int, block_k: int, members: int, head_dim: int, element_size: int) -> Launch:
    """Picks the launch for dq; ``members`` heads share a list."""
    rows = block_q * members
    if element_size == 4:
        # fp32 products run outside of tensor cores; larger tiles spill, and compile for up to 45 s.
        return Launch(queries=min(rows, 32), keys=32, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Launch(queries=min(rows, 64), keys=32, num_warps=8, num_stages=2)
    # One H100, bf16, 32/8 heads of 128, 32k tokens, ms at sparsity .9 / .5 by (queries, keys, warps, stages):
    #   64 x 64 a head:   (64, 64, 4, 2) 2.44 / 10.8    (64, 64, 4, 1) 2.92 / 13.1    (64, 64, 4, 3) 3.54 / 16.3
    #   64 x 64 a group:  (64, 64, 4, 2) 2.42 / 10.8    (128, 64, 8, 2) 2.63 / 11.9   (128, 64, 8, 1) 3.43 / 15.1
    #   128 x 128 a head: (128, 128, 8, 2) 2.47 / 10.7  (64, 64, 4, 2) 2.42 / 13.5    (128, 64, 8, 2) 2.64 / 11.6
    if min(block_q, block_k) >= 128 and members == 1:
        return Launch(queries=128, keys=128, num_warps=8, num_stages=2)
    return Launch(queries=min(rows, 64), keys=min(block_k, 64), num_warps=4, num_stages=2)


def choose_key_launch(*, block_q: int, block_k: int, head_dim: int, element_size: int) -> Launch:
    """Picks the launch for dk and dv."""
    if element_size == 4:
        return Launch(queries=32, keys=32, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Launch(queries=32, keys=min(block_k, 64), num_warps=8, num_stages=2)
    # The same H100 and shapes:
    #   64 x 64 a head:   (64, 64, 4, 2) 3.28 / 15.0   (64, 64, 4, 3) 4.23 / 19.8   (64, 64, 8, 2) 6.59 / 31.5
    #   128 x 128 a head: (64, 128, 8, 2) 3.46 / 16.0   (64, 64, 4, 2) 3.84 / 15.3   (64, 128, 8, 1) 4.95 / 21.6
    if min(block_q, block_k) >= 128:
        return Launch(queries=64, keys=128, num_warps=8, num_stages=2)
    return Launch(queries=min(block_q, 64), keys=min(block_k, 64), num_warps=4, num_stages=2)


@dataclass(frozen=True)
class Call:
    """The arguments of a forward call and what came of it.

    Attributes:
        q: ``[B, H, T, D]``, contiguous channels.
        k: ``[B, HKV, S, D]``.
        v: ``[B, HKV, S, D]``.
        out: ``[B, H, T, D]``, contiguous channels.
        lse: fp32 ``[B, H, T]``.
        blocks: lists of ``H`` or ``HKV`` heads.
        scale: factor of q.k.
        lengths: keys of every row.
        cu_seqlens: bounds of packed sequences, or None.
        softcap: of the scores, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    blocks: BlockIndices
    scale: float
    lengths: list[int]
    cu_seqlens: list[int] | None
    softcap: float | None

    @property
    def table(self) -> Tensor | None:
        """See `row_table`."""
        return row_table(self.q.shape[2], self.k.shape[2], self.lengths, self.cu_seqlens, self.q.device)

    def new_gradient(self, x: Tensor) -> Tensor:
        """Memory for the gradient of q or k, zero where the kernels leave padding out."""
        return new_output(x, padded=self.cu_seqlens is None and any(n < self.k.shape[2] for n in self.lengths))

    def factors(self) -> tuple[float, float, float]:
        """What dq and dk, logits and the argument of the cap are multiplied with."""
        logits = self.scale if self.softcap is None else self.softcap
        return self.scale, logits * LOG2_E, 0.0 if self.softcap is None else self.scale / self.softcap

    def options(self) -> dict[str, object]:
        """Constants of both kernels."""
        dim = self.q.shape[3]
        return {
            "GROUP": self.q.shape[1] // self.k.shape[1],
            "BLOCK_Q": self.blocks.block_q,
            "BLOCK_K": self.blocks.block_k,
            "D": dim,
            "BLOCK_D": power_of_2(dim),
            "CAPPED": self.softcap is not None,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
        }


@torch.no_grad()
def gradients(
    call: Call, dout: Tensor, dlse: Tensor | None, sinks: Tensor | None, *, needs_keys: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and sinks; those of k and v are None without ``needs_keys``.

    Args:
        call: the forward call.
        dout: gradient of its output.
        dlse: gradient of its log-sum-exp, or None.
        sinks: ``[H]``, or None.
        needs_keys: whether k or v needs its gradient.
    """
    dout = tma_ready(dout)
    dq, statistics = query_gradients(call, dout, dlse)
    dk, dv = key_gradients(call, dout, statistics) if needs_keys else (None, None)
    if sinks is None:
        return dq, dk, dv, None
    # A sink is one more key whose value is zero. At padding delta is 0 and the log-sum-exp -inf.
    sink = torch.exp(sinks.float()[:, None] - call.lse.masked_fill(call.lse == -torch.inf, torch.inf))
    return dq, dk, dv, -(sink * statistics[1]).sum((0, 2)).to(sinks.dtype)


def query_gradients(
    call: Call, dout: Tensor, dlse: Tensor | None, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """dq, and fp32 ``[2, B, H, T]``: the log-sum-exp in powers of 2, and delta; 0 at padding."""
    q, k, blocks = call.q, call.k, call.blocks
    batch, heads, q_tokens, dim = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # As in the forward pass: tensor cores want a power of two of heads.
    members = group if blocks.num_heads == kv_heads and group & (group - 1) == 0 else 1
    launch = launch or choose_query_launch(
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        members=members,
        head_dim=dim,
        element_size=q.element_size(),
    )
    dq = call.new_gradient(q)
    statistics = torch.zeros(2, batch, heads, q_tokens, dtype=torch.float32, device=q.device)
    if dq.numel() == 0:
        return dq, statistics
    tile_q = min(blocks.block_q, max(1, launch.queries // members))
    tile = [1, 1, launch.keys, power_of_2(dim)]
    rows = len(call.lengths) * kv_heads * blocks.num_q_blocks
    _query_gradients[(rows * (group // members) * (blocks.block_q // tile_q),)](
        q,
        dout,
        call.out,
        call.lse,
        None if dlse is None else dlse.contiguous(),
        TensorDescriptor.from_tensor(tma_ready(k), tile),
        TensorDescriptor.from_tensor(tma_ready(call.v), tile),
        dq,
        statistics[0],
        statistics[1],
        blocks.indices.contiguous(),
        blocks.counts.contiguous(),
        call.table,
        k_tokens - q_tokens,
        q_tokens,
        q.stride()[:3],
        dout.stride()[:3],
        call.out.stride()[:3],
        call.lse.stride(),
        dq.stride()[:3],
        statistics.stride()[1:],
        heads,
        kv_heads,
        blocks.num_q_blocks,
        blocks.indices.shape[3],
        *call.factors(),
        MEMBERS=members,
        MASK_GROUP=heads // blocks.num_heads,
        TILE_Q=tile_q,
        TILE_K=launch.keys,
        PACKED=call.cu_seqlens is not None,
        **call.options(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )
    return dq, statistics


def key_gradients(
    call: Call, dout: Tensor, statistics: Tensor, lists: KeyLists | None = None, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """dk and dv from what `query_gradients` left."""
    q, k, blocks = call.q, call.k, call.blocks
    kv_heads, k_tokens, dim = k.shape[1:]
    dk, dv = (call.new_gradient(x) for x in (k, call.v))
    if q.numel() == 0 or blocks.num_k_blocks == 0:
        return dk.zero_(), dv.zero_()
    lists = lists or key_lists(blocks, kv_heads, call.table)
    launch = launch or choose_key_launch(
        block_q=blocks.block_q, block_k=blocks.block_k, head_dim=dim, element_size=q.element_size()
    )
    width = power_of_2(dim)
    q_tile, k_tile = [1, 1, launch.queries, width], [1, 1, launch.keys, width]
    _key_gradients[(len(lists.order) * (blocks.block_k // launch.keys),)](
        TensorDescriptor.from_tensor(tma_ready(q), q_tile),
        TensorDescriptor.from_tensor(dout, q_tile),
        TensorDescriptor.from_tensor(tma_ready(k), k_tile),
        TensorDescriptor.from_tensor(tma_ready(call.v), k_tile),
        statistics[0],
        statistics[1],
        dk,
        dv,
        lists.entries,
        lists.starts,
        lists.counts,
        lists.masked,
        lists.order,
        call.table,
        k_tokens - q.shape[2],
        q.shape[2],
        statistics.stride()[1:],
        dk.stride()[:3],
        kv_heads,
        lists.num_k_blocks,
        *call.factors(),
        MEMBERS=q.shape[1] // blocks.num_heads,
        TILE_Q=launch.queries,
        TILE_K=launch.keys,
        ROW_BITS=ROW_BITS,
        **call.options(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )
    return dk, dv


# Lengths change from call to call; kernels are not compiled anew for those that 16 divides.
@triton.jit(
    do_not_specialize=["whole_start", "whole_len", "heads", "kv_heads", "num_q_blocks", "list_width"],
)
def _query_gradients(
    q_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    k_tiles,
    v_tiles,
    dq_ptr,
    lse2_ptr,
    delta_ptr,
    indices_ptr,
    counts_ptr,
    table_ptr,
    whole_start,
    whole_len,
    q_strides,
    dout_strides,
    out_strides,
    lse_strides,
    dq_strides,
    row_strides,
    heads,
    kv_heads,
    num_q_blocks,
    list_width,
    scale,
    logit_scale,
    inner_scale,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    MASK_GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    some, batch, kv_head, head, token, position, real, k_slot, k_end, entries, full, steps = query_tile(
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
    )
    if not some:
        return
    d = tl.arange(0, BLOCK_D)
    channel = d[None, :] < D
    q = tl.load(q_ptr + row_offset(batch, head, token, q_strides)[:, None] + d[None, :], mask=channel, other=0.0)
    at = row_offset(batch, head, token, dout_strides)
    dout = tl.load(dout_ptr + at[:, None] + d[None, :], mask=channel, other=0.0)
    at = row_offset(batch, head, token, out_strides)
    out = tl.load(out_ptr + at[:, None] + d[None, :], mask=channel, other=0.0)
    at = row_offset(batch, head, token, row_strides)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at)
    lse2 = tl.load(lse_ptr + row_offset(batch, head, token, lse_strides)) * 1.4426950408889634
    tl.store(delta_ptr + at, delta, mask=real)
    tl.store(lse2_ptr + at, lse2, mask=real)

    acc = tl.zeros([TILE_Q * MEMBERS, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        for i in range(full if masked else 0, steps if masked else full):
            first_key = tl.load(entries + i // STEPS) * BLOCK_K + i % STEPS * TILE_K
            k = k_tiles.load([batch, kv_head, k_slot + first_key, 0]).reshape(TILE_K, BLOCK_D)
            v = v_tiles.load([batch, kv_head, k_slot + first_key, 0]).reshape(TILE_K, BLOCK_D)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            if CAPPED:
                scores = capped(scores, inner_scale)
            p = tl.exp2(scores * logit_scale - lse2[:, None])
            dp = tl.dot(dout, v.T, input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            if CAPPED:
                ds *= 1.0 - scores * scores
            if masked:
                key = first_key + tl.arange(0, TILE_K)
                ds = tl.where(key[None, :] <= position[:, None], ds, 0.0)
                if PACKED:
                    # Keys after this sequence belong to the next one, and 0 x NaN would let them leak.
                    k = tl.where((key < k_end)[:, None], k, 0.0)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    at = row_offset(batch, head, token, dq_strides)
    tl.store(dq_ptr + at[:, None] + d[None, :], (acc * scale).to(q.dtype), mask=real[:, None] & channel)


@triton.jit(do_not_specialize=["whole_start", "whole_len", "kv_heads", "num_k_blocks"])
def _key_gradients(
    q_tiles,
    dout_tiles,
    k_tiles,
    v_tiles,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    entries_ptr,
    starts_ptr,
    counts_ptr,
    masked_ptr,
    order_ptr,
    table_ptr,
    whole_start,
    whole_len,
    row_strides,
    dk_strides,
    kv_heads,
    num_k_blocks,
    scale,
    logit_scale,
    inner_scale,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    ROW_BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PIECES: tl.constexpr = BLOCK_K // TILE_K
    PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    STEPS: tl.constexpr = MEMBERS * PARTS

    key_list = tl.load(order_ptr + tl.program_id(0) // PIECES)
    kv_head = key_list // num_k_blocks % kv_heads
    row = key_list // num_k_blocks // kv_heads
    batch, q_slot, k_slot, q_start, q_len = row_place(table_ptr, row, whole_start, whole_len)
    first_key = key_list % num_k_blocks * BLOCK_K + tl.program_id(0) % PIECES * TILE_K
    if first_key >= q_start + q_len:
        return
    key = first_key + tl.arange(0, TILE_K)
    k = k_tiles.load([batch, kv_head, k_slot + first_key, 0]).reshape(TILE_K, BLOCK_D)
    v = v_tiles.load([batch, kv_head, k_slot + first_key, 0]).reshape(TILE_K, BLOCK_D)
    dk = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    dv = tl.zeros([TILE_K, BLOCK_D], tl.float32)

    # Lists are walked from their end: programs that run together then begin with the same, last queries, which lie in
    # L2 for all of them, and come to the masked ones last.
    count = tl.load(counts_ptr + key_list)
    full = (count - tl.load(masked_ptr + key_list)) * STEPS
    last = entries_ptr + tl.load(starts_ptr + key_list) + count - 1
    for masked in tl.static_range(2):
        for i in range(full if masked else 0, count * STEPS if masked else full):
            entry = tl.load(last - i // STEPS)
            head = kv_head * GROUP + (entry >> ROW_BITS) + i % STEPS // PARTS
            first = (q_start // BLOCK_Q + (entry & ((1 << ROW_BITS) - 1))) * BLOCK_Q + i % PARTS * TILE_Q
            slot = q_slot + first - q_start
            q = q_tiles.load([batch, head, slot, 0]).reshape(TILE_Q, BLOCK_D)
            dout = dout_tiles.load([batch, head, slot, 0]).reshape(TILE_Q, BLOCK_D)
            at = batch.to(tl.int64) * row_strides[0] + head.to(tl.int64) * row_strides[1] + slot
            at += tl.arange(0, TILE_Q)
            real, seen = None, None
            if masked:
                query = first + tl.arange(0, TILE_Q)
                real = (query >= q_start) & (query < q_start + q_len)
                seen = real[None, :] & (key[:, None] <= query[None, :])
                if table_ptr is not None:
                    # Other slots may hold padding or another sequence, and 0 x NaN would let them leak.
                    q = tl.where(real[:, None], q, 0.0)
                    dout = tl.where(real[:, None], dout, 0.0)
            # What is loaded just before its use takes no registers earlier: they are all taken.
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            if CAPPED:
                scores = capped(scores, inner_scale)
            lse2 = tl.load(lse2_ptr + at, mask=real)
            p = tl.exp2(scores * logit_scale - lse2[None, :])
            if masked:
                p = tl.where(seen, p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, dout.T, input_precision=PRECISION)
            delta = tl.load(delta_ptr + at, mask=real)
            ds = p * (dp - delta[None, :])
            if CAPPED:
                ds *= 1.0 - scores * scores
            if masked:
                ds = tl.where(seen, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)
    at = batch.to(tl.int64) * dk_strides[0] + kv_head.to(tl.int64) * dk_strides[1]
    at += (k_slot + key).to(tl.int64) * dk_strides[2]
    stored = (key < q_start + q_len)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + at[:, None] + d[None, :], (dk * scale).to(k.dtype), mask=stored)
    tl.store(dv_ptr + at[:, None] + d[None, :], dv.to(k.dtype), mask=stored)
