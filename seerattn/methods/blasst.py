"""BLASST: blocks whose scores are negligible beside the running maximum of the online softmax (arXiv 2512.12087)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seerattn.methods.method import Budget, Method, SelectorAt, Selectors
from seerattn.options import option
from seerattn.selection.block_indices import (
    BlockIndices,
    causal_block_mask,
    check_skip_threshold,
    forced_block_mask,
    num_query_blocks,
)
from seerattn.selection.selector import AttentionContext

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

# Logits held at once.
_STRIP_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class BlasstSelector:
    """Blocks that a threshold on the online softmax would not skip.

    FlashAttention walks the key blocks of a query block in order and keeps the largest score that each query has met.
    A block is skipped where every query's largest score in it, less the largest that the query has met so far, that
    block included, is below ``log(threshold)``: its probabilities would be below the threshold, beside one that is
    there already. The published kernel has computed the scores by then and saves softmax, values and their product.
    Here the rule makes lists, in a pass of its own over all scores, so that it can be compared at equal density; its
    time is that of both. Blocks are walked from the first to the last. The first block and the diagonal are kept.
    `SkippingSelector` leaves the same blocks out as the published kernel does.

    Attributes:
        threshold: in (0, 1]; published are thresholds that fall as one over the length of the prompt.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    threshold: float
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        q_len, k_len, sizes = q.shape[2], k.shape[2], (self.block_q, self.block_k)
        start = k_len - q_len
        geometry = (start, q_len, num_query_blocks(start, q_len, self.block_q), -(-k_len // self.block_k), *sizes)
        causal = causal_block_mask(*geometry, device=q.device)[0]
        forced = forced_block_mask(*geometry, sink_blocks=1, device=q.device)[0]
        reach = largest_excess(q, k, context, block_q=self.block_q, block_k=self.block_k)
        mask = (reach >= math.log(self.threshold)) | forced
        return BlockIndices.from_mask(
            mask & causal, block_q=self.block_q, block_k=self.block_k, q_start=start, q_len=q_len
        )


@dataclass(frozen=True)
class SkippingSelector:
    """Every causal block, of which attention computes those of `BlasstSelector` in full.

    The others end at their scores, so nothing is computed twice; lists and density are those of dense attention.

    Attributes:
        threshold: as of `BlasstSelector`.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    threshold: float
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        check_skip_threshold(self.threshold)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        every = _every_block(q.shape[0], k.shape[1], q.shape[2], k.shape[2], self.block_q, self.block_k, q.device)
        return replace(every, skip_threshold=self.threshold)


# Layer after layer asks for the same.
@lru_cache(maxsize=2)
def _every_block(
    batch: int, heads: int, q_len: int, k_len: int, block_q: int, block_k: int, device: torch.device
) -> BlockIndices:
    sizes = {"block_q": block_q, "block_k": block_k}
    return BlockIndices.dense(batch=batch, heads=heads, q_len=q_len, k_len=k_len, device=device, **sizes)


def largest_excess(q: Tensor, k: Tensor, context: AttentionContext, *, block_q: int, block_k: int) -> Tensor:
    """How near a block comes to what was met before it, fp32 ``[B, H, Nq, Nk]``; -inf where nothing is causal.

    Of each query, its largest score in the block less the largest in all blocks up to that one; of a query block, the
    largest of its queries. A sink is met before all keys.
    """
    batch, heads, q_len = q.shape[:3]
    k_len, kv_heads = k.shape[2], k.shape[1]
    start, columns = k_len - q_len, -(-k.shape[2] // block_k)
    places = torch.arange(start, k_len, device=q.device)
    first, last = start // block_q, (k_len - 1) // block_q
    rows = last - first + 1
    found = torch.full((batch, heads, rows, columns), -torch.inf, device=q.device)
    grouped = (q * context.scale).unflatten(1, (kv_heads, -1))
    at_once = max(1, _STRIP_ELEMENTS["cpu" if q.device.type == "cpu" else "cuda"] // (batch * heads * block_q * k_len))
    sinks = None if context.sinks is None else context.sinks.float().view(1, kv_heads, -1, 1)
    for begin in range(0, rows, at_once):
        low = max((first + begin) * block_q - start, 0)
        high = min((first + min(begin + at_once, rows)) * block_q - start, q_len)
        strip = grouped[:, :, :, low:high]
        logits = (strip.flatten(2, 3) @ k.mT).float().unflatten(2, strip.shape[2:4])
        if context.softcap is not None:
            logits = context.softcap * torch.tanh(logits / context.softcap)
        future = torch.arange(k_len, device=q.device) > places[low:high, None]
        logits = logits.masked_fill(future, -torch.inf)
        logits = torch.nn.functional.pad(logits, (0, columns * block_k - k_len), value=-torch.inf)
        largest = logits.unflatten(-1, (columns, block_k)).amax(-1)
        met = largest.cummax(-1).values
        if sinks is not None:
            met = torch.maximum(met, sinks[..., None])
        # A query that has met nothing has nothing in the block either.
        excess = (largest - met).nan_to_num(-torch.inf, neginf=-torch.inf).flatten(1, 2)
        block_of = places[low:high] // block_q - first
        found.scatter_reduce_(2, block_of[:, None].expand_as(excess), excess, "amax")
    return found


@dataclass(frozen=True, kw_only=True)
class Blasst(Method):
    """BLASST; its setting is the threshold.

    With `kernel` attention skips as it goes, as the published method does, and the blocks are the same. Its density is
    that of dense attention then, whose scores it all computes, so it runs at equal time alone.
    """

    id = "blasst"
    title = "BLASST"
    kind = "training-free"

    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)
    kernel: bool = option(False, help="Skip inside attention, for measurements at equal time.")

    @property
    def default_name(self) -> str:
        return f"{self.id}-kernel" if self.kernel else self.id

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return ("time",) if self.kernel else super().budgets

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        def at(threshold: float) -> SelectorAt:
            kind = SkippingSelector if self.kernel else BlasstSelector
            selector = kind(threshold, self.block_q, self.block_k)
            return lambda layer: selector

        return Selectors(at, 1.0, 1e-38, scale="log", settings=self.settings())

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`; lists of their own go without saying, as in records from before there was a choice."""
        values = super().settings()
        return values if self.kernel else {name: value for name, value in values.items() if name != "kernel"}
