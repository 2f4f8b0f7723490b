"""Content-relative layout: left padding stripped, tokens laid on the absolute block grid.

Batch row ``b`` keeps its last ``length[b]`` tokens of an axis and writes them from slot ``offset[b]`` on. Every other
slot is zero, so whatever stands in the padding of an input (NaN included) never enters a product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_grid(x: Tensor, *, offset: list[int], length: list[int], size: int) -> Tensor:
    """Moves the tokens of ``x [B, h, n, D]`` to ``[B, h, size, D]``; a view where nothing moves."""
    n = x.shape[2]
    if set(offset) == {0} and set(length) == {n} and size == n:
        return x
    rows = [
        F.pad(x[b, :, n - count :], (0, 0, start, size - start - count))
        for b, (start, count) in enumerate(zip(offset, length))
    ]
    return torch.stack(rows)


def from_grid(x: Tensor, *, offset: list[int], length: list[int], size: int, fill: float = 0.0) -> Tensor:
    """The inverse: ``x [B, h, slots, ...]`` to ``[B, h, size, ...]``, padding positions filled with ``fill``."""
    if set(length) == {size} and len(set(offset)) == 1:
        return x[:, :, offset[0] : offset[0] + size]
    trailing = (0, 0) * (x.ndim - 3)
    rows = [
        F.pad(x[b, :, start : start + count], (*trailing, size - count, 0), value=fill)
        for b, (start, count) in enumerate(zip(offset, length))
    ]
    return torch.stack(rows)
