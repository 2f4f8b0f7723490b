"""`impl="triton"`: finished blocks of one sequence and KV group are scored, and chosen among, in one launch.

Where sequences are few, several programs share their blocks, or one multiprocessor would read all gate keys of a head.
The one that ends last chooses. Scores of the blocks go through scratch: Triton has no tile that a loop could fill piece
by piece. They are held in registers for the choice, where the count is that of `gate_scores`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.decode_select.api import TokenRule
from seerattn.ops.decode_select.table import KeyTable
from seerattn.ops.gate_scores.kernels.choice import number, places, top_count, wanted_count
from seerattn.ops.launch import multiprocessors, power_of_2
from seerattn.selection.decode_blocks import DecodeBlocks

# A row of scores is held in registers: of 8 warps 32 numbers a thread, as often as the choice needs it.
MAX_BLOCKS = 8192
# Gate keys of a step, in elements: 32 KiB of fp32, of which two steps are under way while a third one is used.
TILE = 8192


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched.

    Attributes:
        step: blocks of one step, a power of two.
        num_warps: warps of a program.
        num_stages: depth of the pipeline of gate keys.
        splits: programs that share the blocks of a row.
    """

    step: int
    num_warps: int
    num_stages: int
    splits: int = 1


@functools.lru_cache(maxsize=1024)  # layer after layer asks for the same
def choose_launch(
    *, pieces: int, gate_dim: int, keys: int, rows: int, number_of_blocks: int, multiprocessors: int
) -> Launch:
    """Picks a launch from the shapes of a call, of ``keys`` gate keys for a piece of a block.

    Within 5 % of the best of 18 for 1, 4 and 24 sequences of 32k and 128k tokens with 16-bit gate keys by KV groups on
    an H200; 8 warps and one program a multiprocessor took 1.1 to 1.4 times as long.
    """
    tile = power_of_2(pieces) * power_of_2(gate_dim) * power_of_2(keys)
    step = max(1, TILE // tile)
    # Two programs a multiprocessor, and two steps at least of each program.
    splits = min(-(-2 * multiprocessors // rows), max(1, number_of_blocks // (2 * step)))
    return Launch(step=step, num_warps=4 if number_of_blocks <= MAX_BLOCKS // 2 else 8, num_stages=3, splits=splits)


def refusal(windows: int, rule: TokenRule | None) -> str | None:
    """Why this implementation cannot serve a call with so many gate keys, in a sentence; None if it can."""
    if rule is None:
        return "it serves TopK and TokenBudget alone"
    if rule.biased:
        return "it has no bias by distance"
    if windows // rule.pieces >= MAX_BLOCKS:
        return f"it holds at most {MAX_BLOCKS} blocks, got {windows // rule.pieces + 1}"
    return None


def select_blocks(
    gate_q: Tensor,
    gate_k: Tensor | KeyTable,
    rule: TokenRule,
    *,
    kv_heads: int,
    width: int,
    lengths: Tensor | None,
    tokens: int,
    launch: Launch | None = None,
) -> DecodeBlocks:
    """See `api.select_blocks`, which validates the arguments."""
    batch, heads, dim = gate_q.shape
    members, windows, device = heads // kv_heads, gate_k.shape[2], gate_q.device
    number_of_blocks = windows // rule.pieces + 1
    indices = torch.empty(batch, kv_heads, width, dtype=torch.int32, device=device)
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    scratch = torch.empty(batch * kv_heads, members, number_of_blocks, dtype=torch.float32, device=device)
    own_keys = gate_k.shape[1] != kv_heads
    rows = batch * kv_heads
    apart = isinstance(gate_k, KeyTable)
    launch = launch or choose_launch(
        pieces=rule.pieces,
        gate_dim=dim,
        keys=members if own_keys else 1,
        rows=max(1, rows),
        number_of_blocks=number_of_blocks,
        multiprocessors=multiprocessors(device),
    )
    if counts.numel():
        _select[(rows * launch.splits,)](
            gate_q.contiguous(),
            None if apart else gate_k,
            gate_k.places if apart else None,
            None if lengths is None else lengths.contiguous(),
            scratch,
            # How many programs of a row have ended.
            torch.zeros(rows, dtype=torch.int32, device=device) if launch.splits > 1 else None,
            indices,
            counts,
            (0, 0, dim) if apart else gate_k.stride()[:3],
            kv_heads,
            width,
            number_of_blocks,
            tokens,
            launch.splits,
            float(rule.setting),
            dim**-0.5,
            MEMBERS=members,
            OWN_KEYS=own_keys,
            PIECES=rule.pieces,
            BLOCK_PIECES=power_of_2(rule.pieces),
            SUMS=rule.over_pieces == "sum",
            RULE=("count", "share").index(rule.kind),
            SINKS=rule.sink_blocks,
            UNSCORED=rule.unscored,
            BLOCK_K=rule.block_k,
            D=dim,
            BLOCK_D=power_of_2(dim),
            VECTOR=4 if apart and gate_k.aligned else 1,
            STEP=launch.step,
            STAGES=launch.num_stages,
            BLOCKS=max(32, power_of_2(max(number_of_blocks, width))),
            num_warps=launch.num_warps,
        )
    return DecodeBlocks(indices, counts, rule.block_k)


@triton.jit
def _log_sum_exp(s, top, AXIS: tl.constexpr):
    """Along an axis whose largest number is known; any finite number where all are -inf, which nobody asks for."""
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(s - tl.expand_dims(shift, AXIS)), AXIS)
    return shift + tl.log(tl.where(total > 0.0, total, 1.0))


# Numbers that change from token to token, which would compile anew where 16 divides them.
@triton.jit(do_not_specialize=["width", "number_of_blocks", "tokens", "splits"])
def _select(
    gate_q,
    gate_k,
    table,
    lengths,
    scratch,
    ended,
    indices,
    counts,
    strides,
    kv_heads,
    width,
    number_of_blocks,
    tokens,
    splits,
    setting,
    scale,
    MEMBERS: tl.constexpr,
    OWN_KEYS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    SUMS: tl.constexpr,
    RULE: tl.constexpr,
    SINKS: tl.constexpr,
    UNSCORED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    batch = row // kv_heads
    head = row % kv_heads
    length = tokens
    if lengths is not None:
        length = tl.load(lengths + batch)
    # The block of the token, and so the number of those that are finished.
    own = tl.maximum(length - 1, 0) // BLOCK_K

    if table is None:
        keys = gate_k + batch * strides[0]
        head_stride = strides[1]
    else:
        # What is known of a pointer among the arguments has to be told of one that is loaded, or loads are not vectors.
        keys = tl.multiple_of(tl.load(table + 2 * batch).to(tl.pointer_type(tl.float32)), 4 * VECTOR)
        head_stride = tl.multiple_of(tl.load(table + 2 * batch + 1), VECTOR)
    d = tl.arange(0, BLOCK_D)
    piece = tl.arange(0, BLOCK_PIECES)
    queries = gate_q + row * MEMBERS * D
    own_scratch = scratch + row * MEMBERS * number_of_blocks
    share = tl.cdiv(tl.cdiv(own, STEP), splits) * STEP
    # Told here, as loads that no matrix product takes are not pipelined otherwise.
    for begin in tl.range(split * share, tl.minimum(own, (split + 1) * share), STEP, num_stages=STAGES):
        block = begin + tl.arange(0, STEP)
        # [STEP, BLOCK_PIECES]
        window = block[:, None] * PIECES + piece[None, :]
        there = (block[:, None] < own) & (piece[None, :] < PIECES)
        at = keys + window.to(tl.int64) * strides[2]
        mask = there[:, :, None] & (d[None, None, :] < D)
        if not OWN_KEYS:
            k = tl.load(at[:, :, None] + head * head_stride + d[None, None, :], mask=mask, other=0.0)
        for member in tl.static_range(MEMBERS):
            if OWN_KEYS:
                own_at = at[:, :, None] + (head * MEMBERS + member) * head_stride
                k = tl.load(own_at + d[None, None, :], mask=mask, other=0.0)
            q = tl.load(queries + member * D + d, mask=d < D, other=0.0) * scale
            s = tl.where(there, tl.sum(k * q[None, None, :], 2), -float("inf"))
            top = tl.max(s, 1)
            if SUMS:
                top = _log_sum_exp(s, top, 1)
            tl.store(own_scratch + member * number_of_blocks + block, top, mask=block < own)
    # What other threads of the program have written is read from here on.
    tl.debug_barrier()
    is_last = True
    if ended is not None:
        is_last = tl.atomic_add(ended + row, 1, sem="acq_rel") == splits - 1
    if is_last:
        _choose(
            own_scratch, indices + row * width, counts + row, own, length, width, number_of_blocks, setting,
            MEMBERS, RULE, SINKS, UNSCORED, BLOCKS,
        )  # fmt: skip


@triton.jit
def _choose(
    scratch, indices, counts, own, length, width, number_of_blocks, setting,
    MEMBERS: tl.constexpr, RULE: tl.constexpr, SINKS: tl.constexpr, UNSCORED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The list and the count of a row by the scores of its heads, which other multiprocessors may have written."""
    column = tl.arange(0, BLOCKS)[None, None, None, :]
    scored = (column < own) & (column >= UNSCORED)
    best = tl.full([1, 1, 1, BLOCKS], -float("inf"), tl.float32)
    for member in tl.static_range(MEMBERS):
        at = scratch + member * number_of_blocks + column
        s = tl.load(at, mask=scored, other=-float("inf"), cache_modifier=".cg")
        norm = _log_sum_exp(s, tl.max(s, 3), 3)
        best = tl.maximum(best, tl.where(scored, s - tl.expand_dims(norm, 3), -float("inf")))

    live = length > 0
    blocks = tl.where(live, own + 1, 0)
    first = tl.minimum(SINKS, own)
    one = tl.zeros([1], tl.int32)
    forced = one + tl.where(live, first + 1, 0)
    wanted = wanted_count(setting, one + blocks, forced, RULE)
    beside = live & ((column < first) | (column == own))
    rivals = (column >= first) & (column < own)
    keep = top_count(best, rivals, beside, one + own - first, wanted - forced, wanted)
    place = places(keep) - 1
    tl.store(indices + place, column, mask=keep)
    kept = number(keep)
    tl.store(counts + one, kept)
    tl.store(indices + column, -1, mask=(column >= kept[:, None, None, None]) & (column < width))
