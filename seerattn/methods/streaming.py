"""The streaming baseline: attention sinks and a window of the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.methods.method import Budget, Selectors, TopKMethod, token_budgets
from seerattn.selection.block_indices import BlockIndices, causal_block_mask, num_query_blocks
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext, PolicySelector

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True)
class StreamingSelector(PolicySelector):
    """First and most recent blocks, whatever they hold (StreamingLLM, arXiv 2309.17453, section 3.2).

    A block scores minus its distance in tokens from the end of the query block, so the policies that choose for the
    gate choose here as well and give it exactly the same budget; ``policy.sink_blocks`` are the attention sinks. A
    fixed window of ``n`` tokens is ``Threshold(on="score", threshold=-n)``.

    Attributes:
        policy: how many blocks to keep.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    policy: Policy
    block_q: int = 64
    block_k: int = 64

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        batch, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
        start = k_len - q_len
        rows = num_query_blocks(start, q_len, self.block_q)
        columns = -(-k_len // self.block_k)
        ends = (start // self.block_q + 1 + torch.arange(rows, device=q.device)) * self.block_q
        starts = torch.arange(columns, device=q.device) * self.block_k
        distance = (ends[:, None] - starts).float()
        causal = causal_block_mask(start, q_len, rows, columns, self.block_q, self.block_k)[0].to(q.device)
        scores = (-distance).masked_fill(~causal, -torch.inf).expand(batch, k.shape[1], rows, columns)
        return self.policy.select(
            scores, q_start=start, q_len=q_len, block_q=self.block_q, block_k=self.block_k, layer=context.layer
        )


@dataclass(frozen=True)
class StreamingDecoder(PolicyDecoder):
    """First and most recent blocks of one token, as `StreamingSelector` has them.

    Attributes:
        policy: how many blocks to keep.
        block_k: key block size in tokens.
    """

    policy: Policy
    block_k: int = 64

    @property
    def block_size(self) -> int:
        """See `PolicyDecoder.block_size`."""
        return self.block_k

    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """See `DecodeSelector.select_token`."""
        tokens = k.shape[2]
        starts = torch.arange((tokens - 1) // self.block_k, device=q.device) * self.block_k
        scores = (starts - tokens).float().expand(q.shape[0], k.shape[1], -1)
        return choose_blocks(scores, self.policy, tokens=tokens, block_k=self.block_k, layer=context.layer)


@dataclass(frozen=True, kw_only=True)
class Streaming(TopKMethod):
    """Sinks and recent blocks."""

    id = "streaming"
    title = "streaming"
    kind = "static"

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return (*super().budgets, "tokens")

    def decoders(self, model: EvalModel | None = None) -> Selectors:
        def decoder(policy: Policy) -> StreamingDecoder:
            return StreamingDecoder(policy, self.block_k)

        return token_budgets(decoder, sink_blocks=self.sink_blocks, settings=self.settings())

    def selector(self, policy: Policy) -> StreamingSelector:
        return StreamingSelector(policy, self.block_q, self.block_k)
