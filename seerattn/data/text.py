"""Reading text: files of documents, folders of such files, or the name of a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from seerattn.extras import check_extra
from seerattn.texts import DAMAGED, OPENERS

# The books that come with the project: "distill" to train and calibrate on, "evaluate" to measure on.
BOOKS = Path(__file__).parents[2] / "assets" / "books"


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
    name = path.with_suffix("") if path.suffix in OPENERS else path
    return name.suffix if name.suffix in (".jsonl", ".txt") else None


def _read_file(path: Path) -> Iterator[str]:
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
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
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise ValueError(f"data must be readable UTF-8 text, got {path}: {error}") from error


def _encodes(text: str) -> bool:
    """Whether UTF-8 and with it any tokenizer can hold a text; JSON can say what they cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_dataset(source: str) -> list[str]:
    check_extra("train", f"data {source}, which is no file or folder and so the name of a dataset,")
    from datasets import load_dataset

    name, _, split = source.partition(":")
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
