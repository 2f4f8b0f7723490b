"""MInference: one of three patterns for every head, with sizes that an offline search fixed (arXiv 2407.02490)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from seerattn.methods.lines import keep_best, last_query_scores, lines_to_blocks
from seerattn.methods.mean_pooled import mean_pooled_scores
from seerattn.selection.block_indices import BlockIndices, causal_block_mask, forced_block_mask, num_query_blocks
from seerattn.selection.selector import AttentionContext

Pattern = Literal["a_shape", "vertical_slash", "block_sparse"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

# The official kernel: columns and offsets that vertical-slash heads keep whatever their score, the least sizes that it
# accepts, and the 100 blocks of 64 that block-sparse heads keep whatever the plan says.
FORCED_COLUMNS, FORCED_OFFSETS = 30, 100
LEAST_COLUMNS, LEAST_OFFSETS = 30, 50
BLOCK_SPARSE_TOKENS = 6400


@dataclass(frozen=True)
class HeadRule:
    """The pattern of one head and its sizes (section 3.1).

    Attributes:
        pattern: "a_shape" keeps the first ``columns`` keys and the ``offsets`` keys that end at each query;
            "vertical_slash" keeps the best columns and the best offsets; "block_sparse" the best blocks of each row.
        columns: number of columns.
        offsets: number of offsets.
        tokens: keys in the blocks of a row.
        scale: a factor on all sizes, which a search fits to its budget.
    """

    pattern: Pattern
    columns: int = 0
    offsets: int = 0
    tokens: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        used = ("tokens",) if self.pattern == "block_sparse" else ("columns", "offsets")
        for name in ("columns", "offsets", "tokens"):
            size = getattr(self, name)
            if not isinstance(size, int) or (size < 1 if name in used else size != 0):
                contract = "a whole number of at least 1" if name in used else "left out"
                raise ValueError(f"{name} of {self.pattern} must be {contract}, got {size!r}")
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be above 0 and finite, got {self.scale!r}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without what says nothing."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadRule:
        """Inverse of `to_dict`.

        Raises:
            ValueError: fields that a rule does not have, or sizes that it cannot have.
        """
        if "pattern" not in values or set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"a rule must have a pattern, columns, offsets, tokens and scale alone, got {values}")
        return cls(**values)

    def lines(self, factor: float) -> tuple[int, int, int, int]:
        """How many columns are kept, how many of them as the first ones; offsets, and the nearest ones of them.

        Under a factor below 1 the forced lines shrink with the rest, so that low densities can be reached; above 1 only
        the others grow. A larger factor keeps all lines of a smaller one.
        """
        factor *= self.scale
        if self.pattern == "block_sparse":
            return 0, 0, 0, 0
        if self.pattern == "a_shape":
            first, recent = math.ceil(self.columns * factor), math.ceil(self.offsets * factor)
            return first, first, recent, recent
        columns = _scaled(max(self.columns, LEAST_COLUMNS), FORCED_COLUMNS, factor)
        return columns + _scaled(max(self.offsets, LEAST_OFFSETS), FORCED_OFFSETS, factor)

    def blocks(self, factor: float, block_k: int) -> int:
        """How many blocks of a row are kept by score."""
        return math.ceil(self.tokens * self.scale * factor / block_k)


def _scaled(size: int, forced: int, factor: float) -> tuple[int, int]:
    forced = min(forced, size)
    if factor > 1:
        return math.floor(size * factor), forced
    first = math.ceil(forced * factor)
    return first + math.floor((size - forced) * factor), first


@dataclass(frozen=True, eq=False)
class Estimate:
    """What the patterns of a call are chosen from, so that a search can try many sizes on it.

    Attributes:
        vertical: scores of columns, fp32 ``[B, H, S]``, see `last_query_scores`.
        slash: scores of offsets, fp32 ``[B, H, S]``.
        pooled: scores of blocks, fp32 ``[B, H, Nq, Nk]``, see `mean_pooled_scores`.
        causal: bool ``[Nq, Nk]``.
        diagonal: bool ``[Nq, Nk]``.
        shape: ``B, H, T, S``.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    vertical: Tensor | None
    slash: Tensor | None
    pooled: Tensor | None
    causal: Tensor
    diagonal: Tensor
    shape: tuple[int, int, int, int]
    block_q: int
    block_k: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        context: AttentionContext,
        *,
        block_q: int,
        block_k: int,
        patterns: Collection[str] = PATTERNS,
    ) -> Estimate:
        """Looks at a call.

        Args:
            q: post-RoPE ``[B, H, T, D]``; the last query is the last key.
            k: post-RoPE ``[B, HKV, S, D]``.
            context: facts about the layer.
            block_q: query block size in tokens.
            block_k: key block size in tokens.
            patterns: those that will be asked for.
        """
        vertical = slash = pooled = None
        if "vertical_slash" in patterns:
            vertical, slash = last_query_scores(q, k, context)
        if "block_sparse" in patterns:
            pooled = mean_pooled_scores(q, k, block_q=block_q, block_k=block_k)
        q_len, k_len = q.shape[2], k.shape[2]
        start = k_len - q_len
        geometry = (start, q_len, num_query_blocks(start, q_len, block_q), -(-k_len // block_k), block_q, block_k)
        causal = causal_block_mask(*geometry, device=q.device)[0]
        diagonal = forced_block_mask(*geometry, sink_blocks=0, device=q.device)[0]
        return cls(vertical, slash, pooled, causal, diagonal, (*q.shape[:3], k_len), block_q, block_k)

    def lines(self, rules: Sequence[HeadRule], factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Columns and offsets of A-shape and vertical-slash heads, bool ``[B, H, S]``; none of block-sparse heads."""
        columns, first, offsets, nearest = zip(*(rule.lines(factor) for rule in rules))
        return self._best(self.vertical, columns, first), self._best(self.slash, offsets, nearest)

    def _best(self, scores: Tensor | None, count: Sequence[int], forced: Sequence[int]) -> Tensor:
        batch, heads, _, k_len = self.shape
        device = self.causal.device
        first = torch.arange(k_len, device=device) < torch.tensor(forced, device=device)[:, None]
        if scores is None:
            return first.expand(batch, heads, k_len)
        return keep_best(scores.masked_fill(first, torch.inf), torch.tensor(count, device=device))

    def mask(self, rules: Sequence[HeadRule], factor: float = 1.0) -> Tensor:
        """The causal blocks that the heads keep, the diagonal among them: bool ``[B, H, Nq, Nk]``."""
        batch, heads, q_len, _ = self.shape
        mask = self.diagonal.expand(batch, heads, -1, -1)
        kinds = {rule.pattern for rule in rules}
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        if kinds != {"block_sparse"}:
            mask = mask | lines_to_blocks(*self.lines(rules, factor), q_len=q_len, **sizes)
        if "block_sparse" in kinds:
            scores = self.pooled.masked_fill(~self.causal, -torch.inf).masked_fill(self.diagonal, torch.inf)
            count = torch.tensor([rule.blocks(factor, self.block_k) for rule in rules], device=scores.device)
            mask = mask | keep_best(scores, count)
        return mask & self.causal


@dataclass(frozen=True)
class PatternSelector:
    """A-shape, vertical-slash and block-sparse heads (arXiv 2407.02490, section 3.2, and its repository).

    Vertical-slash heads score columns and offsets by the attention of the last 64 queries of the call and force the
    first 30 columns and the nearest 100 offsets; block-sparse heads score blocks by mean-pooled queries and keys. In a
    prompt that comes in chunks, each chunk is chosen for from its own last queries.

    Lines are one token wide and blocks are not, so that sizes cost more than their lines. At 8k tokens of English books
    on the reference model, (1000, 6096) times 1/32 has .043 of the causal pairs on its lines. Query blocks of 64 alone,
    which the official kernel has as well, make that .178; key blocks, in place of its gathered columns and unaligned
    diagonals, make it .194, .210 or .235 with 16, 32 or 64 tokens. At 2k tokens: .158, .477 and .512, .543 or .594.

    Attributes:
        rules: for each query head of the layer, or one for all heads.
        factor: on all sizes.
        block_q: query block size in tokens.
        block_k: key block size in tokens; finer blocks cover less beside the lines.
    """

    rules: tuple[HeadRule, ...]
    factor: float = 1.0
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        if not self.rules or not 0 < self.factor < math.inf:
            raise ValueError(
                f"rules and factor must be one rule at least and above 0, got {len(self.rules)} and {self.factor}"
            )

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`.

        Raises:
            ValueError: there are rules for another number of heads.
        """
        heads = q.shape[1]
        rules = self.rules * heads if len(self.rules) == 1 else self.rules
        if len(rules) != heads:
            raise ValueError(
                f"rules must be one for each of the {heads} query heads of layer {context.layer}, or one for all, "
                f"got {len(rules)}; use the plan of this model"
            )
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        estimate = Estimate.of(q, k, context, **sizes, patterns={rule.pattern for rule in rules})
        mask = estimate.mask(rules, self.factor)
        return BlockIndices.from_mask(mask, **sizes, q_start=k.shape[2] - q.shape[2], q_len=q.shape[2])


# Of the factor on all sizes: from nothing but the forced lines to more lines than there are tokens, both at a million
# tokens and for the smallest sizes of any plan.
SPARSEST, DENSEST = 2.0**-13, 2.0**17
