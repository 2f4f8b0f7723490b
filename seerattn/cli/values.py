"""Options that hold several values with commas between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", int, float)


def words(text: str) -> list[str]:
    """The words of an option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(name: str, text: str, kind: Callable[[str], T], least: T) -> list[T]:
    """The numbers of an option, each once.

    Raises:
        ValueError: there is none, or one is no number or too small.
    """
    try:
        values = [kind(word) for word in words(text)]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between, got {text!r}") from error
    # Written so that NaN, which compares with nothing, is refused as well.
    if not values or not all(least <= value < math.inf for value in values):
        raise ValueError(f"{name} must be at least {least} and finite, got {text!r}")
    return list(dict.fromkeys(values))
