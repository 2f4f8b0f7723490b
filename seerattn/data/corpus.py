"""A corpus: documents as tokens of a model, in an order that the seed draws."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_BATCH = 16  # documents a call, so that the tokenizer's threads have work
_BAR_CHARACTERS = 8_000_000  # a few seconds of tokenisation; less text shows no progress bar


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, one after the other.

    Attributes:
        tokens: int32, all documents, without special tokens.
        offsets: int64 ``[documents + 1]``, where each begins.
        dropped: documents that were too short.
        sources: what they were read from, where that is known.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    dropped: int
    sources: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens of every document."""
        return np.diff(self.offsets).tolist()

    def fingerprint(self) -> str:
        """Hash of every token and boundary."""
        return hashlib.blake2b(self.tokens.tobytes() + self.offsets.tobytes(), digest_size=12).hexdigest()


def tokenize(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    min_tokens: int,
    enough_tokens: int,
    seed: int,
    progress: bool = False,
) -> Corpus:
    """Tokenises documents in an order drawn by the seed, until there are enough tokens.

    Args:
        texts: the documents.
        tokenizer: the model's own.
        min_tokens: shorter documents are dropped.
        enough_tokens: stop there: a short run needs little of a large corpus.
        seed: draws the order.
        progress: whether large data may show a progress bar on stderr.

    Raises:
        ValueError: every document is too short.
    """
    order = list(range(len(texts)))
    random.Random(f"documents {seed}").shuffle(order)
    pieces: list[np.ndarray] = []
    total = dropped = 0
    with _Bar(shown=progress and sum(map(len, texts)) > _BAR_CHARACTERS) as bar:
        for begin in range(0, len(order), _TOKENIZER_BATCH):
            batch = [texts[i] for i in order[begin : begin + _TOKENIZER_BATCH]]
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            kept = [np.asarray(ids, dtype=np.int32) for ids in encoded if len(ids) >= min_tokens]
            dropped += len(batch) - len(kept)
            pieces += kept
            total += sum(map(len, kept))
            bar.advance_to(max(total / enough_tokens, (begin + len(batch)) / len(order)))
            if total >= enough_tokens:
                break
    if not pieces:
        raise ValueError(
            f"data must hold a document of at least two blocks, {min_tokens} tokens, got {dropped} shorter ones; "
            "use longer documents or smaller blocks"
        )
    return Corpus(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64), dropped)


class _Bar:
    """A progress bar over the share that is done."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), disable=not shown)
        self.task = self.progress.add_task("Tokenising", total=1.0)

    def advance_to(self, share: float) -> None:
        self.progress.update(self.task, completed=min(share, 1.0))

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
