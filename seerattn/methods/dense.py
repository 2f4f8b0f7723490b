"""Dense attention: the model as it is, which everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seerattn.methods.method import Budget, Method, Selectors

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """No blocks are chosen and none are left out; there is nothing to set."""

    id = "dense"
    title = "dense"
    kind = "dense"

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return ()

    @property
    def block_sizes(self) -> tuple[int, int]:
        return 64, 64

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        return Selectors(lambda setting: lambda layer: None, 1.0, 1.0)
