"""The text of an answer whose tokens come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class TextStream:
    """Gives the text of tokens away as far as later ones cannot change it, up to a text that ends it.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer, and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        streams = isinstance(tokenizer, PreTrainedTokenizerFast)
        self._decoder = _Streaming(tokenizer) if streams else _Again(tokenizer)
        self._stop = stop
        self._held = max(map(len, stop), default=1) - 1
        self._tokens = 0  # that were decoded
        self._pending = ""  # text that was not given away

    def add(self, tokens: Sequence[int], *, last: bool) -> tuple[str, bool]:
        """What is new in the text of all tokens so far, and whether it ends here."""
        self._pending += "".join(map(self._decoder.add, tokens[self._tokens :]))
        self._tokens = len(tokens)
        if last:
            self._pending += self._decoder.rest()
        found = [at for one in self._stop if (at := self._pending.find(one)) >= 0]
        if found:
            return self._give(min(found)), True
        return self._give(len(self._pending) if last else max(0, len(self._pending) - self._held)), False

    def _give(self, signs: int) -> str:
        given, self._pending = self._pending[:signs], self._pending[signs:]
        return given


class _Streaming:
    """The decoder of the tokenizers library, to which a token costs the same however many there were."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # tokens that have given no text yet

    def add(self, token: int) -> str:
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        # It raises a plain Exception where bytes that are no text made marks of those before them, which were given.
        except Exception:
            self._stream, text = DecodeStream(self._held, True), self._text()
        if text is None:
            return ""
        self._held = []
        return text

    def rest(self) -> str:
        """What is left: bytes of a sign that was not written to its end, which show as marks."""
        text, self._held = self._text(), []
        return text

    def _text(self) -> str:
        return self._tokenizer.decode(self._held, skip_special_tokens=True)


class _Again:
    """Other tokenizers know no part of a text: all tokens are decoded each time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._all: list[int] = []
        self._length = 0

    def add(self, token: int) -> str:
        self._all.append(token)
        # A sign of several tokens shows as this one until it is whole.
        return self._new(self._text().rstrip("\ufffd"))

    def rest(self) -> str:
        return self._new(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._all, skip_special_tokens=True)

    def _new(self, text: str) -> str:
        new, self._length = text[self._length :], max(self._length, len(text))
        return new
