"""FlashAttention's backend with gates. It was written by what vLLM says of it, and not run yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from seerattn.ops.decode_attention import decode_attention
from seerattn.ops.paged_attention import paged_attention
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.vllm.backend import GatedBackend, GatedBuilder, GatedImpl, Logits
from seerattn.vllm.rows import Part
from seerattn.vllm.steps import Steps


class Impl(GatedImpl, FlashAttentionImpl):
    """Attends to pages where they are; of the keys those that have no gate key yet are gathered."""

    def read_pages(self, layer: nn.Module, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `GatedImpl.read_pages`."""
        both = kv_cache[pages].transpose(0, 1).flatten(1, 2)[None]
        return both[..., : self.head_size], both[..., self.head_size :]

    def attend(
        self, query: Tensor, layer: nn.Module, kv_cache: Tensor, part: Part, blocks: BlockIndices, logits: Logits
    ) -> Tensor:
        """See `GatedImpl.attend`."""
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        ends = torch.tensor([0, part.tokens, part.end], dtype=torch.int32, device=query.device)
        row = {"block_table": part.pages.tensor.int()[None], "cu_seqlens_q": ends[:2], "k_lens": ends[2:]}
        return paged_attention(query, k_cache, v_cache, blocks, **row, **logits)

    def attend_tokens(
        self, query: Tensor, layer: nn.Module, kv_cache: Tensor, steps: Steps, blocks: DecodeBlocks, logits: Logits
    ) -> Tensor:
        """See `GatedImpl.attend_tokens`."""
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        rows = {"lengths": steps.lengths, "block_table": steps.tables}
        return decode_attention(query, k_cache, v_cache, blocks=blocks, **rows, **logits)


class Builder(GatedBuilder, FlashAttentionMetadataBuilder):
    """Splits forwards with prompts."""


class Backend(GatedBackend, FlashAttentionBackend):
    """FLASH_ATTN with gates."""

    gated_impl = Impl
    gated_builder = Builder
