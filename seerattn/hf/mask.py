"""The mask of a call: padding for sparse layers, the model's own tensor for the dense ones."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


class CallMask:
    """The mask of one forward, as the model described it; handed to the layers in place of a tensor.

    It keeps the 2-D padding mask, which sparse layers need, and makes the tensor that the replaced implementation
    expects when the first dense layer asks for it.
    """

    # All that transformers asks of a mask which `generate` prepares for a static cache.
    ndim = 0

    def contiguous(self) -> CallMask:
        return self

    def __init__(self, dense: str, arguments: dict[str, Any]) -> None:
        self._dense = dense
        self._arguments = arguments
        # Densities for which a layer of this forward found dense attention faster: the other layers need not ask, which
        # took 17 us each of a short prompt.
        self.dense_densities: set[float | None] = set()

    @functools.cached_property
    def tensor(self) -> Tensor | None:
        """The mask of the replaced implementation."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self._dense](**self._arguments)

    @functools.cached_property
    def k_len(self) -> int:
        """Real key slots, padding included; a static cache has more."""
        return int(self._arguments["q_offset"]) + self._arguments["q_length"]

    @functools.cached_property
    def lengths(self) -> list[int] | None:
        """Real tokens of every left-padded row, None without padding.

        Raises:
            ValueError: padding elsewhere than on the left.
        """
        mask = self._arguments["attention_mask"]
        if mask is None:
            return None
        mask = mask[:, : self.k_len]
        lengths = mask.sum(1)
        from_right = torch.arange(self.k_len, 0, -1, device=mask.device)
        if mask.shape[1] != self.k_len or not torch.equal(mask, from_right <= lengths[:, None]):
            raise ValueError(
                "attention_mask must be zeros followed by ones in every row (left padding), "
                "got padding on the right or holes; set tokenizer.padding_side = 'left'"
            )
        rows = lengths.tolist()
        if min(rows) == 0:
            raise ValueError("attention_mask must keep at least one token of every row, got an empty row")
        return None if min(rows) == self.k_len else rows

    @property
    def is_causal(self) -> bool:
        """Whether the mask is causality and padding alone: no packed documents, no overlay of other patterns."""
        return bool(self._arguments["allow_is_causal_skip"])

    @property
    def has_overlay(self) -> bool:
        """Whether the model laid a pattern of its own over the causal one."""
        return bool(self._arguments.get("use_vmap"))


def make_mask(
    *,
    dense: str,
    q_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | CallMask | None = None,
    **arguments: Any,
) -> CallMask | Tensor | None:
    """The mask function of our implementations, in the signature of `transformers.AttentionMaskInterface`."""
    if isinstance(attention_mask, CallMask):
        return attention_mask
    # A static cache gives its own counter, which the first layer moves on before anybody asks.
    q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    arguments |= {"attention_mask": attention_mask, "q_length": q_length, "q_offset": q_offset}
    if q_length == 1:
        # A decode step is dense in every layer; what it compiles to must not depend on us.
        return ALL_MASK_ATTENTION_FUNCTIONS[dense](**arguments)
    return CallMask(dense, arguments)


def document_numbers(position_ids: Tensor | None, batch: int) -> Tensor:
    """Document numbers ``[B, S]`` of packed rows: a document begins where the positions do not count on."""
    if position_ids is None:
        raise ValueError("segment_ids must be given where position_ids do not reach the attention layers, got None")
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    return starts.cumsum(1).expand(batch, -1)


def document_bounds(segment_ids: Tensor, block_q: int, block_k: int) -> list[tuple[int, int]]:
    """First token and end of every document of one packed row, from its document numbers ``[S]``.

    Raises:
        ValueError: a document begins within a block.
    """
    edges = [0, *((segment_ids.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(segment_ids)]
    for begin in edges[:-1]:
        if begin % block_q or begin % block_k:
            raise ValueError(
                f"packed documents must begin on block boundaries, got one at token {begin} with blocks of "
                f"{block_q} and {block_k}; cut documents to whole blocks"
            )
    return list(pairwise(edges))
