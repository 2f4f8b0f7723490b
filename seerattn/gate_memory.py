"""`GateMemory`: what a gate need not compute twice of sequences that come in several calls.

Gate keys of finished blocks never change, so they are kept. Of the query block that the end of a call cuts, the queries
themselves are kept, 63 a head at most: the next call pools the block in whole, by the code of every other block, so
that poolings need no running form and nothing is rounded otherwise. Keys of the unfinished block are read again from
the cache of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from seerattn.gate.attn_gate import AttnGate
from seerattn.ops.gate_scores import KeyVectors
from seerattn.selection.selector import Kept, Memory


@dataclass(frozen=True, eq=False)
class GateMemory:
    """What was kept of the sequences of one layer.

    Attributes:
        gate: whose gate keys they are, held weakly.
        weights: see `_weights`; other ones make other gate keys.
        tokens: end of the call that kept it, in tokens.
        keys: fp32 ``[B, h, W, DG]``, gate keys of finished sub-blocks as the torch modules make them, or None.
        vectors: those of finished blocks as the fused op makes them.
        queries: after RoPE ``[B, H, n, D]``, of the query block that the call left unfinished, up to its end; None
            where it ended with a block, or where the block began before anything was kept.
    """

    gate: weakref.ref[AttnGate]
    weights: tuple
    tokens: int = 0
    keys: Tensor | None = None
    vectors: KeyVectors = field(default_factory=KeyVectors)
    queries: Tensor | None = None

    @classmethod
    def of(cls, memory: Memory, gate: AttnGate) -> GateMemory:
        """What holds of the memory of a call; nothing where another gate kept it, or this one with other weights."""
        kept, weights = memory.kept, _weights(gate)
        if not isinstance(kept, cls) or kept.gate() is not gate or kept.weights != weights:
            return cls(weakref.ref(gate), weights)
        return kept.up_to(memory.known)

    def up_to(self, tokens: int) -> GateMemory:
        """What of it holds if so many leading tokens are the same, of those that it was made of."""
        config = self.gate().config
        keys = None if self.keys is None else self.keys[:, :, : tokens // config.k_size]
        vectors = replace(self.vectors, blocks=min(self.vectors.blocks, tokens // config.block_k))
        left = 0 if self.queries is None else max(0, self.queries.shape[2] - (self.tokens - tokens))
        queries = self.queries[:, :, :left] if left else None
        return replace(self, tokens=tokens, keys=keys, vectors=vectors, queries=queries)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.vectors.nbytes + sum(
            x.untyped_storage().nbytes() for x in (self.keys, self.queries) if x is not None
        )

    def rows(self, numbers: Tensor) -> GateMemory:
        """The same of batch rows ``numbers [B]``."""
        keys, queries = (None if x is None else x[numbers] for x in (self.keys, self.queries))
        return replace(self, keys=keys, vectors=self.vectors.rows(numbers), queries=queries)

    def whole_block(self, q: Tensor, start: int) -> Tensor:
        """Queries ``[B, H, T, D]`` of a call from position ``start`` on, after those kept of their first block."""
        if self.queries is None or self.tokens != start:
            return q
        return torch.cat((self.queries, q), dim=2)

    def after(self, q: Tensor, k_len: int, keys: Tensor | None = None) -> GateMemory:
        """What the next call is to know.

        Args:
            q: queries of this one as `whole_block` gives them.
            k_len: its keys.
            keys: gate keys ``[B, h, W, DG]`` where the torch modules made them; else those of earlier calls stay.
        """
        config = self.gate().config
        tail = k_len % config.block_q
        queries = q[:, :, q.shape[2] - tail :].detach().clone() if 0 < tail <= q.shape[2] else None
        keys = self.keys if keys is None else keys[:, :, : k_len // config.k_size]
        return replace(self, tokens=k_len, keys=keys, queries=queries)


def known_keys(kept: Iterable[Kept | None], gate: AttnGate) -> list[Tensor | None]:
    """Gate keys ``[1, h, W, DG]`` of several sequences as they were kept; None where this gate kept none."""
    weights = _weights(gate)
    return [
        one.keys if isinstance(one, GateMemory) and one.gate() is gate and one.weights == weights else None
        for one in kept
    ]


def _weights(gate: AttnGate) -> tuple:
    """Equal as long as nobody changes what gate keys are made with; an inference tensor cannot tell."""
    parts = (gate.k_weight, gate.k_salience, gate.k_norm._parameters.get("weight"), gate.inv_freq)
    return tuple((x.data_ptr(), None if x.is_inference() else x._version) for x in parts if x is not None)
