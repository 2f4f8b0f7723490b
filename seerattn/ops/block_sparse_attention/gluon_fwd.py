"""`impl="gluon"`: the forward pass for Hopper over index lists: wgmma, TMA and warp specialisation, in Gluon.

A program takes 64 or 128 query rows that share a list: tokens of a query block, of one head or of several of a KV
group. Its producer warp walks the list and brings K and V tiles through a ring of mbarriers. Each of its consumer
warpgroups keeps a *tile* of 64 rows in registers: scores of the next keys are computed while the softmax of these runs
and the product with V of the last ones finishes (FlashAttention-3, arXiv 2407.08608, section 3.2).

A step takes 64 or 128 keys; blocks of 64 are joined in pairs, a *box* each, for one wider product and one rescale.
Programs are ordered by KV head, then from the longest lists, so that those that run together read the same keys.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seerattn.ops.checks import scale_refusal
from seerattn.ops.launch import new_output, on_device, tma_ready
from seerattn.selection.block_indices import BlockIndices

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCK_K = (64, 128)
TILE_ROWS = 64  # rows of one wgmma


@dataclass(frozen=True)
class Plan:
    """How one kernel is launched.

    Attributes:
        heads: query heads of a program, which share its list.
        tokens: query tokens of a program, a divisor of the query block; heads x tokens is 64 or 128.
        block_n: keys of one step, 64 or 128.
        stages: slots of the ring, a K and a V tile each.
        q_in_registers: keep q there for the product with K, which else reads it from shared memory at every step.
    """

    heads: int
    tokens: int
    block_n: int = 128
    stages: int = 3
    q_in_registers: bool = True

    @property
    def consumers(self) -> int:
        """Warpgroups that compute, with a tile each."""
        return self.heads * self.tokens // TILE_ROWS


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for besides dtype and head dim.

    Attributes:
        plan: its launch.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        box: keys that one copy brings, the smaller of a block and a step.
        sharing: query heads of one list.
    """

    plan: Plan
    block_q: int
    block_k: int
    box: int
    sharing: int


def choose_plan(*, block_q: int, sharing: int) -> Plan | None:
    """Picks a launch for lists that `sharing` query heads share, None where there is none."""
    # One H100, bf16, 32/8 heads, D 128, density .1, ms at 128k / 32k / 8k; "q" is q in registers:
    #   64 x 64 a group:   128 keys, q 22.8 / 1.73 / .192   128 keys 23.1 / 1.83 / .189   64 keys 24.8 / 1.83 / .190
    #   64 x 128 a group:  128 keys, q 23.1 / 1.74 / .194   128 keys 23.3 / 1.79 / .187
    #   128 x 128 a head:  128 keys, q 23.5 / 1.78 / .195   128 keys 23.5 / 1.76 / .188   64 keys, q 26.0 / 1.92 / .204
    #   64 x 64 a head:    64 keys, q 29.7 / 1.97 / .181
    # At density .5 and 128k, 128 x 128 a head: 128 keys, q 112.2, 128 keys 113.7.
    # Not faster, and gone: two tiles a consumer (24.1 where this takes 22.8), programs that stay and take their work in
    # turns (25.1; 40.4 with one consumer), heads that walk the union of their lists (33.1 where this takes 29.7).
    if sharing % 4 == 0 and block_q >= 32:
        return Plan(heads=4, tokens=32)
    if sharing % 2 == 0 and block_q >= 64:
        return Plan(heads=2, tokens=64)
    if block_q == 128:
        return Plan(heads=1, tokens=128)
    if block_q == 64:
        return Plan(heads=1, tokens=64, block_n=64)
    return None


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens: list[int] | None,
    **_: object,
) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    if q.dtype not in DTYPES:
        return f"it takes fp16 or bf16, got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"it takes head dims of {HEAD_DIMS}, got {q.shape[3]}"
    if softcap is not None or sinks is not None or cu_seqlens is not None:
        return "it has no softcap, sinks or packed sequences"
    if blocks.skip_threshold is not None:
        return f"it skips no blocks, got skip_threshold {blocks.skip_threshold:g}"
    if blocks.block_k not in BLOCK_K:
        return f"it takes key blocks of {BLOCK_K} tokens, got {blocks.block_k}"
    sharing = q.shape[1] // blocks.num_heads
    if choose_plan(block_q=blocks.block_q, sharing=sharing) is None:
        rows = f"{blocks.block_q} tokens x {sharing} heads"
        return f"it takes query blocks of 64 tokens or more, or of 32 where 4 heads share their lists, got {rows}"
    return scale_refusal(scale)


