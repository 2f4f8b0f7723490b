"""XAttention: blocks by sums along antidiagonals (arXiv 2503.16428, section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import BlockIndices, forced_block_mask, num_query_blocks
from seerattn.selection.map_form import MASS
from seerattn.selection.policies import Setting
from seerattn.selection.selector import AttentionContext

METHOD = "xattention_profile"  # of plans

# Scores held at once, in elements; one row of query blocks at least.
STRIP_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class XAttentionSelector:
    """The best blocks of each row until they hold a share of the estimated attention: threshold block selection.

    See `antidiagonal_scores` for the estimate. Block 0 and the diagonal are always kept; others follow by descending
    score while what is kept holds less than ``threshold`` of the row's sum. A threshold of 1 keeps every block, which
    rounding of the sum would not. Whole blocks are scored and kept, so nothing is covered beyond what was chosen.
    Left out are the soft cap, which does not apply to sums of logits, and sinks, which the estimate does not know.

    Attributes:
        threshold: share of a row's mass, tau, in [0, 1]; one number, or a list by layer and query head as
            `minimum_thresholds` finds them. The authors recommend 0.9 to 0.95.
        stride: spacing of the antidiagonals in tokens, 8 or 16 in the paper; divides ``block``.
        block: query and key block size in tokens.
    """

    threshold: Setting = 0.9
    stride: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        _check_stride(self.stride, self.block)
        shared = isinstance(self.threshold, (int, float))
        for value in [self.threshold] if shared else [value for layer in self.threshold for value in layer]:
            if not 0 <= value <= 1:
                raise ValueError(f"threshold must be in [0, 1], got {value}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`.

        Raises:
            ValueError: there are thresholds by layer and head, and not one for each head of this layer.
        """
        scores = antidiagonal_scores(q, k, stride=self.stride, block=self.block, scale=context.scale)
        q_len, start = q.shape[2], k.shape[2] - q.shape[2]
        forced = forced_block_mask(start, q_len, *scores.shape[2:], self.block, self.block, device=q.device)
        threshold = self._at_layer(context.layer, scores)
        order = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        mass = scores.gather(-1, order)
        before = mass.cumsum(-1) - mass
        wanted = (before < threshold * mass.sum(-1, keepdim=True)) | (threshold >= 1)
        mask = torch.zeros_like(wanted).scatter_(-1, order, wanted) | forced
        return BlockIndices.from_mask(mask, block_q=self.block, block_k=self.block, q_start=start, q_len=q_len)

    def _at_layer(self, layer: int, scores: Tensor) -> float | Tensor:
        """The threshold of a layer, or ``[H, 1, 1]``."""
        if isinstance(self.threshold, (int, float)):
            return self.threshold
        values = self.threshold[layer]
        if len(values) != scores.shape[1]:
            raise ValueError(f"threshold must have {scores.shape[1]} values a layer, got {len(values)}")
        return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None, None]


def antidiagonal_scores(q: Tensor, k: Tensor, *, stride: int, block: int, scale: float) -> Tensor:
    """Estimated attention mass of every block: importance prediction.

    Groups of ``stride`` keys are concatenated to one vector, groups of queries too but in reverse, so that a product
    is the sum of logits along an antidiagonal of a ``stride`` x ``stride`` tile. Over these products, divided by
    ``stride``, runs a causal softmax in fp32; a block's score is the sum of its tiles.

    Groups lie on the absolute grid. A group that the call or the text cuts has zeros for what is missing, and a group
    without a query counts for nothing; so a chunk that starts on a block boundary scores as one shot would, and
    elsewhere only the first query block differs.

    Args:
        q: ``[B, H, T, D]``; the last query is the last key.
        k: ``[B, HKV, S, D]``, ``T <= S``.
        stride: tokens of a group; divides ``block``.
        block: query and key block size in tokens.
        scale: factor of q.k.

    Returns:
        fp32 ``[B, H, Nq, Nk]``, zero beyond the causal edge; a row sums to its number of query groups.
    """
    _check_stride(stride, block)
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1:3]
    start = k_len - q_len
    rows, columns, per_block = num_query_blocks(start, q_len, block), -(-k_len // block), block // stride
    first = start // block
    queries = F.pad(q, (0, 0, start % block, -k_len % block)).float().unflatten(2, (-1, stride)).flip(3).flatten(3)
    queries = (queries * (scale / stride)).view(batch, kv_heads, heads // kv_heads, rows, per_block, -1)
    keys = F.pad(k, (0, 0, 0, -k_len % block)).float().unflatten(2, (-1, stride)).flatten(3).mT
    q_group = first * per_block + torch.arange(rows * per_block, device=q.device)
    k_group = torch.arange(columns * per_block, device=q.device)
    empty = (q_group < start // stride) | (q_group > (k_len - 1) // stride)

    scores = torch.zeros(batch, heads, rows, columns, device=q.device)
    for strip in _strips(rows, batch * heads * per_block * columns * per_block, q.device):
        groups = slice(strip.start * per_block, strip.stop * per_block)
        edge = first + strip.stop
        logits = queries[:, :, :, strip].flatten(2, 4) @ keys[..., : edge * per_block]
        logits = logits.view(batch, heads, -1, edge * per_block)
        logits.masked_fill_(k_group[: edge * per_block] > q_group[groups, None], -torch.inf)
        p = logits.softmax(-1).masked_fill_(empty[groups, None], 0)
        scores[:, :, strip, :edge] = p.view(batch, heads, -1, per_block, edge, per_block).sum((3, 5))
    return scores


@torch.no_grad()
def minimum_thresholds(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    stride: int = 16,
    block: int = 128,
    coverage: float = 0.9,
) -> Tensor:
    """Thresholds by head from the true attention of sample texts, as the released profiling finds them.

    In every row the fewest blocks that hold ``coverage`` of the true mass are found; the threshold of a head is the
    share of the estimate in blocks that score at least as much as the lowest of them. The search of the
    paper, minimum threshold prediction, which lowers thresholds head by head, was never released and is not here.

    Args:
        q: ``[B, H, T, D]`` after RoPE, a text a row.
        k: ``[B, HKV, S, D]``.
        scale: factor of q.k.
        softcap: soft cap of the true logits.
        sinks: ``[H]`` logits of one more key in the true attention.
        stride: of the selector that will use them.
        block: of the selector that will use them.
        coverage: share of the true mass, in (0, 1].

    Returns:
        fp32 ``[H]``, the largest over the texts; over several calls take the largest again.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    scores = antidiagonal_scores(q, k, stride=stride, block=block, scale=scale)
    logits = {"scale": scale, "softcap": softcap, "sinks": sinks}
    true = attention_map(q, k, form=MASS, block_q=block, block_k=block, **logits).map
    mass, order = true.sort(dim=-1, descending=True, stable=True)
    needed = mass.cumsum(-1) - mass < coverage * mass.sum(-1, keepdim=True)
    lowest = scores.gather(-1, order).masked_fill(~needed, torch.inf).amin(-1, keepdim=True)
    kept = torch.where(scores >= lowest, scores, 0)
    return (kept.sum((-1, -2)) / scores.sum((-1, -2))).amax(0)


def _strips(rows: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Runs of query blocks whose scores, ``elements`` a query block, fit the budget."""
    step = max(1, STRIP_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // elements)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _check_stride(stride: int, block: int) -> None:
    if stride < 1 or block % stride:
        raise ValueError(f"stride must divide the block of {block} tokens, got {stride}")
