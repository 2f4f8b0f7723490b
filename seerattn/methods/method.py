"""A method: one way of choosing blocks, with its options, and one number that sets how many blocks it keeps.

A method is one file of this folder, or a folder where it searches, and nothing else knows its name. Each brings a
number of its own: a density, a share of the mass, a number of tokens. To compare methods at equal density, or at equal
time, that number is tuned; `Selectors` is all that tuning needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from seerattn.options import check_options, option, options_of
from seerattn.results.record import Kind
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.map_form import MapForm
from seerattn.selection.policies import Policy, TokenBudget, TopK
from seerattn.selection.selector import Selector

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

# "own" is the setting that a method brings along, such as the policy saved with gates; "tokens" are those that a token
# which is decoded may read.
Budget = Literal["density", "time", "own", "tokens"]
SelectorAt = Callable[[int], Selector | None]
DecoderAt = Callable[[int], DecodeSelector | None]


@runtime_checkable
class MapSelector(Protocol):
    """A selector that chooses by a true map, so that a map that is already there need not be computed again."""

    target: MapForm

    def choose(self, target: Tensor, *, q_len: int, k_len: int, kv_heads: int, layer: int) -> BlockIndices:
        """Chooses from the map ``target`` ``[B, H, Nq, Nk]``, as of `attention_map`."""
        ...


@dataclass(frozen=True, eq=False)
class Selectors:
    """What chooses the blocks, for every value of the setting.

    Attributes:
        at: from a value of the setting to what gives the selector of each layer, or its `DecodeSelector`.
        sparsest: the value that keeps the fewest blocks.
        densest: the value that keeps the most; density does not fall on the way there.
        scale: whether equal steps or equal factors of the setting are about equal steps of density.
        is_density: whether the setting is the density itself, of `TopK` with the same number of blocks in every row.
        settings: what defines the method beside its setting, in plain JSON types; part of what identifies a result.
    """

    at: Callable[[float], SelectorAt | DecoderAt]
    sparsest: float
    densest: float
    scale: Literal["linear", "log"] = "linear"
    is_density: bool = False
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way of choosing blocks. Its fields are its options.

    Class attributes:
        id: what records, recipes and commands call it.
        title: what people call it.
        kind: what it looks at, see `seerattn.results.record.KINDS`.
        searches: its offline search, a `seerattn.methods.search.Search`, if it has one.

    Raises:
        ValueError: an option that it may not have.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Kind]
    searches: ClassVar[type | None] = None

    name: str = option("", help="What tables call it; default: its id.")

    def __post_init__(self) -> None:
        self.check()

    def __str__(self) -> str:
        return self.name or self.default_name

    @property
    def default_name(self) -> str:
        """What tables call it where no name was given."""
        return self.id

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What it can be run at: its setting is tuned to a density or a time, is its own, or bounds decoded tokens."""
        return "density", "time"

    @property
    def weights(self) -> Path | None:
        """The folder of weights that it brings, whose fingerprint stands in records; None for most."""
        return None

    @property
    @abstractmethod
    def block_sizes(self) -> tuple[int, int]:
        """Query and key block size in tokens."""

    def check(self) -> None:
        """Refuses options that it may not have, or that do not go together.

        Raises:
            ValueError: says which.
        """
        check_options(self)

    def check_model(self, config: Any) -> None:  # noqa: B027, as most look at nothing of a model
        """Refuses a model that it cannot be used with, before the model is loaded.

        Args:
            config: the model's transformers configuration.

        Raises:
            ValueError: gates or a plan that are missing, damaged or of another model.
        """

    @abstractmethod
    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        """What chooses the blocks on a model, of prompts of a length; most look at neither."""

    def decoders(self, model: EvalModel | None = None) -> Selectors:
        """What chooses the blocks of decoded tokens, by how many tokens each may read, forced blocks included.

        Raises:
            ValueError: "tokens" are none of its `budgets`.
        """
        raise ValueError(f"method must choose for decoded tokens, got {self}; its budgets are {self.budgets}")

    def settings(self) -> dict[str, Any]:
        """The options that define it, in plain JSON types; names, sizes of blocks and files are told elsewhere."""
        apart = ("name", "block", "block_q", "block_k")
        values = {name: getattr(self, name) for name in options_of(type(self)) if name not in apart}
        return {name: value for name, value in values.items() if not isinstance(value, Path) and value is not None}


@dataclass(frozen=True, kw_only=True)
class TopKMethod(Method):
    """A method that scores blocks and leaves the choice to `TopK`, whose density is its setting."""

    block_q: int = option(64, help="Query block size in tokens.", low=1)
    block_k: int = option(64, help="Key block size in tokens.", low=1)
    sink_blocks: int = option(1, help="First key blocks that every row keeps.", low=0)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.block_q, self.block_k

    @abstractmethod
    def selector(self, policy: Policy) -> Selector:
        """The selector of every layer, under a policy."""

    def selectors(self, model: EvalModel | None = None, *, context: int = 0) -> Selectors:
        def at(density: float) -> SelectorAt:
            selector = self.selector(TopK(density=density, sink_blocks=self.sink_blocks))
            return lambda layer: selector

        return Selectors(at, sparsest=1e-3, densest=1.0, is_density=True, settings=self.settings())


def token_budgets(decoder: Callable[[Policy], DecodeSelector], *, sink_blocks: int, settings: Mapping) -> Selectors:
    """The decoders of every layer under a `TokenBudget`, whose tokens are the setting."""

    def at(tokens: float) -> DecoderAt:
        chosen = decoder(TokenBudget(tokens=int(tokens), sink_blocks=sink_blocks))
        return lambda layer: chosen

    return Selectors(at, sparsest=1, densest=float("inf"), settings=settings)


def is_method(value: Any) -> bool:
    """Whether something is a method that can be used: a class that says its id."""
    return isinstance(value, type) and issubclass(value, Method) and "id" in vars(value)
