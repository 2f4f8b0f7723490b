"""The oracle: the true block map, computed by dense attention, as the ceiling of what a gate can select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from seerattn.methods.method import Budget, Selectors, TopKMethod, token_budgets
from seerattn.ops.attention_map import attention_map
from seerattn.options import option
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.budgets import HeadBudgets, share_density
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.decode_policy import choose_blocks
from seerattn.selection.decode_selector import PolicyDecoder
from seerattn.selection.map_form import PUBLISHED, MapForm
from seerattn.selection.policies import Policy
from seerattn.selection.selector import AttentionContext, PolicySelector
from seerattn.selection.target_map import group_target

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

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


@dataclass(frozen=True)
class OracleDecoder(PolicyDecoder):
    """True probabilities of one token, for the heads of a KV group together.

    A block has what it has for the head that needs it most (SeerAttention-R, arXiv 2506.08889, section 2.2).

    Attributes:
        policy: how many blocks to keep.
        block_k: key block size in tokens.
        target: what a head gives to a block: the largest of its probabilities there, or their sum.
    """

    policy: Policy
    block_k: int = 64
    target: MapForm = PUBLISHED

    @property
    def block_size(self) -> int:
        """See `PolicyDecoder.block_size`."""
        return self.block_k

    @torch.no_grad()
    def select_token(self, q: Tensor, k: Tensor, context: AttentionContext) -> DecodeBlocks:
        """See `DecodeSelector.select_token`."""
        tokens, kv_heads = k.shape[2], k.shape[1]
        logits = (q.unflatten(1, (kv_heads, -1)).squeeze(3).float() @ k.float().mT) * context.scale
        if context.softcap is not None:
            logits = context.softcap * torch.tanh(logits / context.softcap)
        if context.sinks is not None:
            sinks = context.sinks.float().view(kv_heads, -1, 1).expand(len(q), -1, -1, -1)
            logits = torch.cat((logits, sinks), -1)
        blocks = (tokens - 1) // self.block_k
        shares = logits.softmax(-1)[..., : blocks * self.block_k].unflatten(-1, (blocks, self.block_k))
        shares = shares.amax(-1) if self.target.keys == "max" else shares.sum(-1)
        return choose_blocks(
            shares.amax(2).log(), self.policy, tokens=tokens, block_k=self.block_k, layer=context.layer
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
    def budgets(self) -> tuple[Budget, ...]:
        return (*super().budgets, "tokens")

    def decoders(self, model: EvalModel | None = None) -> Selectors:
        def decoder(policy: Policy) -> OracleDecoder:
            return OracleDecoder(policy, self.block_k, self.form)

        return token_budgets(decoder, sink_blocks=self.sink_blocks, settings=self.settings())

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
