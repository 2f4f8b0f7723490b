"""Evaluation text: fixed windows of tokens from the start of whole documents."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seerattn.data.text import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# No tokenizer of note averages more characters a token over a stretch of text.
_CHARACTERS_PER_TOKEN = 12
# More tokens than a split last word can change.
_CUT_MARGIN = 32


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, BOS first where the tokenizer has one."""

    document: int
    input_ids: list[int]


def token_documents(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Reads and encodes whole documents, without special tokens.

    Args:
        sources: files, folders or the name of a dataset, see `seerattn.data.samples.read_documents`.
        tokenizer: the model's own.
        limit: the first so many documents; None for all.
        tokens: the first so many tokens of each; None for all.

    Raises:
        ValueError: no text, or what is there cannot be read.
    """
    texts = [text for text in read_documents(sources)[:limit] if text.strip()]
    if tokens is None and texts:
        # Together, so that the tokenizer uses all cores.
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [_encode(tokenizer, text, tokens) for text in texts]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> list[int]:
    """The first ``limit`` token ids; no more text is encoded than that takes."""
    start = text[: limit * _CHARACTERS_PER_TOKEN]
    ids = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) >= limit + _CUT_MARGIN:
        return ids[:limit]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit]


def cut_windows(
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    count: int | None,
    min_tokens: int | None = None,
    bos_token_id: int | None = None,
) -> list[Window]:
    """Cuts each document into consecutive windows of ``context`` tokens, the BOS included.

    Args:
        documents: token ids of whole documents.
        context: tokens of a window.
        count: at most so many windows of each document, from its start; None for all.
        min_tokens: also keep a document's last, shorter window if it has so many tokens, and so a document shorter
            than the context. None keeps full windows alone, so that figures at two contexts compare like with like.
        bos_token_id: put first in each window, if given.

    Raises:
        ValueError: no document is long enough.
    """
    head = [] if bos_token_id is None else [bos_token_id]
    step = context - len(head)
    least = context if min_tokens is None else min_tokens
    windows = []
    for number, ids in enumerate(documents):
        starts = range(0, len(ids), step)[:count]
        pieces = [head + list(ids[begin : begin + step]) for begin in starts]
        windows += [Window(number, piece) for piece in pieces if len(piece) >= max(least, 2)]
    if not windows:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"data must hold a document of at least {least} tokens, got {len(documents)} of at most {longest}; "
            "use longer documents, a smaller context, or accept shorter windows with a minimum"
        )
    return windows


def digest(documents: Sequence[Sequence[int]]) -> str:
    """Short hash of all tokens, which tells texts of the same name apart."""
    state = hashlib.sha256()
    for ids in documents:
        state.update(array("q", ids).tobytes())
        state.update(b"|")
    return state.hexdigest()[:12]


def batches(windows: Sequence[Window], size: int) -> list[list[Window]]:
    """Groups neighbouring windows of equal length, at most ``size`` together: nothing is ever padded."""
    groups: list[list[Window]] = []
    for window in windows:
        last = groups[-1] if groups else None
        if last and len(last) < size and len(last[0].input_ids) == len(window.input_ids):
            last.append(window)
        else:
            groups.append([window])
    return groups
