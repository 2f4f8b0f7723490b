"""MInference as a method: the patterns that an offline search gave to every head (arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerattn.methods.method import SelectorAt, Selectors
from seerattn.methods.minference.patterns import DENSEST, SPARSEST, HeadRule, PatternSelector
from seerattn.methods.minference.search import MInferenceSearch
from seerattn.methods.planned import PlannedMethod
from seerattn.options import option

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class MInference(PlannedMethod):
    """MInference; its setting is a factor on all sizes of its rules."""

    id = "minference"
    title = "MInference"
    kind = "training-free"
    searches = MInferenceSearch

    plan: Path = option(help="File that seerattn search minference made.")
    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    @cached_property
    def layers(self) -> list[tuple[HeadRule, ...]]:
        """The rules of the heads of each layer."""
        return [tuple(map(HeadRule.from_dict, heads)) for heads in self.rules.rules]

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        _ = self.layers

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"plan": self.rules.digest, "variant": self.rules.made.get("variant")}

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        sizes = self.block_q, self.block_k

        def at(factor: float) -> SelectorAt:
            return lambda layer: PatternSelector(self.layers[layer], factor, *sizes) if self.layers[layer] else None

        return Selectors(at, SPARSEST, DENSEST, scale="log", settings=self.settings())
