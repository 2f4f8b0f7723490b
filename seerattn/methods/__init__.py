"""Ways of choosing blocks: a file or folder each, found by looking, so that a new one is known by being here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from seerattn.methods.method import Method, is_method
from seerattn.options import options_of, read_options
from seerattn.texts import short

# In the order of tables.
_ORDER = ("dense", "oracle", "learned", "training-free", "static")


@cache
def methods() -> dict[str, type[Method]]:
    """All methods by id, by kind and name."""
    found: dict[str, type[Method]] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if is_method(value):
                found[value.id] = value
    return dict(sorted(found.items(), key=lambda item: (_ORDER.index(item[1].kind), item[0])))


def make_method(id: str, options: Mapping[str, Any]) -> Method:
    """A method by its id, with options by name.

    Raises:
        ValueError: no such method, or options that it does not take.
    """
    return read_options(kind_of_method(id), options, where=f"options of {id}")


def kind_of_method(id: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no such method.
    """
    if id not in methods():
        raise ValueError(f"method must be one of {', '.join(methods())}, got {short(id)}")
    return methods()[id]


def describe_methods() -> list[tuple[str, str, str, str]]:
    """Id, title, kind and options of every method, for people."""
    return [(id, of.title, of.kind, ", ".join(options_of(of))) for id, of in methods().items()]
