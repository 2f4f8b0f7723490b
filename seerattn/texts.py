"""Texts and values from elsewhere: names shown as they are, values cut short in errors, JSON of the expected kinds."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

# What opens a compressed file, by its suffix, and what that raises of one that is damaged.
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)


def read_decompressed(path: Path) -> bytes:
    """What a file holds, decompressed where its suffix says so.

    Raises:
        ValueError: it is no whole file of its kind.
        OSError: it cannot be read.
    """
    if path.suffix not in OPENERS:
        return path.read_bytes()
    try:
        with OPENERS[path.suffix](path) as file:
            return file.read()
    except DAMAGED as error:
        raise ValueError(f"{path} must be a whole {path.suffix} file, got a damaged one: {error}") from error


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


def check_kinds(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "") -> None:
    """Refuses JSON values that are not of the types that they have where they are there.

    Raises:
        ValueError: names the first one.
    """
    wrong = [name for name in hints if name in values and not fits(values[name], hints[name])]
    if wrong:
        kind = getattr(hints[wrong[0]], "__name__", str(hints[wrong[0]]))
        raise ValueError(f"{where}{wrong[0]} must be {kind}, got {short(values[wrong[0]])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type, numbers finite."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        # A whole number may have more digits than any float.
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is not int or abs(value) < 2**63)
