"""`impl="triton"` of `pool_windows`: un-rotation and pooling in one read."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattn.ops.gate_scores.api import Rotary
from seerattn.ops.gate_scores.kernels.launch import POOL_WARPS, POOL_WINDOWS, rotation_of, table_refusal
from seerattn.ops.gate_scores.kernels.pooling import pool_kernel
from seerattn.ops.launch import power_of_2

# Tokens of each window that are read at once, and depth of the pipeline of these steps; alternatives were not timed.
STEP = 1
STAGES = 5


def refusal(x: Tensor, rotary: Rotary) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    return table_refusal(x, rotary)


def pool_windows(
    x: Tensor, *, size: int, start: int, kinds: tuple[str, ...], rotary: Rotary, salience: Tensor | None = None
) -> Tensor:
    """See `api.pool_windows`."""
    batch, heads, length, dim = x.shape
    windows = (start + length - 1) // size - start // size + 1
    out = torch.empty(batch, heads, windows, len(kinds) * dim, dtype=torch.float32, device=x.device)
    cos, sin, cos_strides, sin_strides, rotation = rotation_of(rotary, x, dim)
    pool_kernel[(batch * heads * -(-windows // POOL_WINDOWS),)](
        x,
        *x.stride()[:3],
        start,
        cos,
        *cos_strides,
        sin,
        *sin_strides,
        out if salience is None else salience.contiguous(),
        out,
        heads,
        length,
        windows,
        M=POOL_WINDOWS,
        SIZE=size,
        STEP=min(STEP, size),
        D=dim,
        HALF=max(16, power_of_2(dim // 2)),
        **rotation,
        KINDS=kinds,
        STAGES=STAGES,
        num_warps=POOL_WARPS,
    )
    return out
