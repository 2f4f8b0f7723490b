"""MoA as a method: every head its own span, at any density, from the profile of a model (arXiv 2406.14909)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerattn.methods.method import Selectors
from seerattn.methods.moa.profile import BLOCK, Profile
from seerattn.methods.moa.search import MoaSearch
from seerattn.methods.moa.spans import bounded_selectors
from seerattn.methods.planned import PlannedMethod
from seerattn.options import option

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class MoA(PlannedMethod):
    """MoA; its setting bounds the share of the causal area that is computed at one length."""

    id = "moa"
    title = "MoA"
    kind = "training-free"
    searches = MoaSearch

    plan: Path = option(help="File that seerattn search moa made.")
    length: int | None = option(None, help="Tokens at which density is bounded; default: the profile's longest.", low=2)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return BLOCK, BLOCK

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        Profile.of(self.rules)

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        return bounded_selectors(self.rules, length=self.length)
