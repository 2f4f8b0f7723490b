"""Rotation of gate queries and keys at block positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairing:
    """Which channels of a vector rotate with which, as the base model pairs them.

    Attributes:
        width: leading channels that are rotated, an even number; those after it are paired as halves of their own,
            which the model's frequencies leave as they are.
        interleaved: whether channel ``2 i`` rotates with ``2 i + 1``; otherwise ``i`` with ``i + width / 2``.
    """

    width: int
    interleaved: bool = False

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First and second channels of all pairs of ``x [..., DG]``, each ``[..., DG / 2]``."""
        whole = self.width == x.shape[-1]
        turned = x if whole else x[..., : self.width]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        if whole:
            return first, second
        rest = x[..., self.width :].chunk(2, dim=-1)
        return tuple(torch.cat(parts, dim=-1) for parts in zip((first, second), rest))


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, pairing: Pairing) -> Tensor:
    """Rotates pairs of channels, and puts the first ones of all pairs before the second ones.

    The order is one that queries and keys share, so their products do not see it. Where the model's pairs are halves it
    is that of ``x``. The attention factor of YaRN and LongRoPE is left out: a scale of the gate's scores is its own to
    learn.

    Args:
        x: fp32 ``[B, H, N, DG]``.
        positions: ``[N]``, token positions.
        inv_freq: fp32 ``[DG / 2]``, the base model's frequencies at width ``DG``, one a pair.
        pairing: the base model's pairs at width ``DG``.
    """
    return turn(x, angles(positions, inv_freq), pairing)


def angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """What `turn` takes: of each position ``[N, DG]`` the factors of a vector's channels, and of their partners."""
    angle = positions.to(torch.float32)[:, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def turn(x: Tensor, factors: tuple[Tensor, Tensor], pairing: Pairing) -> Tensor:
    """See `rotate`, by the `angles` of the positions."""
    first, second = pairing.split(x)
    if pairing.interleaved or pairing.width < x.shape[-1]:
        x = torch.cat((first, second), dim=-1)
    return x * factors[0] + torch.cat((second, first), dim=-1) * factors[1]


def block_positions(start: int, windows: int, size: int, device: torch.device) -> Tensor:
    """Position of the first token of each window of the absolute grid, ``[windows]``.

    One rule for training, prefill and decode: a window that a call sees only in part has the position of its own
    first token all the same.
    """
    return (start // size + torch.arange(windows, device=device)) * size
