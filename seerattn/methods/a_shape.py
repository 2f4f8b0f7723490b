"""A-shape: first tokens and a window of recent ones (MInference, arXiv 2407.02490, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seerattn.methods.method import Method, SelectorAt, Selectors
from seerattn.options import option
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.selector import AttentionContext

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

# The longest window that tuning tries, in tokens: longer than any context.
LONGEST = 1 << 21


@dataclass(frozen=True)
class ShapeSelector:
    """First tokens, a window of recent tokens and, for a tri-shape, dense last rows.

    Query ``i`` keeps key ``j`` if ``j < n_init`` or ``i - j < n_local``, and every key if it is one of the last
    ``n_last`` queries of the call; a block is computed if it holds a kept pair. What a block holds beyond them is
    computed as well: up to ``block_k`` columns beside the first tokens, up to ``block_q + block_k`` offsets beside the
    window, up to ``block_q`` rows above the last ones. At 4k an A-shape with a window of 256 tokens computes 1.15
    times its pairs, one with 1024 tokens 1.04 times.

    Attributes:
        n_local: tokens of the window, the query itself included; MInference's own shape has 3968.
        n_init: first tokens that every query keeps.
        n_last: dense query rows at the end, 0 for an A-shape. As they are counted from the end of a call, every chunk
            of a prompt has its own.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    n_local: int = 3968
    n_init: int = 128
    n_last: int = 0
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        for name, least in (("n_local", 1), ("n_init", 0), ("n_last", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        return _lists(self, q.shape[0], k.shape[1], k.shape[2] - q.shape[2], q.shape[2], q.device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _lists(
    selector: ShapeSelector, batch: int, heads: int, start: int, q_len: int, device: torch.device
) -> BlockIndices:
    """Lists of all layers and inputs of these lengths; made once, since nothing in them depends on what tokens hold."""
    block_q, block_k, end = selector.block_q, selector.block_k, start + q_len
    rows = start // block_q + torch.arange(num_query_blocks(start, q_len, block_q), device=device)
    first_query = (rows * block_q).clamp(min=start)[:, None]
    last_query = ((rows + 1) * block_q).clamp(max=end)[:, None] - 1
    first_key = torch.arange(-(-end // block_k), device=device) * block_k
    nearest = first_query - (first_key + block_k - 1)
    mask = (first_key < selector.n_init) | (nearest < selector.n_local) | (last_query >= end - selector.n_last)
    mask = mask.expand(batch, heads, -1, -1)
    return BlockIndices.from_mask(mask, block_q=block_q, block_k=block_k, q_start=start, q_len=q_len)


@dataclass(frozen=True, kw_only=True)
class AShape(Method):
    """A-shape; its setting is ``n_local`` in tokens.

    ``n_init`` stays at 128, that of MInference's stand-alone A-shape; its search also tries 100 and 1024.
    """

    id = "a_shape"
    title = "A-shape"
    kind = "static"

    n_init: int = option(128, help="First tokens that every query keeps.", low=0)
    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)

    @property
    def n_last(self) -> int:
        """Dense query rows at the end."""
        return 0

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"n_last": self.n_last}

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        def at(n_local: float) -> SelectorAt:
            selector = ShapeSelector(round(n_local), self.n_init, self.n_last, self.block_q, self.block_k)
            return lambda layer: selector

        return Selectors(at, 1, LONGEST, scale="log", settings=self.settings())
