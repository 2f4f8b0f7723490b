"""The protocol that every way of choosing blocks follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import Policy


@dataclass(frozen=True, eq=False)
class RotaryTables:
    """How q and k of a call were rotated, for kernels that undo it themselves; the default is no rotation.

    Attributes:
        cos: ``[1 or B, S, columns]``, row ``p`` belongs to position ``p``.
        sin: of the same shape.
        width: leading channels of a head that are rotated.
        interleaved: whether channel ``2 i`` is rotated with ``2 i + 1``; otherwise ``i`` with ``i + width / 2``.
        column_step: pair ``i`` has its angle in column ``i * column_step`` of the tables.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    width: int = 0
    interleaved: bool = False
    column_step: int = 1


class Kept(Protocol):
    """What a selector may keep of sequences for their next call."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...

    def rows(self, numbers: Tensor) -> Kept:
        """The same of batch rows ``numbers``, int64 ``[B]`` on any device; a row may be taken several times."""
        ...


@dataclass(eq=False)
class Memory:
    """What a selector keeps of the sequences of a call where a cache holds their keys.

    Attributes:
        known: so many leading keys are, in every row, those that `kept` was made of. What was kept of later ones does
            not hold, and what a selector needs of earlier ones it need not read again.
        kept: what the selector left in the last call, and leaves for the next; None keeps nothing.
    """

    known: int = 0
    kept: Kept | None = None


@dataclass(frozen=True)
class AttentionContext:
    """What a selector may know of the attention call beside q and k.

    Attributes:
        layer: index of the decoder layer.
        scale: factor of q.k before the softmax.
        softcap: tanh soft cap of the logits, or None.
        sinks: ``[H]`` logits of one more key without a value, or None.
        unrotate: maps ``(x [B, h, n, D], start)`` - post-RoPE vectors of the tokens at positions
            ``start .. start + n`` - to the vectors before RoPE, fp32. The identity where the layer has no RoPE.
        rotary: the same as tables, or None where only `unrotate` knows how.
        frequencies: maps a gate's width to the rotation frequencies of this call, fp32 ``[DG / 2]`` on the device of q;
            None where a gate's own hold for calls of every length.
        memory: what the selector keeps from call to call of the same sequences, or None where no cache holds them.
        token_rotary: how the queries of a decoded token were rotated, by tables of its position alone, ``[1 or B, 1,
            columns]``; None where only `unrotate` knows how, and in prompts.
        shared: what selectors of layers that rotate alike leave to each other in one forward, by names that tell
            everything that it depends on; None where nothing is shared.
    """

    layer: int
    scale: float
    softcap: float | None
    unrotate: Callable[[Tensor, int], Tensor]
    sinks: Tensor | None = None
    rotary: RotaryTables | None = None
    frequencies: Callable[[int], Tensor] | None = None
    memory: Memory | None = None
    token_rotary: RotaryTables | None = None
    shared: dict[Any, Any] | None = None

    @property
    def logits(self) -> dict[str, Any]:
        """What makes attention logits of q and k, as keyword arguments of the ops."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}


@runtime_checkable
class Selector(Protocol):
    """Chooses key blocks for the queries of one unpadded call.

    `select` is all that it needs. It may also have ``expected_density()`` and ``needs_length``, see the functions of
    these names.
    """

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """Chooses blocks.

        Args:
            q: post-RoPE queries ``[B, H, T, D]``; the last query is the last key.
            k: post-RoPE keys ``[B, HKV, S, D]``, ``T <= S``.
            context: facts about the layer.

        Returns:
            Lists with ``Hm = H`` or ``HKV`` heads and ``q_start = S - T``.
        """
        ...


def expected_density(selector: Selector) -> float | None:
    """The density that a selector tells before it has seen a call, averaged over layers and heads.

    ``impl="auto"`` then knows where dense attention is faster and has no block chosen. None, as of a selector without
    ``expected_density()``, is told by the blocks once they are chosen.
    """
    tell = getattr(selector, "expected_density", None)
    return None if tell is None else tell()


def needs_length(selector: Selector) -> bool:
    """Whether a prompt that comes in chunks gets other blocks than one that comes at once, which users are told.

    False of a selector without ``needs_length``.
    """
    return getattr(selector, "needs_length", False)


class PolicySelector:
    """What a selector that leaves the choice to its `policy` can tell of it; the base class of such selectors."""

    policy: Policy

    def expected_density(self) -> float | None:
        """See `seerattn.selection.selector.expected_density`."""
        return self.policy.nominal_density

    @property
    def needs_length(self) -> bool:
        """See `seerattn.selection.selector.needs_length`."""
        return self.policy.needs_length


@dataclass(frozen=True)
class LastRowsDense:
    """Any selector, with every causal block in the last query-block rows of a call.

    The same as `Policy.last_rows_dense`, for selectors that have no policy. Neither counts in the expected density.

    Attributes:
        selector: chooses the blocks of the other rows.
        rows: query-block rows at the end that keep every block.
    """

    selector: Selector
    rows: int

    def expected_density(self) -> float | None:
        """See `seerattn.selection.selector.expected_density`."""
        return expected_density(self.selector)

    @property
    def needs_length(self) -> bool:
        """See `seerattn.selection.selector.needs_length`."""
        return needs_length(self.selector)

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        return self.selector.select(q, k, context).with_dense_rows(self.rows)
