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

# Rows of a weight that are read at once, and depth of the pipeline of these steps.
DEPTH = 32
STAGES = 4


def refusal(q: Tensor, rotary: Rotary) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    return table_refusal(q[:, :, None], rotary)


def gate_queries(q: Tensor, rotary: Rotary, gate: Gate, lengths: Tensor | None, tokens: int) -> Tensor:
    """See `api.gate_queries`, which validates the arguments."""
    rows, _, dim = q.shape
    config, gate_dim, heads = gate.config, gate.gate_dim, gate.mask_heads
    out = torch.empty(rows, heads, gate_dim, dtype=torch.float32, device=q.device)
    cos, sin, cos_strides, sin_strides, rotation = rotation_of(rotary, q[:, :, None], dim)
    if rows:
        _gate_query[(rows * heads,)](
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
            out,
            heads,
            Q_SIZE=config.q_size,
            MEMBERS=q.shape[1] // heads,
            KINDS=len(config.q_pooling),
            D=dim,
            DEPTH=min(DEPTH, power_of_2(dim)),
            **rotation,
            DG=gate_dim,
            GATE_HALF=max(16, power_of_2(gate_dim // 2)),
            PAIRED=gate.pairing.width,
            ALTERNATING=gate.pairing.interleaved,
            STAGES=STAGES,
            num_warps=8,
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _gate_query(
    q, stride_b, stride_h, cos, stride_cos, sin, stride_sin, weight, norm, inv_freq, lengths, tokens, out, heads,
    Q_SIZE: tl.constexpr, MEMBERS: tl.constexpr, KINDS: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    ROTATED: tl.constexpr, ROTATION: tl.constexpr, COLUMN: tl.constexpr, DG: tl.constexpr, GATE_HALF: tl.constexpr,
    PAIRED: tl.constexpr, ALTERNATING: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query of one head of the gate."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    q += row * stride_b
    cos += row * stride_cos
    sin += row * stride_sin
    pair = tl.arange(0, GATE_HALF)
    real = pair < DG // 2
    first, apart = pair_channels(pair, DG, PAIRED, ALTERNATING)
    second = first + apart
    if weight is None:
        x = q + head.to(tl.int64) * stride_h
        # Channel D is none.
        low = turned_back(x, 0, cos, 0, sin, 0, tl.where(real, first, D), D, ROTATED, ROTATION, COLUMN)
        high = turned_back(x, 0, cos, 0, sin, 0, tl.where(real, second, D), D, ROTATED, ROTATION, COLUMN)
    else:
        PARTS: tl.constexpr = (D + DEPTH - 1) // DEPTH
        low, high = tl.zeros([GATE_HALF], tl.float32), tl.zeros([GATE_HALF], tl.float32)
        weight += head.to(tl.int64) * (MEMBERS * KINDS * D * DG)
        # Told here, as loads that no matrix product takes are not pipelined otherwise.
        for step in tl.range(0, MEMBERS * KINDS * PARTS, num_stages=STAGES):
            # A window of one token is that token, whatever the pooling.
            block = step // PARTS
            channel = step % PARTS * DEPTH + tl.arange(0, DEPTH)
            x = q + (head * MEMBERS + block // KINDS).to(tl.int64) * stride_h
            token = turned_back(x, 0, cos, 0, sin, 0, channel, D, ROTATED, ROTATION, COLUMN)[:, None]
            at = weight + (block * D + channel)[:, None] * DG
            mask = (channel < D)[:, None] & real[None, :]
            low += tl.sum(token * tl.load(at + first[None, :], mask=mask, other=0.0), 0)
            high += tl.sum(token * tl.load(at + second[None, :], mask=mask, other=0.0), 0)
    if norm is not None:
        inverse = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DG + RMS_NORM_EPS)
        low *= inverse * tl.load(norm + first, mask=real, other=0.0)
        high *= inverse * tl.load(norm + second, mask=real, other=0.0)
    if inv_freq is not None:
        length = tokens
        if lengths is not None:
            length = tl.load(lengths + row)
        position = tl.maximum(length - 1, 0) // Q_SIZE * Q_SIZE
        c, s = turn(position.to(tl.float32) * tl.load(inv_freq + pair, mask=real, other=0.0))
        low, high = low * c - high * s, high * c + low * s
        # What rotates has the first channels of all pairs before the second ones, gate keys as well.
        first, second = pair, pair + DG // 2
    out += (row * heads + head) * DG
    tl.store(out + first, low, mask=real)
    tl.store(out + second, high, mask=real)
