"""A choice: a method at the setting that meets a budget, which is what a measurement is taken of."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from seerattn.hf.eval_model import EvalModel, Run
from seerattn.methods.dense import Dense
from seerattn.methods.method import Budget, Method, SelectorAt, Selectors
from seerattn.results.environment import fingerprint
from seerattn.results.record import Result
from seerattn.selection.selector import LastRowsDense

# Where the cell of a result says what was asked for, and how people read it.
_ASKED = {"time": "share", "tokens": "tokens"}
UNITS = {"time": " of the time", "tokens": " tokens"}


@dataclass(frozen=True)
class Choice:
    """A method at a value of its setting.

    Attributes:
        method: the way of choosing blocks.
        selectors: its selectors on the model that is measured.
        setting: the value; None where it is not known yet, and for dense.
        asked: the density, the share of the time that dense attention takes, or the tokens that a decoded one may read;
            None where nothing was asked for.
        budget: which of these, or "own".
        last_rows_dense: query-block rows at the end that keep every block, on top of what the setting gives.
    """

    method: Method
    selectors: Selectors
    setting: float | None = None
    asked: float | None = None
    budget: Budget = "density"
    last_rows_dense: int = 0

    def __str__(self) -> str:
        asked = "" if self.asked is None else f" {self.asked:g}{UNITS.get(self.budget, '')}"
        own = " (its own policy)" if self.budget == "own" else ""
        rows = f", last {self.last_rows_dense} rows dense" if self.last_rows_dense else ""
        return f"{self.method}{asked}{own}{rows}"

    @property
    def is_dense(self) -> bool:
        """Whether it is the model as it is."""
        return self.method.kind == "dense"

    @property
    def selector_at(self) -> SelectorAt:
        """What gives the selector of each layer."""
        at = self.selectors.at(self.setting)
        return with_dense_rows(at, self.last_rows_dense) if self.last_rows_dense else at

    def on(self, model: EvalModel, *, timed: bool = False) -> AbstractContextManager[Run]:
        """The model with the choice attached, inside the ``with``; dense is the untouched model unless timed."""
        if self.is_dense and not timed:
            return model.untouched()
        if self.budget == "tokens":
            return model.decoding(self.selectors.at(self.setting))
        return model.attached(self.selector_at, timed=timed)

    def result(self, model: EvalModel, *, cell: dict[str, Any], **values: Any) -> Result:
        """A result on a model without a value yet: what it will be found by."""
        method = self.method
        weights = {"model": model.weights}
        about, settings = {}, {}
        if method.weights is not None:
            weights["gates"] = fingerprint(method.weights)
        if not self.is_dense:
            block_q, block_k = method.block_sizes
            about = {"budget": self.budget, "block_q": block_q, "block_k": block_k}
            about |= {_ASKED[self.budget]: self.asked} if self.budget in _ASKED else {}
            settings = dict(self.selectors.settings) | {"last_rows_dense": self.last_rows_dense}
            settings |= {} if self.setting is None else {"setting": self.setting}
        return Result(
            value=None,
            n=0,
            model=model.name,
            method=method.id,
            kind=method.kind,
            name=str(method),
            weights=weights,
            settings=settings,
            density=self.asked if self.budget == "density" else None,
            cell=cell | about | {"dtype": model.dtype},
            **values,
        )


DENSE = Choice(Dense(), Dense().selectors())


def with_dense_rows(at: SelectorAt, rows: int) -> SelectorAt:
    """The same selectors, each with the last query-block rows dense."""

    def selector(layer: int) -> LastRowsDense | None:
        chosen = at(layer)
        return None if chosen is None else LastRowsDense(chosen, rows)

    return selector


def at_density(
    model: EvalModel, method: Method, density: float, *, context: int = 0, last_rows_dense: int = 0
) -> Choice:
    """A method whose setting is a density, at that density: nothing need be tuned.

    Raises:
        ValueError: its setting is something else.
    """
    selectors = method.selectors(model, context=context)
    if not selectors.is_density:
        raise ValueError(f"method must have a density for its setting, got {method}; tune it in an experiment")
    return Choice(method, selectors, density, density, last_rows_dense=last_rows_dense)
