"""Text for distillation: files or a `datasets` name, tokens, and a sample of exactly `context` tokens for every index.

A sample is a function of the seed and its index alone, so a run that is resumed, or spread over more processes, sees
what an uninterrupted run on one process sees.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seerattn.eval.documents import training_document
from seerattn.training.packing import SamplePlan, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TOKENIZER_BATCH = 16  # documents a call, so that the tokenizer's threads have work
_BAR_CHARACTERS = 8_000_000  # a few seconds of tokenisation; less text shows no progress bar


def read_documents(sources: Sequence[str | Path]) -> list[str]:
    """Reads documents in the order of the sources.

    Args:
        sources: each a file, a folder (searched for files, in the order of their names), or the name of a dataset
            with a text column (its train split, or another one as ``name:split``). Files are ``.jsonl`` with an
            object with a ``text`` a line, or ``.txt`` with one document a file; ``.gz``, ``.bz2`` and ``.xz`` are
            decompressed.

    Raises:
        ValueError: a source does not exist, cannot be read, or holds no text.
    """
    documents: list[str] = []
    for source in sources:
        path = Path(source)
        # A dataset is called `name` or `owner/name`; anything else that does not exist is a path with a mistake in it.
        if not path.exists() and not path.suffix and not path.is_absolute() and len(path.parts) <= 2:
            documents += _read_dataset(str(source))
            continue
        texts = [text for file in _files(path) for text in _read_file(file) if text.strip()]
        if not texts:
            raise ValueError(f"data must hold text, got none in {path}")
        documents += texts
    return documents


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"data must exist, got {path}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    if not found or not all(map(_kind, found)):
        raise ValueError(f"data must be .jsonl or .txt, plain or .gz, .bz2 or .xz, got {path}")
    return found


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, compression aside."""
    name = path.with_suffix("") if path.suffix in _OPENERS else path
    return name.suffix if name.suffix in (".jsonl", ".txt") else None


def _read_file(path: Path) -> Iterator[str]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            if _kind(path) == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)["text"] if line.strip() else ""
                # An array in an array in an array ends the recursion before it ends.
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f'data must hold an object with a "text", got line {number} of {path}') from error
                if not isinstance(text, str):
                    raise ValueError(f'"text" must be a string, got {type(text).__name__} in line {number} of {path}')
                if not _encodes(text):
                    raise ValueError(f'"text" must be Unicode text, got half a surrogate in line {number} of {path}')
                yield text
    # What damaged archives and files that are no text raise.
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"data must be readable UTF-8 text, got {path}: {error}") from error


def _encodes(text: str) -> bool:
    """Whether UTF-8 and with it any tokenizer can hold a text; JSON can say what they cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_dataset(source: str) -> list[str]:
    name, _, split = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"data must exist, got {source}; to load a dataset of that name, install datasets") from error
    try:
        dataset = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"data must exist or be the name of a dataset, got {source}: {error}") from error
    if "text" not in dataset.column_names:
        raise ValueError(f"data must have a text column, got {dataset.column_names} in {source}")
    texts = [text for text in dataset["text"] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"data must have text in its text column, got {dataset.features['text']} in {source}")
    found = [text for text in texts if text.strip()]
    if not found:
        raise ValueError(f"data must hold text, got none in {source}")
    return found


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


class Samples(Dataset):
    """Samples of ``context`` tokens, by index.

    Each is ``{"input_ids", "position_ids"}``, int64 ``[context]``. Positions begin anew with every document, which is
    what tells packed documents apart.

    Args:
        corpus: the tokenised documents.
        tokenizer: the model's own; its beginning-of-sequence token, if it has one, begins every document and window.
        count: number of samples.
        context: tokens of a sample, a multiple of ``block``.
        block: tokens of a block, the larger one if queries and keys differ.
        recall_share: share of samples that are synthetic recall documents laid into the text.
        seed: draws everything.

    Raises:
        ValueError: recall documents are asked for and the text or the context is too short for them.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int,
        context: int,
        block: int,
        recall_share: float,
        seed: int,
    ) -> None:
        self.corpus, self.tokenizer, self.context = corpus, tokenizer, context
        self.bos_token_id = tokenizer.bos_token_id
        lengths = corpus.lengths
        self.plan = SamplePlan(
            lengths,
            count=count,
            context=context,
            head=0 if self.bos_token_id is None else 1,
            block=block,
            recall_share=recall_share,
            seed=seed,
        )
        self.haystacks = [i for i, length in enumerate(lengths) if length >= context]
        if recall_share:
            if not self.haystacks:
                raise ValueError(
                    f"recall_share needs a document of at least {context} tokens to hide facts in, got "
                    f"{max(lengths)} at most; use longer documents, a shorter context or recall_share 0"
                )
            self._recall_document(random.Random(seed))

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        segments = self.plan[index]
        if segments is None:
            rng = self.plan.rng(index)
            rng.random()
            return {
                "input_ids": torch.tensor(self._recall_document(rng)),
                "position_ids": torch.arange(self.context),
            }
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        pieces = [np.concatenate((np.asarray(head, dtype=np.int64), self._tokens(s))) for s in segments]
        return {
            "input_ids": torch.from_numpy(np.concatenate(pieces)),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(len(piece)) for piece in pieces])),
        }

    def _tokens(self, segment: Segment) -> np.ndarray:
        begin = self.corpus.offsets[segment.document] + segment.start
        return self.corpus.tokens[begin : begin + segment.length]

    def _recall_document(self, rng: random.Random) -> list[int]:
        document = rng.choice(self.haystacks)
        begin, end = self.corpus.offsets[document : document + 2]
        haystack = self.corpus.tokens[begin:end]
        return training_document(self.tokenizer, haystack, self.context, rng, bos_token_id=self.bos_token_id).input_ids


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples; where one of them is packed, ``segment_ids`` number the documents of every row."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    segment_ids = (batch["position_ids"] == 0).cumsum(1) - 1
    return batch | {"segment_ids": segment_ids} if segment_ids.any() else batch
