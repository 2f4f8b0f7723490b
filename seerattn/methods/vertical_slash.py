"""Vertical-slash: the same numbers of columns and diagonals in every head (MInference, arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seerattn.methods.method import Method, SelectorAt, Selectors
from seerattn.methods.minference.patterns import DENSEST, SPARSEST, HeadRule, PatternSelector
from seerattn.options import option

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(Method):
    """Vertical-slash; its setting is a factor on both sizes.

    (1000, 6096) is what MInference's repository runs where it has no plan and most heads of its plans have; its plans
    of Llama-3.1 have (512, 2048) in every head.
    """

    id = "vertical_slash"
    title = "vertical-slash"
    kind = "training-free"

    columns: int = option(1000, help="Columns that a head keeps.", low=1)
    offsets: int = option(6096, help="Diagonals that a head keeps.", low=1)
    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        rule = HeadRule("vertical_slash", self.columns, self.offsets)

        def at(factor: float) -> SelectorAt:
            selector = PatternSelector((rule,), factor, self.block_q, self.block_k)
            return lambda layer: selector

        return Selectors(at, SPARSEST, DENSEST, scale="log", settings=self.settings())
