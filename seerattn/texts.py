"""Texts from elsewhere: names shown as they are, values cut short in errors, and JSON that may be anything."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any


def visible(text: str) -> str:
    """The text with everything that does not print as a sign of its own written as an escape.

    Control characters would reach into a terminal, an SVG cannot hold them, and a lone surrogate cannot be encoded.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def all_visible(value: Any) -> Any:
    """`visible` of every text in plain JSON values, names included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {all_visible(name): all_visible(inner) for name, inner in value.items()}
    return [all_visible(inner) for inner in value] if isinstance(value, list) else value


def short(value: Any) -> str:
    """A value as Python writes it, cut where it is long or deep: what a file holds may be a million of anything."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 80
    return shown.repr(value)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, says NaN or Infinity, which are not JSON, or is nested deeper than Python follows.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
