"""Keys and values of continuous batching where they lie: in the pages of a cache.

transformers copies all keys of all requests of a forward, in every layer, by an index of every single one, which the
host writes down in Python. Here a forward writes what is new, and copies nothing by itself: a table of its pages says
where the keys of a request are. A kernel decodes all requests together and in place (`seerattn.ops.decode_attention`).
Keys of a later part of a prompt are gathered, those of one request at a time; so are those of what is decoded where no
kernel runs, or is attended to as in the unpatched model. Caches of models with windows are left as they are.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from seerattn.ops.decode_attention import decode_attention
from seerattn.ops.resolve import preferred, refusal
from seerattn.selection.decode_blocks import DecodeBlocks

# transformers 5.17 gives indices one by one and has names with a prefix; newer ones edit the keywords of the call.
EDITS_KEYWORDS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
_OP, _EXTEND = "decode_attention", "extend_read_and_write_indices"


def leave_in_pages(cache: PagedAttentionCache) -> None:
    """Has a cache of full attention alone be written to, and not read, by what transformers does for a forward."""
    kinds = cache.cache_allocators if EDITS_KEYWORDS else cache.group_cache_managers
    if len(kinds) == 1 and not _has_windows(cache):
        setattr(cache, _EXTEND, partial(_write_alone, weakref.ref(cache)))


def is_left_in_pages(cache: PagedAttentionCache) -> bool:
    """Whether `leave_in_pages` did so."""
    return _EXTEND in vars(cache)


def _has_windows(cache: PagedAttentionCache) -> bool:
    return "sliding_attention" in cache.cache_allocators if EDITS_KEYWORDS else cache.num_sliding_attention_groups > 0


def _write_alone(cache: weakref.ref[PagedAttentionCache], *request: Any) -> None:
    *request, _, write_index = request
    alive = cache()
    type(alive).extend_read_and_write_indices(alive, *request, None, write_index)


class Row(NamedTuple):
    """Tokens ``begin .. end`` of a packed forward and the keys ``k_begin .. k_end`` of their request."""

    begin: int
    end: int
    k_begin: int
    k_end: int

    @property
    def start(self) -> int:
        """Keys before the first token."""
        return (self.k_end - self.k_begin) - (self.end - self.begin)


class Together(NamedTuple):
    """Rows of one token each that are decoded at once.

    Attributes:
        numbers: which rows of a forward they are.
        places: their tokens, int64 ``[m]``; None if those are all tokens of the forward.
        table: their pages, int32 ``[m, P]``.
        lengths: their keys, int32 ``[m]``.
        longest: the most keys of one.
    """

    numbers: list[int]
    places: Tensor | None
    table: Tensor
    lengths: Tensor
    longest: int

    def of(self, x: Tensor, dim: int) -> Tensor:
        """Their tokens of a tensor of all tokens of the forward."""
        return x if self.places is None else x.index_select(dim, self.places)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of a forward have their keys.

    Attributes:
        rows: one a request, in their order.
        decoded: numbers of those that a kernel may decode together.
        table: pages of the rows, int32 ``[n, P]``.
        lengths: keys of the rows, int32 ``[n]``.
        impl: of `decode_attention` that runs on the device.
    """

    rows: list[Row]
    decoded: list[int]
    table: Tensor
    lengths: Tensor
    impl: str
    _together: dict[tuple[int, ...], Together] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, cache: PagedAttentionCache, futures: list[Any], decoded: list[bool], device: torch.device) -> Layout:
        """The layout of a forward, from what the host knows of its requests: nothing waits for the device.

        Args:
            cache: that was left in its pages.
            futures: the requests, as transformers schedules them.
            decoded: whether a kernel may decode each with others, if it is one token.
            device: of the model.
        """
        rows, at = [], 0
        for future in futures:
            rows.append(Row(at, at + future.query_length, 0, future.state.position_offset))
            at += future.query_length
        together = [number for number, row in enumerate(rows) if decoded[number] and row.end - row.begin == 1]
        page = _page_size(cache)
        pages = [_pages(cache, future.state.request_id)[: -(-row.k_end // page)] for future, row in zip(futures, rows)]
        width = max(map(len, pages))
        table = torch.tensor([[*of, *[0] * (width - len(of))] for of in pages], dtype=torch.int32)
        lengths = torch.tensor([row.k_end for row in rows], dtype=torch.int32)
        return cls(rows, together, _on(device, table), _on(device, lengths), preferred(_OP, "auto", device))

    def together(self, numbers: list[int]) -> Together:
        """Some rows of one token each, found once for all layers."""
        name = tuple(numbers)
        if name not in self._together:
            rows, places, table, lengths = [self.rows[number] for number in numbers], None, self.table, self.lengths
            if len(numbers) < len(self.rows):
                at = _on(table.device, torch.tensor([[row.begin for row in rows], numbers]))
                places, table, lengths = at[0], table[at[1]], lengths[at[1]]
            self._together[name] = Together(numbers, places, table, lengths, max(row.k_end for row in rows))
        return self._together[name]


class Pages(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        layout: of the forward.
        k: all pages ``[pages, page_size, HKV, D]``, which hold what is new already.
        v: of the values, as ``k``.
    """

    layout: Layout
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, cache: PagedAttentionCache, layer: int, layout: Layout) -> Pages:
        """The pages of a layer."""
        if EDITS_KEYWORDS:
            return cls(layout, *cache.layer_to_allocator[layer].get_cache_for_block_table(layer))
        _, place = cache.layer_index_to_group_indices[layer]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        return cls(layout, cache.key_cache[place].view(shape), cache.value_cache[place].view(shape))

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, HKV, S, D]`` of one request, gathered."""
        tokens = self.layout.rows[number].k_end
        needed = self.layout.table[number, : -(-tokens // self.k.shape[1])].long()
        return tuple(pages[needed].flatten(0, 1)[:tokens].transpose(0, 1)[None] for pages in (self.k, self.v))

    def decode(self, query: Tensor, logits: dict[str, Any]) -> Tensor | None:
        """Attention of the rows that are decoded over all of their keys, or None where no kernel runs here.

        Args:
            query: of all rows ``[1, H, T, D]``.
            logits: scale, softcap and sinks.

        Returns:
            ``[m, H, D]``.
        """
        name = self.layout.impl
        if name == "reference" or not self.layout.decoded:
            return None
        rows = self.layout.together(self.layout.decoded)
        q = rows.of(query, 2)[0].transpose(0, 1)
        call = {"lengths": rows.lengths, "block_table": rows.table, "blocks": None, **logits}
        if refusal(_OP, name, q.device, q, self.k, self.v, **call) is not None:
            return None
        return decode_attention(q, self.k, self.v, **call, impl=name)

    def read(self, rows: Together, q: Tensor, blocks: DecodeBlocks, impl: str, logits: dict[str, Any]) -> Tensor:
        """Attention ``[m, H, D]`` of rows that are decoded over the blocks that were chosen for each.

        Args:
            rows: the rows.
            q: their queries ``[1, H, m, D]``.
            blocks: lists ``[m, HKV, K]``.
            impl: of `decode_attention`.
            logits: scale, softcap and sinks.
        """
        call = {"lengths": rows.lengths, "block_table": rows.table, "blocks": blocks, **logits}
        return decode_attention(q[0].transpose(0, 1), self.k, self.v, **call, impl=impl)


def _on(device: torch.device, x: Tensor) -> Tensor:
    # Memory that is not pinned is copied before the call returns, which does not wait for what the device has to do.
    return x.to(device, non_blocking=True)


def _page_size(cache: PagedAttentionCache) -> int:
    return next(iter(cache.cache_allocators.values())).tokens_per_page if EDITS_KEYWORDS else cache.block_size


def _pages(cache: PagedAttentionCache, request_id: str) -> list[int]:
    """Pages of a request in their order, as `Pages` counts them."""
    if not EDITS_KEYWORDS:
        return cache.group_cache_managers[0].block_table[request_id]
    (allocator,) = cache.cache_allocators.values()
    # A block has a page of keys and one of values for every layer; the views of a layer begin at its own.
    stride = allocator.block_physical_stride // allocator.tokens_per_page
    return [block * stride for block in allocator.block_table[request_id]]
