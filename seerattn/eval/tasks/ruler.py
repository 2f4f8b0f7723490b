"""Documents of RULER: made with the tokenizer at hand, about any text, and kept so that they are made once.

lm-evaluation-harness makes them when a task is loaded: 500 of each length, in tokens of a tokenizer that it reads by
name, some about essays that it downloads.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from seerattn.data.text import read_documents
from seerattn.saving import staged

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Of each length, unless some do not fit.
_DOCUMENTS = 500
WITH_ESSAYS = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}


@dataclass(frozen=True)
class RulerDocuments:
    """What RULER's documents are made of, and where they are kept.

    Attributes:
        tokenizer: lengths are in its tokens.
        lengths: tokens of documents, answers included.
        essays: text in place of the essays, as `read_documents` takes it.
        folder: keeps documents; None makes them each time.
    """

    tokenizer: PreTrainedTokenizerBase
    lengths: Sequence[int]
    essays: Sequence[str] = ()
    folder: Path | None = None

    @contextmanager
    def making(self) -> Iterator[None]:
        """Inside the ``with`` the harness makes documents of these."""
        from lm_eval.tasks.ruler import common_utils

        # It reads its tokenizer by name, with whatever code comes with it. Here it gets the one at hand.
        common_utils.get_tokenizer.cache_clear()
        reader = SimpleNamespace(from_pretrained=lambda name, **_: self.tokenizer)
        with replaced(common_utils, "AutoTokenizer", reader), self._about_essays():
            yield

    @contextmanager
    def _about_essays(self) -> Iterator[None]:
        """Gives the harness our text for its essays, cut into sentences without the model that NLTK downloads."""
        if not self.essays:
            yield
            return
        from lm_eval.tasks.ruler import prepare_niah as niah

        text = read_documents(self.essays)
        here = SimpleNamespace(load_dataset=lambda name, **_: {"text": text})
        try:
            with replaced(niah, "datasets", here), replaced(niah, "sent_tokenize", sentences):
                _forget(niah)
                yield
        finally:
            _forget(niah)

    def kept(self, task: str, limit: int | None) -> Callable[..., dict[str, Dataset]] | None:
        """What gives the harness the documents of a task that were made before; None if there are not enough."""
        if self.folder is None or not self._path(task).is_file():
            return None
        from datasets import Dataset

        with gzip.open(self._path(task), "rt", encoding="utf-8") as file:
            documents = [json.loads(line) for line in file]
        counts = Counter(document["max_length"] for document in documents)
        if any(counts[length] < (limit or _DOCUMENTS) for length in self.lengths):
            return None
        return lambda **_: {"test": Dataset.from_list(documents)}

    def keep(self, task: str, documents: Sequence[dict[str, Any]]) -> None:
        """Writes documents of a task for the next time, where there is a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        with staged(self.folder, "documents") as staging:
            (staging / self._path(task).name).write_bytes(gzip.compress(lines.encode()))

    def _path(self, task: str) -> Path:
        lengths = "-".join(map(str, self.lengths))
        return self.folder / f"{task}-{lengths}-{self._digest}.jsonl.gz"

    @cached_property
    def _digest(self) -> str:
        """Of what documents depend on beside their task and lengths."""
        text = read_documents(self.essays) if self.essays else []
        about = [version("lm_eval"), sorted(self.tokenizer.get_vocab().items()), text]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def sentences(text: str) -> list[str]:
    """The sentences of a text, which end in a full stop, a question or an exclamation mark."""
    return re.split(r"(?<=[.!?])\s+", text)


def _forget(niah: ModuleType) -> None:
    """What the harness remembers of essays."""
    niah.get_haystack.cache_clear()
    niah.cached_sent_tokenize.cache_clear()


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value for a name of a module, inside the ``with``."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
