"""XAttention as a method: blocks by antidiagonal sums, with one threshold or one a head (arXiv 2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.methods.method import Method, SelectorAt, Selectors
from seerattn.methods.xattention.estimate import METHOD, XAttentionSelector
from seerattn.methods.xattention.search import XAttentionSearch
from seerattn.options import option

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

_STRIDE, _BLOCK = 16, 128


@dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """XAttention; its setting is the threshold of all heads, from 0 to 1.

    With a plan of thresholds by head the setting goes from 0 to 2. Up to 1 it is a factor of all thresholds, which are
    as planned at 1; from there they go on a straight line to 1 each.
    """

    id = "xattention"
    title = "XAttention"
    kind = "training-free"
    searches = XAttentionSearch

    stride: int | None = option(None, help="Distance of the antidiagonals; default 16, or the plan's.", low=1)
    block: int | None = option(None, help="Block size in tokens; default 128, or the plan's.", low=1)
    plan: Path | None = option(None, help="File that seerattn search xattention made: a threshold for every head.")

    def check(self) -> None:
        super().check()
        if self.plan is not None and (self.stride or self.block):
            raise ValueError("stride and block must be left out where there is a plan, which has its own, got both")

    @property
    def default_name(self) -> str:
        return self.id if self.plan is None else f"{self.id} by head"

    @property
    def sizes(self) -> tuple[int, int]:
        """Stride and block in tokens.

        Raises:
            ValueError: the plan has none.
        """
        if self.plan is None:
            return self.stride or _STRIDE, self.block or _BLOCK
        return self._planned("stride"), self._planned("block")

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.sizes[1], self.sizes[1]

    @cached_property
    def rules(self) -> HeadRules | None:
        """What the plan holds."""
        return None if self.plan is None else HeadRules.load(self.plan, method=METHOD)

    @cached_property
    def thresholds(self) -> list[list[float]]:
        """The threshold of every head, of a plan.

        Raises:
            ValueError: a head has none.
        """
        try:
            return [[float(rule["threshold"]) for rule in heads] for heads in self.rules.rules]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"plan must have a threshold for every head, got one without: {error}") from error

    def _planned(self, name: str) -> int:
        value = self.rules.made.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"plan must have a {name}, got {value!r} in {self.plan}")
        return value

    def check_model(self, config: Any) -> None:
        if self.rules is not None:
            self.rules.check(describe_model(config))
            _ = self.thresholds, self.sizes

    def settings(self) -> dict[str, Any]:
        found = {"stride": self.sizes[0]}
        return found if self.rules is None else found | {"plan": self.rules.digest}

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        stride, block = self.sizes
        planned = None if self.plan is None else self.thresholds

        def at(setting: float) -> SelectorAt:
            if planned is None:
                selector = XAttentionSelector(setting, stride, block)
                return lambda layer: selector
            low, high = min(setting, 1.0), max(setting - 1.0, 0.0)
            scaled = [[low * value + high * (1 - value) for value in layer] for layer in planned]
            selector = XAttentionSelector(scaled, stride, block)
            return lambda layer: selector if planned[layer] else None

        return Selectors(at, 0.0, 1.0 if planned is None else 2.0, settings=self.settings())
