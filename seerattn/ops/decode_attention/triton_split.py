"""`impl="triton"`: lists are split among programs, whose parts a second kernel puts together (flash decoding).

A program has the query heads of a KV group as the rows of one tile and walks its share of their list with an online
softmax. It leaves an output and a log-sum-exp, of which as many as there are splits make a row's. The number of splits
follows from shapes alone; how a list is shared among them, from how long it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.block_sparse_attention.triton_rows import LOG2_E, add_sink, capped
from seerattn.ops.checks import scale_refusal
from seerattn.ops.launch import multiprocessors, power_of_2
from seerattn.ops.triton_keys import key_page, key_tile
from seerattn.selection.decode_blocks import DecodeBlocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Keys of a block where all blocks are read.
DENSE_BLOCK = 64
# What a program takes beside its steps, in steps: its start and its end.
OVERHEAD = 2
MAX_SPLITS = 128


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched.

    Attributes:
        keys: keys of one step, a divisor of the key block.
        num_warps: warps of a program.
        num_stages: depth of the pipeline of keys and values.
        splits: programs that share a list.
    """

    keys: int
    num_warps: int
    num_stages: int
    splits: int


@functools.lru_cache(maxsize=1024)  # layer after layer asks for the same
def choose_launch(
    *, lists: int, width: int, block_k: int, head_dim: int, element_size: int, multiprocessors: int
) -> Launch:
    """Picks a launch from the shapes of a call; there are ``lists`` of ``width`` blocks at most."""
    row_bytes = power_of_2(head_dim) * element_size
    # A step of K and V is 32 KiB at most, or 64. Of four stages three are under way, and two programs with 104 KiB each
    # fill the shared memory of a multiprocessor.
    keys = min(block_k, 64 if row_bytes <= 256 else 32)
    per_sm = 2 if row_bytes <= 512 else 1
    steps = width * (block_k // keys)
    return Launch(keys=keys, num_warps=4, num_stages=4, splits=choose_splits(lists, steps, multiprocessors * per_sm))


def choose_splits(lists: int, steps: int, resident: int) -> int:
    """The fewest splits with the shortest time, in steps, if programs run in waves of ``resident``."""

    def time(splits: int) -> int:
        return -(-lists * splits // resident) * (-(-steps // splits) + OVERHEAD)

    return min(range(1, max(1, min(steps, MAX_SPLITS)) + 1), key=time)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    blocks: DecodeBlocks | None,
    scale: float,
    softcap: float | None = None,
    **_: object,
) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    if q.dtype not in DTYPES:
        return f"it takes fp16, bf16 or fp32, got {q.dtype}"
    return scale_refusal(scale, softcap)


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """See `api.decode_attention`, which validates the arguments; returns the log-sum-exp in any case."""
    batch, heads, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    if block_table is not None:
        block_table = block_table.contiguous()
        page, kv_heads = k.shape[1:3]
        tokens = block_table.shape[1] * page
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    else:
        page, (kv_heads, tokens) = 0, k.shape[1:3]
    if not out.numel():
        return out, lse

    block_k = DENSE_BLOCK if blocks is None else blocks.block_k
    width = -(-tokens // block_k) if blocks is None else blocks.indices.shape[2]
    lists = batch * kv_heads
    launch = launch or choose_launch(
        lists=lists,
        width=width,
        block_k=block_k,
        head_dim=dim,
        element_size=q.element_size(),
        multiprocessors=multiprocessors(q.device),
    )
    group, splits = heads // kv_heads, launch.splits
    parts = part_lse = None
    if splits > 1:
        parts = torch.empty(lists, splits, group, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(lists, splits, group, dtype=torch.float32, device=q.device)
    q = q if q.stride(2) == 1 else q.contiguous()
    block_dim = power_of_2(dim)
    _decode[(lists * splits,)](
        q,
        k,
        v,
        out,
        lse,
        parts,
        part_lse,
        sinks,
        None if blocks is None else blocks.indices.contiguous(),
        None if blocks is None else blocks.counts.contiguous(),
        lengths.contiguous(),
        block_table,
        None if starts is None else starts.contiguous(),
        q.stride()[:2],
        k.stride()[:3],
        v.stride()[:3],
        kv_heads,
        width,
        0 if block_table is None else block_table.shape[1],
        splits,
        (scale if softcap is None else softcap) * LOG2_E,
        0.0 if softcap is None else scale / softcap,
        GROUP=group,
        # Tensor cores take 16 rows at least.
        ROWS=max(16, power_of_2(group)),
        BLOCK_K=block_k,
        TILE_K=launch.keys,
        D=dim,
        BLOCK_D=block_dim,
        PAGE=page,
        CAPPED=softcap is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        _combine[(batch * heads,)](
            out,
            lse,
            parts,
            part_lse,
            sinks,
            heads,
            splits,
            GROUP=group,
            SPLITS=power_of_2(splits),
            D=dim,
            BLOCK_D=block_dim,
            num_warps=4,
        )
    return out, lse


# Numbers that change from batch to batch, which would compile anew where 16 divides them.
@triton.jit(do_not_specialize=["list_width", "num_pages", "splits"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    sinks_ptr,
    indices_ptr,
    counts_ptr,
    lengths_ptr,
    pages_ptr,
    starts_ptr,
    q_strides,
    k_strides,
    v_strides,
    kv_heads,
    list_width,
    num_pages,
    splits,
    scale,
    inner_scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = row // kv_heads
    kv_head = row % kv_heads
    slot = 0
    if PAGE:
        slot = batch * num_pages
    if starts_ptr is not None:
        slot = tl.load(starts_ptr + batch)
    length = tl.load(lengths_ptr + batch)
    if indices_ptr is None:
        entries = None
        count = tl.cdiv(length, BLOCK_K)
    else:
        entries = indices_ptr + row.to(tl.int64) * list_width
        count = tl.load(counts_ptr + row)
    # The steps of a list are shared evenly.
    begin = split * count * STEPS // splits
    end = (split + 1) * count * STEPS // splits

    member = tl.arange(0, ROWS)
    real = member < GROUP
    head = kv_head * GROUP + tl.minimum(member, GROUP - 1)
    d = tl.arange(0, BLOCK_D)
    q_offset = batch.to(tl.int64) * q_strides[0] + head.to(tl.int64) * q_strides[1]
    q = tl.load(q_ptr + q_offset[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # A step is looked up one step before. Its keys then wait for nothing, and the compiler lets as many tiles be under
    # way as the stages say; looked up in the step itself, pages left it one.
    key, place = _look_up(entries, pages_ptr, batch, slot, begin, end, length, BLOCK_K, TILE_K, PAGE)
    for i in tl.range(begin, end):
        k = key_tile(k_ptr, k_strides, place, kv_head, slot, key, length, PAGE, TILE_K, D, BLOCK_D, True)
        v = key_tile(v_ptr, v_strides, place, kv_head, slot, key, length, PAGE, TILE_K, D, BLOCK_D, True)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if CAPPED:
            scores = capped(scores, inner_scale)
        scores = tl.where((key + tl.arange(0, TILE_K) < length)[None, :], scores * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # The last step of a block may begin behind the last key, where a program has seen none yet.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
        key, place = _look_up(entries, pages_ptr, batch, slot, i + 1, end, length, BLOCK_K, TILE_K, PAGE)

    stored = real[:, None] & (d[None, :] < D)
    if parts_ptr is None:
        if sinks_ptr is not None:
            acc, top, total = add_sink(acc, top, total, tl.load(sinks_ptr + head))
        place = batch.to(tl.int64) * kv_heads * GROUP + head
        total = _not_zero(total)
        tl.store(out_ptr + place[:, None] * D + d[None, :], acc / total[:, None], mask=stored)
        tl.store(lse_ptr + place, (top + tl.log2(total)) * 0.6931471805599453, mask=real)
    else:
        place = tl.program_id(0).to(tl.int64) * GROUP + member
        total = _not_zero(total)
        tl.store(parts_ptr + place[:, None] * D + d[None, :], acc / total[:, None], mask=stored)
        tl.store(part_lse_ptr + place, top + tl.log2(total), mask=real)


@triton.jit
def _look_up(
    entries, pages_ptr, batch, slot, i, end, length, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, PAGE: tl.constexpr
):
    """First key of step `i` of a list, and where it lies; anything from step `end` on."""
    STEPS: tl.constexpr = BLOCK_K // TILE_K
    block = i // STEPS
    if entries is not None:
        block = tl.load(entries + block, mask=i < end, other=0)
    key = block * BLOCK_K + i % STEPS * TILE_K
    return key, key_page(pages_ptr, batch, slot, key, length, PAGE, TILE_K)


@triton.jit
def _not_zero(total):
    """Where nothing was added up an output is 0 and its log-sum-exp that of the maximum, -inf."""
    return tl.where(total > 0.0, total, 1.0)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    sinks_ptr,
    heads,
    splits,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one sequence from its parts, whose log-sum-exps are in units of log2(e)."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    part = (place // GROUP * splits + split) * GROUP + place % GROUP
    part_lse = tl.load(part_lse_ptr + part, mask=split < splits, other=-float("inf"))
    parts = tl.load(
        parts_ptr + part[:, None] * D + d[None, :], mask=(split < splits)[:, None] & (d[None, :] < D), other=0.0
    )
    top = tl.max(part_lse, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + place % heads).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    weight = tl.exp2(part_lse - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - top)
    total = _not_zero(total)
    tl.store(out_ptr + place * D + d, tl.sum(parts * weight[:, None], 0) / total, mask=d < D)
    tl.store(lse_ptr + place, (top + tl.log2(total)) * 0.6931471805599453)
