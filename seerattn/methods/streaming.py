"""The streaming baseline: attention sinks and a window of the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seerattn.methods.method import Budget, Selectors, TopKMethod, token_budgets
from seerattn.selection.block_indices import BlockIndices, num_query_blocks
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.policies import Policy, is_number
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
        q_len, start = q.shape[2], k.shape[2] - q.shape[2]
        # Settings of heads differ between layers.
        layer = 0 if self.policy.setting is None or is_number(self.policy.setting[1]) else context.layer
        return _lists(self, layer, q.shape[0], k.shape[1], start, q_len, q.device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _lists(
    selector: StreamingSelector, layer: int, batch: int, heads: int, start: int, q_len: int, device: torch.device
) -> BlockIndices:
    """Lists of all layers and inputs of these lengths; made once, since nothing in them depends on what tokens hold."""
    block_q, block_k = selector.block_q, selector.block_k
    rows, columns = num_query_blocks(start, q_len, block_q), -(-(start + q_len) // block_k)
    ends = (start // block_q + 1 + torch.arange(rows, device=device)) * block_q
    distance = (ends[:, None] - torch.arange(columns, device=device) * block_k).float()
    scores = (-distance).expand(batch, heads, rows, columns)
    sizes = {"block_q": block_q, "block_k": block_k}
    return selector.policy.select(scores, q_start=start, q_len=q_len, layer=layer, **sizes)


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
