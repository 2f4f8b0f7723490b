"""What the kernels that read Q and K share on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seerattn.ops.gate_scores.kernels import pooling

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


POOL_WARPS = 4
POOL_WINDOWS = 16  # that a program pools at a time: one token of each in registers, some steps in flight


def table_refusal(x: Tensor, rotary: Any) -> str | None:
    """Why no kernel can read such vectors, in a sentence; None if one can."""
    if x.dtype not in DTYPES:
        return f"it takes fp16, bf16 or fp32, got {x.dtype}"
    if x.stride(3) != 1:
        return f"it takes vectors whose channels are adjacent, got strides {x.stride()}"
    if x.shape[3] % 2:
        return f"it takes even head dims, got {x.shape[3]}"
    if rotary.cos is not None and (rotary.cos.stride(-1) != 1 or rotary.sin.stride(-1) != 1):
        return "it takes rotary tables whose columns are adjacent"
    return None


def rotation_of(rotary: Any, x: Tensor, dim: int) -> tuple[Tensor, Tensor, tuple, tuple, dict[str, int]]:
    """Tables, their strides over batch and positions, and the constants of the kernels."""
    if rotary.cos is None:
        return x, x, (0, 0), (0, 0), {"ROTATED": 0, "ROTATION": pooling.UNROTATED.value, "COLUMN": 1}
    if rotary.interleaved:
        kind = pooling.INTERLEAVED.value
    else:
        kind = pooling.HALVES.value if rotary.width == dim else pooling.PART_HALVES.value
    strides = [(t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)) for t in (rotary.cos, rotary.sin)]
    return rotary.cos, rotary.sin, *strides, {"ROTATED": rotary.width, "ROTATION": kind, "COLUMN": rotary.column_step}
