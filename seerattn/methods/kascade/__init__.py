"""Kascade as a method: a few layers choose by their true map, the others reuse what those chose (arXiv 2512.16391)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerattn.methods.kascade.layers import AnchorSelector, LayerRule, Lists, ReuseSelector
from seerattn.methods.kascade.search import KascadeSearch
from seerattn.methods.method import SelectorAt, Selectors
from seerattn.methods.planned import PlannedMethod
from seerattn.options import option
from seerattn.selection.policies import TopK
from seerattn.selection.selector import Selector

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class Kascade(PlannedMethod):
    """Kascade; its setting is the density of `TopK` in all layers but the first ones, which are dense."""

    id = "kascade"
    title = "Kascade"
    kind = "training-free"
    searches = KascadeSearch

    plan: Path = option(help="File that seerattn search kascade made.")
    sink_blocks: int = option(1, help="First key blocks that every row keeps.", low=0)

    @cached_property
    def layers(self) -> dict[int, LayerRule]:
        """The anchor of each layer that is not dense, and of which of its KV heads each KV head takes the blocks.

        Raises:
            ValueError: a head without a rule, or an anchor that has none itself.
        """
        group = self.rules.model["heads"] // self.rules.model["kv_heads"]
        try:
            found = {
                layer: LayerRule(int(heads[0]["anchor"]), tuple(int(rule["head"]) for rule in heads[::group]))
                for layer, heads in enumerate(self.rules.rules)
                if heads
            }
            if not all(found[rule.anchor].anchor == rule.anchor <= layer for layer, rule in found.items()):
                raise ValueError("an anchor that is none")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"plan must give every head an anchor and one of its heads, got one with {error}"
            ) from error
        return found

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.rules.made.get("block_q", 64), self.rules.made.get("block_k", 64)

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        _ = self.layers

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"plan": self.rules.digest}

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        block_q, block_k = self.block_sizes

        def at(density: float) -> SelectorAt:
            policy = TopK(density=density, sink_blocks=self.sink_blocks)
            lists = {anchor: Lists() for anchor in {rule.anchor for rule in self.layers.values()}}
            made: dict[int, Selector] = {
                layer: AnchorSelector(policy, lists[layer], block_q, block_k)
                if rule.anchor == layer
                else ReuseSelector(lists[rule.anchor], rule.heads)
                for layer, rule in self.layers.items()
            }
            return made.get

        return Selectors(at, sparsest=1e-3, densest=1.0, settings=self.settings())
