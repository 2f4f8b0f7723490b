"""Prism: mean-pooled scores of high and low rotation frequencies apart, each at a temperature of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.gate.pooling import pool_blocks
from seerattn.methods.method import Method, SelectorAt, Selectors
from seerattn.options import option
from seerattn.selection.block_indices import (
    BlockIndices,
    causal_block_mask,
    forced_block_mask,
    num_query_blocks,
)
from seerattn.selection.selector import AttentionContext, RotaryTables

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

_EPS = 1e-6


@dataclass(frozen=True)
class PrismSelector:
    """Blocks that hold a share ``p`` of a softmax over mean-pooled scores, in either of two bands (arXiv 2602.08426).

    A mean over rotated vectors cancels channels that turn fast, so that pooled scores do not see what depends on the
    distance. So channels are taken apart: the fastest half of them, and the slowest three quarters, the shares that are
    published for heads of 128. In each band, scores are divided by the root of its width and by a temperature: the root
    of its share of the channels, times how large queries and keys are there beside all channels, as root mean squares
    over the blocks of a head. The smallest set of blocks that reaches ``p`` in one band, and that of the other, are
    kept together, the first block and the diagonal as well.

    Means are over the tokens that a block has; the published code pads with zeros. Channels that are not rotated are
    the slowest. Soft cap and sinks do not act on pooled scores.

    Attributes:
        p: share to reach in each band, in [0, 1]; 1 keeps every block.
        block: query and key block size in tokens; published is 128.
        sink_blocks: first key blocks that every row keeps.
    """

    p: float = 0.95
    block: int = 128
    sink_blocks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be in [0, 1], got {self.p}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        block, q_len, k_len = self.block, q.shape[2], k.shape[2]
        start = k_len - q_len
        geometry = (start, q_len, num_query_blocks(start, q_len, block), -(-k_len // block), block, block)
        causal = causal_block_mask(*geometry, device=q.device)[0]
        mask = forced_block_mask(*geometry, sink_blocks=self.sink_blocks, device=q.device)[0]
        for scores in band_scores(q, k, block=block, rotary=context.rotary):
            share, order = (
                scores.masked_fill(~causal, -torch.inf).softmax(-1).sort(dim=-1, descending=True, stable=True)
            )
            within = (share.cumsum(-1) - share < self.p) | (self.p >= 1)
            mask = mask | torch.zeros_like(within).scatter_(-1, order, within)
        return BlockIndices.from_mask(mask & causal, block_q=block, block_k=block, q_start=start, q_len=q_len)


def band_scores(q: Tensor, k: Tensor, *, block: int, rotary: RotaryTables | None) -> tuple[Tensor, Tensor]:
    """Scores of the fast and of the slow band, fp32 ``[B, H, Nq, Nk]``, also where nothing is causal.

    Args:
        q: post-RoPE ``[B, H, T, D]``; the last query is the last key.
        k: post-RoPE ``[B, HKV, S, D]``.
        block: block size in tokens.
        rotary: which channels are rotated together; None is channel ``i`` with ``i + D / 2``.
    """
    heads, dim = q.shape[1], q.shape[3]
    mean_q = pool_blocks(q, size=block, start=k.shape[2] - q.shape[2], kinds=("avg",))
    mean_k = pool_blocks(k, size=block, start=0, kinds=("avg",)).repeat_interleave(heads // k.shape[1], dim=1)
    order = channels_by_frequency(dim, rotary)
    size_q, size_k = _size(mean_q), _size(mean_k)
    found = []
    for channels in (order[: dim // 2], order[dim // 4 :]):
        band_q, band_k = mean_q[..., channels], mean_k[..., channels]
        share = len(channels) / dim
        temperature = math.sqrt(share) * (_size(band_q) / size_q) * (_size(band_k) / size_k)
        found.append(band_q @ band_k.mT / (math.sqrt(len(channels)) * temperature))
    return found[0], found[1]


def channels_by_frequency(dim: int, rotary: RotaryTables | None) -> list[int]:
    """The channels of a head from the fastest rotation to the slowest; those that are not rotated come last."""
    width = dim if rotary is None or rotary.width == 0 else rotary.width
    if rotary is not None and rotary.interleaved:
        pairs = [(2 * i, 2 * i + 1) for i in range(width // 2)]
    else:
        pairs = [(i, i + width // 2) for i in range(width // 2)]
    return [*(channel for pair in pairs for channel in pair), *range(width, dim)]


def _size(x: Tensor) -> Tensor:
    """Root mean square over blocks and channels, ``[B, H, 1, 1]``."""
    return x.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=_EPS)


@dataclass(frozen=True, kw_only=True)
class Prism(Method):
    """Prism; its setting is ``p`` of both bands."""

    id = "prism"
    title = "Prism"
    kind = "training-free"

    block: int = option(128, help="Block size in tokens.", low=1)
    sink_blocks: int = option(1, help="First key blocks that every row keeps.", low=0)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block, self.block

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        def at(p: float) -> SelectorAt:
            selector = PrismSelector(p, self.block, self.sink_blocks)
            return lambda layer: selector

        return Selectors(at, 0.0, 1.0, settings=self.settings())
