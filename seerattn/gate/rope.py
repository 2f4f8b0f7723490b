"""Rotation of gate queries and keys at block positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotates the halves of ``x`` as the Llama family does (pairs ``(i, i + DG / 2)``).

    The attention factor of YaRN and LongRoPE is left out: a scale of the gate's scores is its own to learn.

    Args:
        x: fp32 ``[B, H, N, DG]``.
        positions: ``[N]``, token positions.
        inv_freq: fp32 ``[DG / 2]``, the base model's frequencies at width ``DG``.
    """
    angle = positions.to(torch.float32)[:, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def block_positions(start: int, windows: int, size: int, device: torch.device) -> Tensor:
    """Position of the first token of each window of the absolute grid, ``[windows]``.

    One rule for training, prefill and decode: a window that a call sees only in part has the position of its own
    first token all the same.
    """
    return (start // size + torch.arange(windows, device=device)) * size
