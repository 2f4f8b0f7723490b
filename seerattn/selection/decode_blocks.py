"""`DecodeBlocks`: which key blocks the one new token of every sequence attends to, as padded index lists."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seerattn.selection.block_indices import PAD


@functools.lru_cache(maxsize=1024)  # tensors of one number take 10 us of every layer and token
def share_of(number: int, density: float) -> int:
    """How many of ``number`` blocks a density keeps, rounded in fp32 as in `TopK._keep` and in kernels."""
    return math.ceil(float(torch.tensor(float(number)) * density))


@dataclass(frozen=True)
class DecodeBlocks:
    """Key blocks kept for one token of every sequence, for the heads of a KV group together.

    Blocks lie on the absolute grid ``position // block_k``. The token is the last key, so its own block is the last
    one; it is read if it is listed, as far as the sequence goes. Nothing of it is looked at on the host: lists of one
    width make calls of one shape, whatever they hold.

    Args:
        indices: int32 ``[B, HKV, K]``, ascending in each row, right-padded with -1; numbers of blocks that hold a key.
        counts: int32 ``[B, HKV]``, number of valid entries of each row.
        block_k: key block size in tokens.
    """

    indices: Tensor
    counts: Tensor
    block_k: int

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_k: int, width: int | None = None) -> DecodeBlocks:
        """Builds the lists from a bool mask ``[B, HKV, Nk]``, which must keep at most ``width`` blocks of a row.

        Without a width lists have room for all blocks, so that nothing waits for the device.
        """
        if mask.ndim != 3:
            raise ValueError(f"mask must be [B, HKV, Nk], got shape {list(mask.shape)}")
        number = mask.shape[2]
        columns = torch.arange(number, device=mask.device, dtype=torch.int32)
        listed = torch.where(mask, columns, number).sort(-1).values[..., :width]
        indices = torch.where(listed == number, PAD, listed).to(torch.int32).contiguous()
        return cls(indices, mask.sum(-1, dtype=torch.int32), block_k)

    @classmethod
    def dense(cls, lengths: Tensor, *, kv_heads: int, block_k: int, width: int) -> DecodeBlocks:
        """All blocks of sequences of ``lengths [B]`` keys, at most ``width`` each."""
        counts = (lengths + block_k - 1).div(block_k, rounding_mode="floor").to(torch.int32)
        columns = torch.arange(width, device=lengths.device, dtype=torch.int32)
        row = torch.where(columns < counts[:, None], columns, PAD)
        return cls(row[:, None].repeat(1, kv_heads, 1), counts[:, None].repeat(1, kv_heads), block_k)
