"""The mask of a call: padding for sparse layers, the model's own tensor for the dense ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from seerattn.hf.banded import Bands
from seerattn.hf.capturing import CAPTURE
from seerattn.hf.parts import PARTS
from seerattn.hf.state import Attachment, AttentionLayer, Kind, Running, Tables

# Query rows of a mask that are compared with causality at once: 64 MiB of booleans at 128k keys.
_STRIP = 512


class Unservable(ValueError):
    """A call that sparse attention cannot follow; ``impl="auto"`` runs it dense."""


class Row(NamedTuple):
    """The real tokens of one row of a batch that is padded elsewhere than on the left.

    Attributes:
        row: its number in the batch.
        queries: slots of its queries among those of the call, int64.
        keys: slots of its keys, int64; the last of them are those of its queries.
    """

    row: int
    queries: Tensor
    keys: Tensor


class CallMask:
    """The mask of one forward, as the model described it; handed to the layers in place of a tensor.

    It keeps the 2-D padding mask, which sparse layers need, and makes the tensor that the replaced implementation
    expects when the first dense layer asks for it. All that is decided once for a forward is kept here as well, where
    every layer finds it, also one that gradient checkpointing runs again in another thread.

    Attributes:
        capture: what the forward shows its attention to, or None.
        settled: models of which it is known which layers are untouched.
        untouched: layers that run in this forward as in the unpatched model, seen by nobody.
        plain: the attention of untouched layers, by the name of its implementation, where it takes no mask.
        dense_is_faster: whether "auto" expects it of layers of a kind.
        tables: rotary tables of cached keys, by rotation and row.
        positions_end: one more than the largest position, where a layer asked for it.
    """

    # As of the mask that it stands for: GPT-2 reshapes one of fewer, and `generate` asks, of a static cache.
    ndim = 4

    def contiguous(self) -> CallMask:
        return self

    def __init__(self, dense: str, arguments: dict[str, Any]) -> None:
        self._dense = dense
        self._arguments = arguments
        self._running: dict[Attachment, Running] = {}
        self.capture = CAPTURE.get()
        self.settled: set[Attachment] = set()
        self.untouched: set[AttentionLayer] = set()
        self.plain: dict[str, Callable[..., Any]] = {}
        self.dense_is_faster: dict[Kind, bool] = {}
        self.tables: dict[Any, Tables] = {}
        self.positions_end: int | None = None

    def running(self, attachment: Attachment) -> Running:
        """What the layers of this forward run, the same for all of them."""
        return self._running.setdefault(attachment, attachment.now())

    @functools.cached_property
    def tensor(self) -> Tensor | Bands | None:
        """The mask of the replaced implementation."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self._dense](**self._arguments)

    @functools.cached_property
    def k_len(self) -> int:
        """Real key slots, padding included; a static cache has more."""
        return int(self._arguments["q_offset"]) + self.q_len

    @property
    def q_len(self) -> int:
        """Query slots, padding included."""
        return self._arguments["q_length"]

    @functools.cached_property
    def _real(self) -> Tensor | None:
        """Whether a key slot holds a token, bool ``[B, S]``, None where all do."""
        mask = self._arguments["attention_mask"]
        if mask is None:
            return None
        if mask.shape[1] < self.k_len:
            raise Unservable(
                f"attention_mask must cover all {self.k_len} keys, got {list(mask.shape)}; "
                "give it the columns of the cache as well"
            )
        real = mask[:, : self.k_len].bool()
        return None if bool(real.all()) else real

    @property
    def is_whole(self) -> bool:
        """Whether no row is padded."""
        return self._real is None

    @functools.cached_property
    def lengths(self) -> list[int] | None:
        """Real tokens of every left-padded row, None without padding.

        Raises:
            Unservable: padding elsewhere than on the left, or a row of padding alone.
        """
        if self._real is None:
            return None
        if self.rows is not None:
            raise Unservable(
                "attention_mask must be zeros followed by ones in every row (left padding), got padding on the right, "
                "within a row or in all of it; set tokenizer.padding_side = 'left'"
            )
        return self._real.sum(1).tolist()

    @functools.cached_property
    def rows(self) -> list[Row] | None:
        """The rows with at least one query, in a batch that is padded elsewhere than on the left; else None."""
        real = self._real
        if real is None:
            return None
        lengths = real.sum(1)
        from_right = torch.arange(self.k_len, 0, -1, device=real.device)
        if torch.equal(real, from_right <= lengths[:, None]) and bool(lengths.min()):
            return None
        rows = []
        for b, slots in enumerate(real):
            keys = slots.nonzero()[:, 0]
            queries = keys - (self.k_len - self.q_len)
            queries = queries[queries >= 0]
            if len(queries):
                rows.append(Row(b, queries, keys))
        return rows

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether the mask is causality and padding alone: no packed documents, no overlay that hides or shows more."""
        arguments = self._arguments
        if (arguments.get("local_size") or self.k_len) < self.k_len:
            return False
        if arguments["allow_is_causal_skip"]:
            return True
        # What the model laid over causality may be empty, as that of images is in a prompt of text. Its numbers tell.
        make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        given = arguments | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        causal = given | {"mask_function": causal_mask_function, "use_vmap": False}
        for begin in range(0, self.q_len, _STRIP):
            size = min(_STRIP, self.q_len - begin)
            strip = {"q_length": size, "q_offset": arguments["q_offset"] + begin}
            if not torch.equal(*torch.broadcast_tensors(make(**given | strip), make(**causal | strip))):
                return False
        return True

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
    parts = PARTS.get()
    if parts is not None:
        arguments = parts.whole_mask(arguments)
        q_length = arguments["q_length"]
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
