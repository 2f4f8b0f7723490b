"""Block-sparse attention by mean pooling: what a gate would be without learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seerattn.gate.pooling import pool_blocks
from seerattn.methods.method import TopKMethod
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext, PolicySelector


@dataclass(frozen=True)
class MeanPooledSelector(PolicySelector):
    """The block-sparse pattern of MInference (arXiv 2407.02490, section 3.1): scores are products of mean queries and
    mean keys, after RoPE and without a scale.

    MInference keeps the 100 best blocks of 64 of each row; here a policy chooses, with its forced blocks. Soft cap and
    sinks are left out, as they order nothing among the blocks of a row. A partial block has the mean of its tokens.

    Attributes:
        policy: how many blocks to keep.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    policy: Policy
    block_q: int = 64
    block_k: int = 64

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        return self.policy.select(
            mean_pooled_scores(q, k, block_q=self.block_q, block_k=self.block_k),
            q_start=k.shape[2] - q.shape[2],
            q_len=q.shape[2],
            block_q=self.block_q,
            block_k=self.block_k,
            layer=context.layer,
        )


def mean_pooled_scores(q: Tensor, k: Tensor, *, block_q: int, block_k: int) -> Tensor:
    """Products of the means of query blocks and of key blocks, fp32 ``[B, H, Nq, Nk]``, also where nothing is causal.

    Args:
        q: ``[B, H, T, D]``; the last query is the last key.
        k: ``[B, HKV, S, D]``.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """
    mean_q = pool_blocks(q, size=block_q, start=k.shape[2] - q.shape[2], kinds=("avg",))
    mean_k = pool_blocks(k, size=block_k, start=0, kinds=("avg",))
    grouped = mean_q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    return (grouped @ mean_k.mT).view(*mean_q.shape[:3], -1)


@dataclass(frozen=True, kw_only=True)
class MeanPooled(TopKMethod):
    """Mean-pooled q.k."""

    id = "mean_pooled"
    title = "mean-pooled q.k"
    kind = "training-free"

    def selector(self, policy: Policy) -> MeanPooledSelector:
        return MeanPooledSelector(policy, self.block_q, self.block_k)