@torch.no_grad()
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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `api.block_sparse_attention`, which validates the arguments, and `refusal`.

    ``lengths`` holds the keys of every row. The output has the memory layout ``[B, T, H, D]``.
    """
    batch, heads, q_tokens, dim = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    sharing = heads // blocks.num_heads
    plan = plan or choose_plan(block_q=blocks.block_q, sharing=sharing)
    out = new_output(q, padded=any(n < q_tokens for n in lengths))
    lse = None
    if return_lse:
        lse = torch.full((batch, q_tokens, heads), -torch.inf, dtype=torch.float32, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out, lse

    form = Form(plan, blocks.block_q, blocks.block_k, min(blocks.block_k, plan.block_n), sharing)
    tile_tokens = min(plan.tokens, TILE_ROWS)
    # A box that is half of a tile is copied in columns of 64, as the tile lies in memory.
    key_box = [1, 1, form.box, dim if form.box == plan.block_n else 64]
    parts = heads // plan.heads * (blocks.block_q // plan.tokens)
    _forward[(batch * parts * blocks.num_q_blocks,)](
        _descriptor(q, [1, TILE_ROWS // tile_tokens, tile_tokens, dim]),
        _descriptor(k, key_box),
        _descriptor(v, key_box),
        out,
        lse,
        blocks.indices.contiguous(),
        blocks.counts.contiguous(),
        on_device((*blocks.q_start.tolist(), *blocks.q_len.tolist()), torch.int32, q.device),
        scale * math.log2(math.e),
        batch,
        heads,
        kv_heads,
        q_tokens,
        k_tokens,
        blocks.num_q_blocks,
        blocks.indices.shape[3],
        FORM=form,
        num_warps=4,
        maxnreg=168 if plan.consumers == 2 else 128,  # 65536 registers by 384 threads, or by 2 x 256
    )
    return out, lse


def _descriptor(x: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tma_ready(x), box, _layout(tuple(box), x.dtype))


@functools.cache  # it takes 20 us, of three tensors a layer
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float16 if dtype == torch.float16 else gl.bfloat16)


@gluon.jit
def _box_key(entries, i, boxes, FORM: gl.constexpr):
    """First key of box `i` of a list of `boxes`; behind its end a place that no query sees and TMA fills with zeros."""
    SPLIT: gl.constexpr = FORM.block_k // FORM.box
    block = gl.maximum(gl.load(entries + gl.minimum(i, boxes - 1) // SPLIT), 0)
    return gl.where(i < boxes, block * FORM.block_k + i % SPLIT * FORM.box, 1 << 30)


@gluon.jit
def _tile_boxes(entries, e, boxes, FORM: gl.constexpr):
    """First keys of the first and of the last box of tile `e`."""
    JOINED: gl.constexpr = FORM.plan.block_n // FORM.box
    first = _box_key(entries, e * JOINED, boxes, FORM)
    if JOINED == 1:
        return first, first
    return first, _box_key(entries, e * JOINED + 1, boxes, FORM)


@gluon.jit
def _visible_tiles(entries, total, boxes, position, FORM: gl.constexpr):
    """Leading ones of the `total` tiles of an ascending list that the query at `position`, and all later ones, see."""
    BOXES: gl.constexpr = (FORM.block_q + FORM.block_k) // FORM.box + 1  # more than end behind `position`
    visible = total
    for i in gl.static_range(BOXES):
        e = total - 1 - i
        _, last = _tile_boxes(entries, gl.maximum(e, 0), boxes, FORM)
        visible -= ((e >= 0) & (last + FORM.box - 1 > position)).to(gl.int32)
    return visible


@gluon.jit
def _work(problem, FORM: gl.constexpr):
    """Heads, position and list of a program: KV heads outermost, then query blocks from the last, then their parts."""
    indices_ptr, counts_ptr, geometry_ptr, batch_size, heads, kv_heads, num_q_blocks, list_width = problem
    group = heads // kv_heads
    head_parts = group // FORM.plan.heads
    parts = head_parts * (FORM.block_q // FORM.plan.tokens)
    pid = gl.program_id(0)
    part = pid % parts
    block = num_q_blocks - 1 - pid // parts % num_q_blocks
    batch = pid // (parts * num_q_blocks) // kv_heads
    kv_head = pid // (parts * num_q_blocks) % kv_heads
    head = kv_head * group + part % head_parts * FORM.plan.heads
    q_start = gl.load(geometry_ptr + batch)
    q_len = gl.load(geometry_ptr + batch_size + batch)
    position = (q_start // FORM.block_q + block) * FORM.block_q + part // head_parts * FORM.plan.tokens
    list_row = ((batch * heads + head) // FORM.sharing).to(gl.int64) * num_q_blocks + block
    # A row without a query has no list; it runs over block 0 and stores nothing.
    boxes = gl.maximum(gl.load(counts_ptr + list_row), 1) * (FORM.block_k // FORM.box)
    return batch, kv_head, head, position, q_start, q_len, indices_ptr + list_row * list_width, boxes


@gluon.jit
def _tile(t, head, position, q_smem, FORM: gl.constexpr):
    """First head and position of tile `t` of a program."""
    HEAD_TILES: gl.constexpr = FORM.plan.heads // q_smem.shape[2]
    return head + t % HEAD_TILES * q_smem.shape[2], position + t // HEAD_TILES * q_smem.shape[3]


@gluon.jit
def _next(stage, phase, FORM: gl.constexpr):
    last = stage == FORM.plan.stages - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _load_tile(desc, smem, bar, stage, place, boxes):
    """Brings the keys of a tile, one box or two, into a slot of the ring."""
    batch, kv_head, row = place
    first, last = boxes
    BOX: gl.constexpr = desc.block_type.shape[2]
    if smem.shape[3] == BOX:
        tma.async_copy_global_to_shared(desc, [batch, kv_head, row + first, 0], bar, smem.index(stage))
    else:
        # A swizzled tile of 128 rows lies in memory as its columns 0 to 63, all rows, then 64 to 127.
        COLUMNS: gl.constexpr = desc.block_type.shape[3]
        HALVES: gl.constexpr = smem.shape[4] // COLUMNS
        parts = smem._reinterpret(smem.dtype, [smem.shape[0] * HALVES * 2, 1, 1, BOX, COLUMNS], desc.layout)
        for half in gl.static_range(HALVES):
            at = (stage * HALVES + half) * 2
            column = half * COLUMNS
            tma.async_copy_global_to_shared(desc, [batch, kv_head, row + first, column], bar, parts.index(at))
            tma.async_copy_global_to_shared(desc, [batch, kv_head, row + last, column], bar, parts.index(at + 1))


@gluon.jit
def _produce(descs, smem, bars, problem, q_tokens, k_tokens, FORM: gl.constexpr):
    """Loads the query tiles of a program, then fills one slot of the ring a step.

    A slot holds what is used, and done with, together: K of a tile and V of the tile before. So the first slot is K
    alone, and the last V alone.
    """
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_full, full, empty = bars
    TILES: gl.constexpr = FORM.plan.consumers
    BYTES: gl.constexpr = FORM.plan.block_n * k_smem.shape[4] * 2
    batch, kv_head, head, position, q_start, q_len, entries, boxes = _work(problem, FORM)

    mbarrier.expect(q_full, q_desc.block_type.nbytes * TILES)
    for t in gl.static_range(TILES):
        tile_head, tile_position = _tile(t, head, position, q_smem, FORM)
        row = tile_position - q_start + q_tokens - q_len
        tma.async_copy_global_to_shared(q_desc, [batch, tile_head, row, 0], q_full, q_smem.index(t))

    place = (batch, kv_head, k_tokens - q_start - q_len)
    keys = _tile_boxes(entries, 0, boxes, FORM)
    mbarrier.expect(full.index(0), BYTES)
    _load_tile(k_desc, k_smem, full.index(0), 0, place, keys)
    stage = 1
    phase = 1
    for e in range(1, gl.cdiv(boxes, FORM.plan.block_n // FORM.box)):
        last_keys = keys
        keys = _tile_boxes(entries, e, boxes, FORM)
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, 2 * BYTES)
        _load_tile(k_desc, k_smem, bar, stage, place, keys)
        _load_tile(v_desc, v_smem, bar, stage, place, last_keys)
        stage, phase = _next(stage, phase, FORM)
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), BYTES)
    _load_tile(v_desc, v_smem, full.index(stage), stage, place, keys)


@gluon.jit
def _hide_future(s, entries, e, boxes, positions, FORM: gl.constexpr):
    """Scores of tile `e` without those of keys after their query."""
    first, last = _tile_boxes(entries, e, boxes, FORM)
    keys = gl.arange(0, FORM.plan.block_n, gl.SliceLayout(0, s.type.layout))
    keys += gl.where(keys < FORM.box, first, last - FORM.box)
    return gl.where(gl.expand_dims(keys, 0) > gl.expand_dims(positions, 1), float("-inf"), s)


@gluon.jit
def _online_softmax(s, m, z, scale, P_LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Weights of one key tile as the A operand of the product with V, with the new maximum, sum and rescale factor."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    # A row may see no key of its first tiles. (Were those scores finite and huge, the rounding of m_new would be, too.)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    alpha = gl.exp2(m - shift)
    z = z * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), P_LAYOUT), m_new, z, alpha


@gluon.jit
def _consume(smem, bars, problem, out, scale, TILE: gl.constexpr, FORM: gl.constexpr):
    """Computes one tile of query rows and stores it."""
    q_smem, k_smem, v_smem = smem
    q_full, full, empty = bars
    dtype: gl.constexpr = q_smem.dtype
    TOKENS: gl.constexpr = q_smem.shape[3]
    ROWS: gl.constexpr = q_smem.shape[2] * TOKENS
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    DIM: gl.constexpr = k_smem.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    batch, _, head, position, q_start, q_len, entries, boxes = _work(problem, FORM)
    head, position = _tile(TILE, head, position, q_smem, FORM)
    positions = position + gl.arange(0, ROWS, ROW) % TOKENS
    total = gl.cdiv(boxes, FORM.plan.block_n // FORM.box)
    visible = _visible_tiles(entries, total, boxes, position, FORM)
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    z = gl.zeros([ROWS], gl.float32, ROW)

    mbarrier.wait(q_full, 0)
    q = q_smem.index(TILE).reshape([ROWS, DIM])
    if FORM.plan.q_in_registers:
        q = q.load(gl.DotOperandLayout(0, S_LAYOUT, 2))

    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).reshape([BLOCK_N, DIM]).permute((1, 0)), blank, use_acc=False)
    mbarrier.arrive(empty.index(0))
    if visible < 1:
        s = _hide_future(s, entries, 0, boxes, positions, FORM)
    p, m, z, alpha = _online_softmax(s, m, z, scale, P_LAYOUT, dtype)

    stage = 1
    phase = 0
    mbarrier.wait(full.index(stage), phase)
    for e in range(1, total):
        k = k_smem.index(stage).reshape([BLOCK_N, DIM]).permute((1, 0))
        v = v_smem.index(stage).reshape([BLOCK_N, DIM])
        s = warpgroup_mma(q, k, blank, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, (s,))
        if e >= visible:
            s = _hide_future(s, entries, e, boxes, positions, FORM)
        p_next, m, z, alpha = _online_softmax(s, m, z, scale, P_LAYOUT, dtype)
        # This wait is for the next round; here it also ends a basic block, without which ptxas moves the exponentials
        # behind the wait for the product that they are to run beside.
        next_stage, phase = _next(stage, phase, FORM)
        mbarrier.wait(full.index(next_stage), phase)
        acc, p = warpgroup_mma_wait(0, (acc, p))
        mbarrier.arrive(empty.index(stage))
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, OUT_ROW), 1)
        p = p_next
        stage = next_stage
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, DIM]), acc)

    out_ptr, lse_ptr, heads, q_tokens = out
    rows = gl.arange(0, ROWS, OUT_ROW)
    columns = gl.arange(0, DIM, gl.SliceLayout(0, O_LAYOUT))
    m = gl.convert_layout(m, OUT_ROW)
    z = gl.convert_layout(z, OUT_ROW)
    token = position - q_start + rows % TOKENS
    real = (token >= 0) & (token < q_len)
    out_row = (batch * q_tokens + q_tokens - q_len + token).to(gl.int64) * heads + head + rows // TOKENS
    pointers = gl.expand_dims(out_ptr + out_row * DIM, 1) + gl.expand_dims(columns, 0)
    gl.store(pointers, (acc * gl.expand_dims(1.0 / z, 1)).to(dtype), mask=gl.expand_dims(real, 1))
    if lse_ptr is not None:
        gl.store(lse_ptr + out_row, (m + gl.log2(z)) * 0.6931471805599453, mask=real)


@gluon.jit(do_not_specialize=["batch_size", "q_tokens", "k_tokens", "num_q_blocks", "list_width"])
def _forward(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    geometry_ptr,
    scale,
    batch_size,
    heads,
    kv_heads,
    q_tokens,
    k_tokens,
    num_q_blocks,
    list_width,
    FORM: gl.constexpr,
):
    STAGES: gl.constexpr = FORM.plan.stages
    CONSUMERS: gl.constexpr = FORM.plan.consumers
    RING: gl.constexpr = [STAGES, 1, 1, FORM.plan.block_n, q_desc.block_type.shape[3]]
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, RING, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, RING, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)

    descs = (q_desc, k_desc, v_desc)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_full, full, empty)
    problem = (indices_ptr, counts_ptr, geometry_ptr, batch_size, heads, kv_heads, num_q_blocks, list_width)
    out = (out_ptr, lse_ptr, heads, q_tokens)
    # The argument tuples stand in the calls: in a variable their constants would become values.
    # fmt: off
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (smem, bars, problem, out, scale, 0, FORM)),
            (_produce, (descs, smem, bars, problem, q_tokens, k_tokens, FORM)),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (_consume, (smem, bars, problem, out, scale, 0, FORM)),
            (_consume, (smem, bars, problem, out, scale, 1, FORM)),
            (_produce, (descs, smem, bars, problem, q_tokens, k_tokens, FORM)),
        ], [4, 1], [240, 24])
    # fmt: on
