"""The two kinds of layers of Kascade: anchors, which choose, and those that reuse what an anchor chose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.map_form import MASS
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext


class LayerRule(NamedTuple):
    """What a layer goes by.

    Attributes:
        anchor: the layer whose blocks it takes; its own number where it is an anchor.
        heads: for each of its KV heads the KV head of the anchor whose blocks it takes.
    """

    anchor: int
    heads: tuple[int, ...]


@dataclass(eq=False)
class Lists:
    """What an anchor chose in this forward, call by call, for the layers above it that reuse it.

    A batch with padding is one call a row, in the same order in every layer. The first call of an anchor after a layer
    has reused something begins the next forward.
    """

    calls: list[BlockIndices] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)

    def add(self, blocks: BlockIndices) -> None:
        """Keeps what an anchor chose in a call."""
        if self.used:
            self.calls, self.used = [], {}
        self.calls.append(blocks)

    def next(self, layer: int, q_len: int, k_len: int) -> BlockIndices:
        """What was chosen in the call that a layer is in.

        Raises:
            ValueError: there was no such call, as where a layer runs without those below it.
        """
        number = self.used.get(layer, 0)
        self.used[layer] = number + 1
        found = self.calls[number] if number < len(self.calls) else None
        if found is None or int(found.q_len.max()) != q_len or int((found.q_start + found.q_len).max()) != k_len:
            raise ValueError(
                f"layer {layer} must run after its anchor in the same forward, got a call that it did not see"
            )
        return found


@dataclass(frozen=True)
class AnchorSelector:
    """The blocks that hold most of the true attention mass of a KV group (section 3).

    Published are the best keys of a tile of queries; here they are the best key blocks of a query block. It computes
    attention to choose, as the published anchors do.

    Attributes:
        policy: how many blocks to keep.
        lists: where the layers above find them.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
    """

    policy: Policy
    lists: Lists
    block_q: int = 64
    block_k: int = 64

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        blocks = self.policy.select(
            group_mass(q, k, context, block_q=self.block_q, block_k=self.block_k).log(),
            q_start=k.shape[2] - q.shape[2],
            q_len=q.shape[2],
            block_q=self.block_q,
            block_k=self.block_k,
            layer=context.layer,
        )
        self.lists.add(blocks)
        return blocks


@dataclass(frozen=True)
class ReuseSelector:
    """The blocks that an anchor chose, each KV head those of the head that it is most like.

    Attributes:
        lists: of the anchor.
        heads: KV head of the anchor for each KV head of the layer.
    """

    lists: Lists
    heads: tuple[int, ...]

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        blocks = self.lists.next(context.layer, q.shape[2], k.shape[2])
        order = torch.tensor(self.heads, device=blocks.indices.device)
        return replace(
            blocks,
            indices=blocks.indices.index_select(1, order).contiguous(),
            counts=blocks.counts.index_select(1, order).contiguous(),
        )


@torch.no_grad()
def group_mass(q: Tensor, k: Tensor, context: AttentionContext, *, block_q: int, block_k: int) -> Tensor:
    """Attention mass of the tiles, a mean over the heads of a KV group: fp32 ``[B, HKV, Nq, Nk]``."""
    mass = attention_map(q, k, form=MASS, block_q=block_q, block_k=block_k, **context.logits).map
    return mass.unflatten(1, (k.shape[1], -1)).mean(2)
