"""The oracle: the true block map, computed by dense attention, as the ceiling of what a gate can select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from seerattn.methods.method import TopKMethod
from seerattn.ops.attention_map import attention_map
from seerattn.options import option
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.budgets import HeadBudgets, share_density
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext, PolicySelector
from seerattn.selection.target_map import group_target

Share = Literal["query_head", "kv_group"]


@dataclass(frozen=True)
class OracleSelector(PolicySelector):
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


@dataclass(frozen=True, kw_only=True)
class Oracle(TopKMethod):
    """The best blocks of a true map.

    Attributes:
        budgets_per_head: share the density among heads; in Python alone, as they are made of a text.
    """

    id = "oracle"
    title = "oracle"
    kind = "oracle"

    share: Share = option("query_head", help="kv_group lets the heads of a group share their blocks.")
    target: str = option(str(PUBLISHED), help="Map that it chooses by, keys:power; max:inf is the published one.")
    budgets_per_head: HeadBudgets | None = None

    def check(self) -> None:
        super().check()
        MapForm.parse(self.target)

    @property
    def form(self) -> MapForm:
        """The map that it chooses by."""
        return MapForm.parse(self.target)

    @property
    def default_name(self) -> str:
        """ "oracle" of the published map, and with the map of another, such as "oracle sum:2"."""
        name = "oracle" if self.form == PUBLISHED else f"oracle {self.form}"
        return name if self.budgets_per_head is None else f"{name}, budgets per head"

    def settings(self) -> dict[str, Any]:
        # The published one goes without saying, as in results from before there were others.
        found = {name: of for name, of in super().settings().items() if name != "target" or self.form != PUBLISHED}
        return found if self.budgets_per_head is None else found | {"budgets": self.budgets_per_head.digest}

    def selector(self, policy: Policy) -> OracleSelector:
        return OracleSelector(policy, self.block_q, self.block_k, self.share, self.form, self.budgets_per_head)
