"""Pages of transformers' continuous batching in forwards that only decode, one token a request.

In these transformers hands over a table of the pages of every request, where it else has indices of all of its keys. It
writes nothing and gives nothing back: attention puts the new token into its page. A kernel reads the pages in place
(`seerattn.ops.decode_attention`), so that no step copies keys and values. Where none runs, and for requests that run as
in the unpatched model, those of one request at a time are gathered.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from seerattn.ops.decode_attention import decode_attention
from seerattn.ops.resolve import preferred, refusal

# transformers 5.17 gives indices one by one and has names with a prefix; newer ones edit the keywords of the call.
EDITS_KEYWORDS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
_OP = "decode_attention"


class Pages(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        table: pages of every request in their order, int32 ``[n, P]``.
        k: all pages ``[pages, page_size, HKV, D]``.
        v: of the values, as ``k``.
        at: position of the new token of every request, ``[n]``.
    """

    table: Tensor
    k: Tensor
    v: Tensor
    at: Tensor

    @classmethod
    def of(cls, module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Pages:
        """The pages of a layer once they hold the new keys and values ``[1, HKV, n, D]``."""
        at = kwargs["position_ids"][0]
        found = cls(*_tables(module, key, value, kwargs), at)
        page, place = at // found.k.shape[1], at % found.k.shape[1]
        page = found.table.gather(1, page[:, None].long())[:, 0]
        for pages, new in ((found.k, key), (found.v, value)):
            pages[page.long(), place.long()] = new[0].transpose(0, 1)
        return found

    def row(self, number: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, HKV, tokens, D]`` of one request, gathered."""
        needed = self.table[number, : -(-tokens // self.k.shape[1])].long()
        return tuple(pages[needed].flatten(0, 1)[:tokens].transpose(0, 1)[None] for pages in (self.k, self.v))

    def decode(self, query: Tensor, numbers: list[int], logits: dict[str, Any]) -> Tensor | None:
        """Attention of some requests' tokens over all of their keys, or None where no kernel runs here.

        Args:
            query: of all requests ``[1, H, n, D]``.
            numbers: which of them.
            logits: scale, softcap and sinks.

        Returns:
            ``[m, H, D]``.
        """
        name = preferred(_OP, "auto", query.device)
        if name == "reference":
            return None
        q, table, lengths = query[0].transpose(0, 1), self.table, (self.at + 1).to(torch.int32)
        if len(numbers) < len(q):
            some = torch.tensor(numbers, device=q.device)
            q, table, lengths = q[some], table[some], lengths[some]
        call = {"lengths": lengths, "block_table": table, "blocks": None, **logits}
        if refusal(_OP, name, q.device, q, self.k, self.v, **call) is not None:
            return None
        return decode_attention(q, self.k, self.v, **call, impl=name)


def _tables(module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    cache: PagedAttentionCache = kwargs["cache"]
    if EDITS_KEYWORDS:
        edited = dict(kwargs)
        cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=edited)
        return edited["block_table"], edited["k_cache"], edited["v_cache"]
    group, layer = cache.layer_index_to_group_indices[module.layer_idx]
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    return kwargs["block_table"][group], cache.key_cache[layer].view(shape), cache.value_cache[layer].view(shape)
