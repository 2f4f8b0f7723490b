"""A task: what is measured, on which text, and at which contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seerattn.data.text import BOOKS
from seerattn.options import check_options, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seerattn.eval.choice import Choice
    from seerattn.hf.eval_model import EvalModel
    from seerattn.results.file import ResultsFile
    from seerattn.results.record import Result

# Called with a description and a number of steps, returns what is told of finished steps.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, eq=False)
class Setup:
    """What tasks make their text with.

    Attributes:
        tokenizer: the model's.
        contexts: of the experiment, in tokens.
        limit: at most so many documents; 0 for all.
        longest: tokens that the model can take; 0 where it does not say.
    """

    tokenizer: PreTrainedTokenizerBase
    contexts: tuple[int, ...]
    limit: int = 0
    longest: int = 0


@dataclass(frozen=True, eq=False)
class Job(ABC):
    """A task at a context, with its text.

    Attributes:
        task: name of the task.
        text: what results call the text.
        context: tokens of a sequence.
        sequences: token ids of what is measured; settings are tuned on the first of them.
        settings: what identifies the text in results.
    """

    task: str
    text: str
    context: int
    sequences: list[list[int]]
    settings: dict[str, Any] = field(default_factory=dict)

    # Whether all methods are measured in one pass of the dense model.
    together: ClassVar[bool] = False
    # Whether the dense model has a value of its own.
    has_dense: ClassVar[bool] = True
    # Tokens that each decoded token may read, where decoding is measured; empty where prompts are.
    decode_tokens: ClassVar[tuple[int, ...]] = ()
    # Whether results are compared with those of the dense model, which are then needed first.
    beside_dense: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.task} on {self.text} at {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens that one measurement runs through the model."""
        return sum(map(len, self.sequences))

    @abstractmethod
    def measure(
        self,
        model: EvalModel,
        choices: Sequence[Choice],
        output: ResultsFile,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Measures choices; what the output holds already is not measured again.

        Returns:
            The results of these choices.
        """


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A measurement. Its fields are its options.

    Class attributes:
        id: what records, recipes and commands call it.
        decode_tokens: what decoded tokens may read, an option of tasks that can measure decoding.

    Raises:
        ValueError: an option that it may not have.
    """

    id: ClassVar[str]
    decode_tokens: ClassVar[tuple[int, ...]] = ()

    data: tuple[str, ...] = option((), help="Text: files, folders, datasets; default: the books that come with it.")
    text: str = option("", help="What results call the text; default: the name of the data.")
    contexts: tuple[int, ...] = option((), help="Context lengths in tokens; default: those of the experiment.", low=2)
    max_docs: int = option(0, help="The first so many documents of the data; 0 for all.", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the text comes from.

        Raises:
            ValueError: nothing was named, and the books that come with the project are not here.
        """
        if self.data:
            return self.data
        if not (BOOKS / "evaluate").is_dir():
            raise ValueError(f"data must be given, got none and no books at {BOOKS}; name a file, folder or dataset")
        return (str(BOOKS / "evaluate"),)

    @property
    def called(self) -> str:
        """What results call the text."""
        shipped = self.sources == (str(BOOKS / "evaluate"),)
        names = dict.fromkeys(Path(source).name.split(".")[0] for source in self.sources)
        return self.text or ("books" if shipped else "+".join(names))

    def check(self) -> None:
        """Refuses what cannot be measured here, such as text that is not there, before a model is loaded.

        Raises:
            ValueError: says what is missing.
        """
        for source in self.sources:
            path = Path(source)
            # As `read_documents` takes it: what has no suffix and two parts at most may be a dataset.
            dataset = not path.suffix and not source.startswith((".", "/", "~")) and source.count("/") < 2
            if not path.exists() and not dataset:
                raise ValueError(f"data must exist, got {path}")

    @abstractmethod
    def jobs(self, setup: Setup) -> list[Job]:
        """The task at each of its contexts, or at those of the experiment if it names none.

        Raises:
            ValueError: text that is missing, or too short for a context.
        """
