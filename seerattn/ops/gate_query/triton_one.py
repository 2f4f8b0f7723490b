"""`impl="triton"`: gate queries of single tokens in one launch, un-rotated, projected, normed and rotated.

By torch modules that is some thirty launches a layer, 40 to 60 us of a GPU for a few thousand numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seerattn.ops.gate_scores.api import Gate, Rotary
from seerattn.ops.gate_scores.kernels.arithmetic import turn
from seerattn.ops.gate_scores.kernels.launch import rotation_of, table_refusal
from seerattn.ops.gate_scores.kernels.pooling import pair_channels, turned_back
from seerattn.ops.gate_scores.kernels.vectors import RMS_NORM_EPS
from seerattn.ops.launch import power_of_2

# Sequences of a tile, as products take 16 rows at least, and rows of a weight that a program reads, all at once. One
# program for each head and sequence that read the 256 KiB of a KV group in turn took 28 us, and 49 for 24 sequences.
ROWS, DEPTH = 16, 64


def refusal(q: Tensor, rotary: Rotary) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    return table_refusal(q[:, :, None], rotary)


def gate_queries(q: Tensor, rotary: Rotary, gate: Gate, lengths: Tensor | None, tokens: int) -> Tensor:
    """See `api.gate_queries`, which validates the arguments."""
    rows, _, dim = q.shape
    config, gate_dim, heads = gate.config, gate.gate_dim, gate.mask_heads
    out = torch.empty(rows, heads, gate_dim, dtype=torch.float32, device=q.device)
    cos, sin, cos_strides, sin_strides, rotation = rotation_of(rotary, q[:, :, None], dim)
    members, kinds, half = q.shape[1] // heads, len(config.q_pooling), max(16, power_of_2(gate_dim // 2))
    depth = min(DEPTH, power_of_2(dim))
    splits = 1 if gate.q_weight is None else members * kinds * -(-dim // depth)
    tiles = -(-rows // ROWS) * heads
    parts = ended = None
    if splits > 1:
        parts = torch.empty(tiles, splits, 2, ROWS, half, dtype=torch.float32, device=q.device)
        ended = torch.zeros(tiles, dtype=torch.int32, device=q.device)
    if rows:
        _gate_query[(tiles * splits,)](
            q,
            *q.stride()[:2],
            cos,
            cos_strides[0],
            sin,
            sin_strides[0],
            None if gate.q_weight is None else gate.q_weight.contiguous(),
            getattr(gate.q_norm, "weight", None),
            gate.inv_freq,
            None if lengths is None else lengths.contiguous(),
            tokens,
            parts,
            # How many programs of a tile have ended.
            ended,
            out,
            rows,
            heads,
            Q_SIZE=config.q_size,
            MEMBERS=members,
            KINDS=kinds,
            D=dim,
            ROWS=ROWS,
            DEPTH=depth,
            SPLITS=splits,
            **rotation,
            DG=gate_dim,
            GATE_HALF=half,
            PAIRED=gate.pairing.width,
            ALTERNATING=gate.pairing.interleaved,
            num_warps=8,
        )
    return out


@triton.jit(do_not_specialize=["tokens", "rows"])
def _gate_query(
    q, stride_b, stride_h, cos, stride_cos, sin, stride_sin, weight, norm, inv_freq, lengths, tokens, parts, ended, out,
    rows, heads,
    Q_SIZE: tl.constexpr, MEMBERS: tl.constexpr, KINDS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, SPLITS: tl.constexpr, ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr,
    DG: tl.constexpr, GATE_HALF: tl.constexpr, PAIRED: tl.constexpr, ALTERNATING: tl.constexpr,
):  # fmt: skip
    """Queries of one head of the gate, of some sequences; of the programs that share them the last one ends them."""
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    head = tile % heads
    row = tile // heads * ROWS + tl.arange(0, ROWS)
    there = row < rows
    # What is no sequence is another one's once more, and not stored.
    safe = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    x_rows, cos_rows, sin_rows = safe * stride_b, safe * stride_cos, safe * stride_sin
    pair = tl.arange(0, GATE_HALF)
    real = pair < DG // 2
    first, apart = pair_channels(pair, DG, PAIRED, ALTERNATING)
    second = first + apart
    is_last = True
    if weight is None:
        x = q + head.to(tl.int64) * stride_h
        # Channel D is none.
        low_channel, high_channel = tl.where(real, first, D)[None, :], tl.where(real, second, D)[None, :]
        low = turned_back(x, x_rows, cos, cos_rows, sin, sin_rows, low_channel, D, ROTATED, ROTATION, COLUMN)
        high = turned_back(x, x_rows, cos, cos_rows, sin, sin_rows, high_channel, D, ROTATED, ROTATION, COLUMN)
    else:
        # A window of one token is that token, whatever the pooling.
        PIECES: tl.constexpr = (D + DEPTH - 1) // DEPTH
        block = split // PIECES
        channel = split % PIECES * DEPTH + tl.arange(0, DEPTH)
        x = q + (head * MEMBERS + block // KINDS).to(tl.int64) * stride_h
        token = turned_back(x, x_rows, cos, cos_rows, sin, sin_rows, channel[None, :], D, ROTATED, ROTATION, COLUMN)
        weight += (head * (MEMBERS * KINDS) + block).to(tl.int64) * (D * DG)
        at = weight + channel[:, None] * DG
        mask = (channel < D)[:, None] & real[None, :]
        low = tl.dot(token, tl.load(at + first[None, :], mask=mask, other=0.0), input_precision="ieee")
        high = tl.dot(token, tl.load(at + second[None, :], mask=mask, other=0.0), input_precision="ieee")
        if SPLITS > 1:
            own = parts + tile.to(tl.int64) * (SPLITS * 2 * ROWS * GATE_HALF)
            inside = tl.arange(0, ROWS)[:, None] * GATE_HALF + pair[None, :]
            tl.store(own + split * (2 * ROWS * GATE_HALF) + inside, low)
            tl.store(own + (split * 2 + 1) * (ROWS * GATE_HALF) + inside, high)
            # What other threads of the program have written counts as written when it tells of its end.
            tl.debug_barrier()
            is_last = tl.atomic_add(ended + tile, 1, sem="acq_rel") == SPLITS - 1
            if is_last:
                low, high = tl.zeros([ROWS, GATE_HALF], tl.float32), tl.zeros([ROWS, GATE_HALF], tl.float32)
                for part in tl.static_range(SPLITS):
                    low += tl.load(own + part * (2 * ROWS * GATE_HALF) + inside, cache_modifier=".cg")
                    high += tl.load(own + (part * 2 + 1) * (ROWS * GATE_HALF) + inside, cache_modifier=".cg")
    if is_last:
        if norm is not None:
            total = tl.sum(low * low, 1) + tl.sum(high * high, 1)
            inverse = tl.rsqrt(total / DG + RMS_NORM_EPS)[:, None]
            low *= inverse * tl.load(norm + first, mask=real, other=0.0)[None, :]
            high *= inverse * tl.load(norm + second, mask=real, other=0.0)[None, :]
        if inv_freq is not None:
            length = tl.full([ROWS], 0, tl.int32) + tokens
            if lengths is not None:
                length = tl.load(lengths + row, mask=there, other=1)
            position = tl.maximum(length - 1, 0) // Q_SIZE * Q_SIZE
            c, s = turn(position.to(tl.float32)[:, None] * tl.load(inv_freq + pair, mask=real, other=0.0)[None, :])
            low, high = low * c - high * s, high * c + low * s
            # What rotates has the first channels of all pairs before the second ones, gate keys as well.
            first, second = pair, pair + DG // 2
        place = out + (row.to(tl.int64) * heads + head)[:, None] * DG
        stored = there[:, None] & real[None, :]
        tl.store(place + first[None, :], low, mask=stored)
        tl.store(place + second[None, :], high, mask=stored)
