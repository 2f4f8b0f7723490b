"""Pooling of token vectors into sub-blocks on the absolute grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pooled:
    """Queries or keys as a gate takes them: windows of the absolute grid, pooled.

    A pooling that learns cannot be done beforehand: such a gate takes single tokens, windows of size 1, and pools them
    itself.

    Attributes:
        features: fp32 ``[B, h, W, kinds * D]``; ``[B, h, W, D]`` of single tokens.
        size: window length in tokens.
        start: position of the first token.
        length: number of tokens.
        inv_freq: fp32 ``[DG / 2]``, frequencies of the call at the width of the gate, where the model changes its own
            with the length of a call; None are those that the gate was made with.
    """

    features: Tensor
    size: int
    start: int
    length: int
    inv_freq: Tensor | None = None

    def cut(self, rows: slice, begin: int, end: int) -> Pooled:
        """Tokens ``begin .. end`` of batch rows, as texts of their own; both on window boundaries or at an end."""
        windows = slice(begin // self.size, -(-end // self.size))
        return Pooled(self.features[rows, :, windows], self.size, 0, end - begin, self.inv_freq)


def pool_blocks(x: Tensor, *, size: int, start: int, kinds: tuple[str, ...], salience: Tensor | None = None) -> Tensor:
    """Pools windows of ``size`` tokens; the first and the last window may be partial and count real tokens only.

    Args:
        x: ``[B, H, N, D]``, the tokens at positions ``start .. start + N``.
        size: window length in tokens; windows are ``position // size``.
        start: position of the first token.
        kinds: which of "avg", "max", "min" and "salient", in the order of their concatenation.
        salience: ``[H, D]``, for "salient": a token weighs the softmax over its window of its product with it.

    Returns:
        fp32 ``[B, H, W, len(kinds) * D]``, one vector a window that holds at least one token.
    """
    batch, heads, length, dim = x.shape
    if size == 1 and not torch.is_grad_enabled():
        # A window of one token is that token, whatever the pooling; what is learned gets its gradient below.
        return x.float() if len(kinds) == 1 else x.float().repeat(1, 1, 1, len(kinds))
    head = start % size
    tail = -(head + length) % size
    windows = (head + length + tail) // size
    x = x.float()

    def framed(fill: float) -> Tensor:
        padded = F.pad(x, (0, 0, head, tail), value=fill) if head or tail else x
        return padded.view(batch, heads, windows, size, dim)

    def average() -> Tensor:
        if not (head or tail):
            return framed(0.0).mean(3)
        count = torch.full((windows,), size, dtype=torch.float32, device=x.device)
        count[0] -= head
        count[-1] -= tail
        return framed(0.0).sum(3) / count[:, None]

    def salient() -> Tensor:
        # [B, H, N], padding weighs nothing.
        logits = F.pad((x @ salience[:, :, None]).squeeze(-1), (head, tail), value=-torch.inf)
        weights = logits.view(batch, heads, windows, 1, size).softmax(-1)
        return (weights @ framed(0.0)).squeeze(3)

    pooled = {
        "avg": average,
        "max": lambda: framed(-torch.inf).amax(3),
        "min": lambda: framed(torch.inf).amin(3),
        "salient": salient,
    }
    return torch.cat([pooled[kind]() for kind in kinds], dim=-1)
