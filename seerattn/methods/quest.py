"""Quest: blocks of one decoded token by the least and the greatest of their keys, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.gate.pooling import pool_blocks
from seerattn.methods.method import Budget, DecoderAt, Method, Selectors, token_budgets
from seerattn.options import option
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks, group_scores
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True)
class QuestDecoder(PolicyDecoder):
    """Bounds of q.k by block (Quest, arXiv 2406.10774, section 3.3): ``sum_d max(q_d m_d, q_d M_d)``.

    ``m`` and ``M`` are the least and the greatest keys of a block after RoPE, channel by channel. A KV group shares its
    blocks as with gates: the largest softmax of a head. The paper's models share no keys.

    Attributes:
        policy: how many blocks to keep.
        block_k: page size in tokens.
    """

    policy: Policy
    block_k: int = 64

    @property
    def block_size(self) -> int:
        """See `PolicyDecoder.block_size`."""
        return self.block_k

    @torch.no_grad()
    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """See `DecodeSelector.select_token`."""
        tokens = k.shape[2]
        blocks = (tokens - 1) // self.block_k
        scores = quest_bounds(q, k[:, :, : blocks * self.block_k], self.block_k) * context.scale
        scores = group_scores(scores, k.shape[1], unscored=self.policy.sink_blocks)
        return choose_blocks(scores, self.policy, tokens=tokens, block_k=self.block_k, layer=context.layer)


def quest_bounds(q: Tensor, k: Tensor, block_k: int) -> Tensor:
    """What q.k is at most in each block, fp32 ``[B, H, N]``.

    Args:
        q: ``[B, H, 1, D]``.
        k: ``[B, HKV, S, D]``, whole blocks.
        block_k: block size in tokens.
    """
    if not k.shape[2]:
        return q.new_zeros(*q.shape[:2], 0, dtype=torch.float32)
    ends = pool_blocks(k, size=block_k, start=0, kinds=("min", "max"))
    least, greatest = ends.repeat_interleave(q.shape[1] // k.shape[1], dim=1).chunk(2, dim=-1)
    return torch.maximum(q * least, q * greatest).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """Bounds of q.k by page, of decoded tokens alone. The paper has pages of 16 tokens, and two dense layers."""

    id = "quest"
    title = "Quest"
    kind = "training-free"

    block_k: int = option(64, help="Page size in tokens.", choices=(16, 32, 64, 128))
    dense_layers: int = option(0, help="First layers that read everything; 2 in the paper.", low=0)
    sink_blocks: int = option(1, help="First pages that are always read; 0 in the paper.", low=0)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_k, self.block_k

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return ("tokens",)

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        raise ValueError("quest must be measured on decoded tokens, got a prompt; give the task decode_tokens")

    def decoders(self, model: EvalModel | None = None) -> Selectors:
        found = token_budgets(
            lambda policy: QuestDecoder(policy, self.block_k), sink_blocks=self.sink_blocks, settings=self.settings()
        )

        def at(tokens: float) -> DecoderAt:
            chosen = found.at(tokens)
            return lambda layer: None if layer < self.dense_layers else chosen(layer)

        return Selectors(at, found.sparsest, found.densest, settings=found.settings)
