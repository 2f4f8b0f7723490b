"""A search: what a method looks for offline, on a model and a text, before it can be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from seerattn.data.windows import digest
from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.options import check_options, option

if TYPE_CHECKING:
    from seerattn.hf.eval_model import EvalModel

# Called with a description and a number of steps, returns what is told of finished steps.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """What a search is to do. Its fields are its options; all of them are kept with what it finds.

    Class attributes:
        method: whose rules these are, as their file says.

    Raises:
        ValueError: an option that it may not have.
    """

    method: ClassVar[str]

    context: int = option(8192, help="Tokens of a window.", low=2)
    seed: int = option(0, help="Draws the windows.", low=0)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuses options that it may not have, or that do not go together."""
        check_options(self)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that it will run."""
        return self.context

    @property
    def needs_text(self) -> bool:
        """Whether it looks at text."""
        return True

    def made(self, model: EvalModel, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What identifies the search: its options, the text and the dtype of the model, in plain JSON types."""
        options = {name: list(of) if isinstance(of, tuple) else of for name, of in asdict(self).items()}
        return options | {"data": digest(documents), "dtype": model.dtype}

    @abstractmethod
    def run(
        self, model: EvalModel, documents: Sequence[Sequence[int]], *, progress: Progress | None = None
    ) -> HeadRules:
        """Searches.

        Args:
            model: the model.
            documents: token ids of the text.
            progress: see `Progress`.

        Returns:
            The rules. ``made["found"]`` says in numbers what was found.
        """

    def rules(
        self, model: EvalModel, documents: Sequence[Sequence[int]], rules: list[list[dict[str, Any]]], found: dict
    ) -> HeadRules:
        """What was found, as the file that a method reads."""
        made = self.made(model, documents) | {"found": found}
        return HeadRules(self.method, describe_model(model.model.config), rules, made)
