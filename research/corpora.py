"""Text that research trains and measures on, tokenised once and kept in one folder, so that a copy of it can travel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from seerattn.data.corpus import Corpus, tokenize
from seerattn.data.text import read_documents
from seerattn.data.windows import token_documents
from seerattn.saving import write_whole


def write_corpora(
    folder: Path,
    *,
    model: Path,
    train: Sequence[str],
    tests: Mapping[str, Sequence[str]],
    context: int,
    train_tokens: int,
    documents: int,
    seed: int,
) -> None:
    """Writes the tokenised texts to ``folder``, unless they are there.

    Args:
        folder: of the texts.
        model: folder with the tokenizer.
        train: files to train on; documents shorter than ``context`` are left out.
        tests: files to measure on, by name; the first ``documents`` of each that are long enough.
        context: longest context, in tokens.
        train_tokens: tokens of text to train on that are enough.
        documents: most documents of each text to measure on.
        seed: draws the order of the training documents.

    Raises:
        ValueError: no text, none long enough, or the folder holds the tokens of other options.
    """
    about = folder / "about.json"
    wanted = {"context": context, "train_tokens": train_tokens, "documents": documents, "seed": seed}
    if about.exists():
        if json.loads(about.read_text()) != wanted:
            raise ValueError(f"output must hold tokens of {wanted}, got {about.read_text()}; use another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = read_documents(train)
    print(f"tokenising {len(texts)} documents", flush=True)
    enough = {"enough_tokens": train_tokens, "seed": seed, "progress": True}
    found = {"train": tokenize(texts, tokenizer, min_tokens=context, **enough)}
    for name, sources in tests.items():
        chosen = [ids for ids in token_documents(sources, tokenizer, tokens=context) if len(ids) >= context]
        chosen = chosen[:documents]
        if not chosen:
            raise ValueError(f"{name} must hold a document of {context} tokens, got none in {', '.join(sources)}")
        offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
        found[name] = Corpus(np.concatenate([np.asarray(ids) for ids in chosen]), offsets, 0)
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    for name, corpus in found.items():
        np.savez_compressed(folder / f"{name}.npz", tokens=corpus.tokens.astype(dtype), offsets=corpus.offsets)
        print(f"{name}: {len(corpus.lengths)} documents of {len(corpus.tokens):,} tokens", flush=True)
    write_whole(about, json.dumps(wanted) + "\n")


def load_corpus(folder: Path, name: str) -> Corpus:
    """One of the texts that `write_corpora` wrote."""
    with np.load(folder / f"{name}.npz") as arrays:
        return Corpus(arrays["tokens"].astype(np.int32), arrays["offsets"], 0)


def documents_of(corpus: Corpus) -> list[list[int]]:
    """Token ids of each document."""
    return [ids.tolist() for ids in np.split(corpus.tokens, corpus.offsets[1:-1])]


def whole_lines(path: Path) -> list[str]:
    """Whole lines of a file; none if it is missing."""
    found = path.read_text().splitlines(True) if path.exists() else []
    return [line for line in found if line.endswith("\n")]
