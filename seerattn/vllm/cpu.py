"""The backend of CPUs with gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from seerattn.vllm.backend import GatedBackend, GatedBuilder, GatedImpl

# Numbers below 64 are exact in every dtype; three of them tell the place in a page of 2^18 numbers.
_BITS, _DIGITS = 6, 3


class Impl(GatedImpl, CPUAttentionBackendImpl):
    """Reads pages in whatever order the kernels of this CPU keep them."""

    _order: tuple[Tensor, Tensor] | None = None

    def read_pages(self, layer: nn.Module, kv_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `GatedImpl.read_pages`."""
        num_pages, heads, page, width = kv_cache.shape
        if self._order is None:
            self._order = self._find_order(layer, kv_cache)
        # A page of a head holds all of its keys, then all of its values.
        both = kv_cache.view(num_pages, heads, 2, page * width // 2)[pages]
        found = (both[:, :, side].index_select(-1, order) for side, order in enumerate(self._order))
        k, v = (x.view(-1, heads, page, width // 2).transpose(0, 1).flatten(1, 2)[None] for x in found)
        return k, v

    def _find_order(self, layer: nn.Module, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Where the numbers of the keys, and of the values, of a page are: vLLM writes a page that tells.

        Kernels have orders of their own: transposed, or in tiles of an instruction set.
        """
        _, heads, page, width = kv_cache.shape
        places = torch.arange(page * width // 2).view(page, 1, -1).expand(-1, heads, -1)
        found = torch.zeros(2, page * width // 2, dtype=torch.long)
        for digit in range(_DIGITS):
            numbers = (places >> _BITS * digit & (1 << _BITS) - 1).to(kv_cache.dtype).contiguous()
            scratch = torch.zeros_like(kv_cache[:1])
            self.do_kv_cache_update(layer, numbers, numbers, scratch, torch.arange(page))
            found += scratch.view(heads, 2, -1)[0].long() << _BITS * digit
        order = found.argsort(-1)
        if not torch.equal(found.gather(-1, order), torch.arange(page * width // 2).expand(2, -1)):
            raise ValueError(
                f"pages of vLLM must hold each number of a key once, got ones that do not ({layer.isa} kernels, pages "
                f"of {page} tokens); serve without gates, or with --block-size 64"
            )
        return order[0], order[1]


class Builder(GatedBuilder, CPUAttentionMetadataBuilder):
    """Splits forwards with prompts."""


class Backend(GatedBackend, CPUAttentionBackend):
    """CPU_ATTN with gates."""

    gated_impl = Impl
    gated_builder = Builder
