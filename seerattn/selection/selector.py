"""The protocol that every way of choosing blocks follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import Policy


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
    """

    layer: int
    scale: float
    softcap: float | None
    unrotate: Callable[[Tensor, int], Tensor]
    sinks: Tensor | None = None

    @property
    def logits(self) -> dict[str, Any]:
        """What makes attention logits of q and k, as keyword arguments of the ops."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}


@runtime_checkable
class Selector(Protocol):
    """Chooses key blocks for the queries of one unpadded call."""

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


@dataclass(frozen=True)
class GateSelector:
    """The learned gate: scores from un-rotated q and k, blocks by a policy."""

    gate: AttnGate
    policy: Policy

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        config = self.gate.config
        start = k.shape[2] - q.shape[2]
        scores = self.gate(context.unrotate(q, start), context.unrotate(k, 0))
        return self.policy.select(
            scores,
            q_start=start,
            q_len=q.shape[2],
            block_q=config.block_q,
            block_k=config.block_k,
            layer=context.layer,
            forced_scored=not config.exclude_forced,
        )
