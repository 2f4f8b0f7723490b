"""Texts from elsewhere: names shown as they are, values cut short in errors, and JSON that may be anything."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any


def visible(text: str) -> str:
    """The text with everything that does not print as a sign of its own written as an escape.

    Control characters would reach into a terminal, an SVG cannot hold them, and a lone surrogate cannot be encoded.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def in_markdown(text: str) -> str:
    """The text so that Markdown shows it as it is, also in a cell of a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores inside of words mark nothing up.
    return re.sub(r"[\\|*`~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text))


def in_figure(text: str) -> str:
    """The text so that matplotlib shows it as it is: between two dollar signs it would read a formula."""
    return visible(text).replace("$", r"\$")


def map_texts(value: Any, f: Callable[[str], str]) -> Any:
    """``f`` of every text in plain JSON values, names of entries included."""
    if isinstance(value, str):
        return f(value)
    if isinstance(value, Mapping):
        return {f(name): map_texts(inner, f) for name, inner in value.items()}
    return [map_texts(inner, f) for inner in value] if isinstance(value, list) else value


def short(value: Any) -> str:
    """A value as Python writes it, cut where it is long or deep: what a file holds may be a million of anything."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 80
    return shown.repr(value)


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the text.
        constants: read NaN and infinities, which are not JSON, as None.

    Raises:
        ValueError: it is none, or is nested deeper than Python follows.
    """
    try:
        return json.loads(text, parse_constant=(lambda constant: None) if constants else _refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
