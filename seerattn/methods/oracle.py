"""The oracle: the true block map, computed by dense attention, as the ceiling of what a gate can select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from seerattn.methods.family import Family, top_k_family
from seerattn.ops.attention_map import attention_map
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.budgets import HeadBudgets, share_density
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext
from seerattn.training.losses import group_target

Share = Literal["query_head", "kv_group"]


@dataclass(frozen=True)
class OracleSelector:
    """Scores are the logarithm of a true map, by default the published target of gates (arXiv 2410.13276, section 4).

    It runs dense attention to choose blocks, so it saves nothing; it says how good a gate would be that had learned its
    target perfectly.

    Attributes:
        policy: how many blocks to keep.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        share: "kv_group" lets the heads of a group share their blocks, as gates of that form do.
        target: form of the map.
        budgets: share the one density of `TopK` among heads; None shares it equally.
    """

    policy: Policy
    block_q: int = 64
    block_k: int = 64
    share: Share = "query_head"
    target: MapForm = PUBLISHED
    budgets: HeadBudgets | None = None

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        """See `Selector.select`."""
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        target = attention_map(q, k, form=self.target, **sizes, **context.logits).map
        return self.choose(target, q_len=q.shape[2], k_len=k.shape[2], kv_heads=k.shape[1], layer=context.layer)

    def choose(self, target: Tensor, *, q_len: int, k_len: int, kv_heads: int, layer: int) -> BlockIndices:
        """Chooses from a map that is already known, ``[B, H, Nq, Nk]`` as of `attention_map`."""
        target = group_target(target, kv_heads if self.share == "kv_group" else target.shape[1])
        return share_density(self.policy, self.budgets, k_len).select(
            target.log(), q_start=k_len - q_len, q_len=q_len, block_q=self.block_q, block_k=self.block_k, layer=layer
        )


def oracle_family(
    *,
    share: Share = "query_head",
    target: str = str(PUBLISHED),
    block_q: int = 64,
    block_k: int = 64,
    sink_blocks: int = 1,
) -> Family:
    """The best blocks of a true map; the knob is the density of `TopK`.

    Raises:
        ValueError: ``target`` names no form of a map.
    """
    form = MapForm.parse(target)
    # The published one goes without saying, as in results from before there were others.
    settings = {"share": share} | ({} if form == PUBLISHED else {"target": str(form)})
    return top_k_family(
        oracle_name(form),
        lambda policy: OracleSelector(policy, block_q, block_k, share, form),
        block_q=block_q,
        block_k=block_k,
        sink_blocks=sink_blocks,
        settings=settings,
    )


def oracle_name(target: MapForm) -> str:
    """What tables call the oracle of a map, such as "oracle" of the published one and "oracle sum:2" of another."""
    return "oracle" if target == PUBLISHED else f"oracle {target}"
