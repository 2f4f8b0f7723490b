"""Options: fields of dataclasses that say what they are for and what they may be, declared once.

    @dataclass(frozen=True, kw_only=True)
    class Run:
        steps: int = option(help="Optimizer steps.", low=1)
        lr: float = option(1e-3, help="Peak learning rate.", above=0)

        def __post_init__(self) -> None:
            check_options(self)

Python builds the class, YAML gives its values by name (`read_options`), and a command takes them as flags
(`seerattn.cli.options`). All three end in `check_options`, so that a value is refused in the same sentence everywhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from seerattn.texts import short

T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a field beside its type and default.

    Attributes:
        help: a sentence on what it is for.
        low: the least number, or each of several.
        high: the largest number.
        above: a number that it must be above.
        below: a number that it must be below.
        choices: the values that it may be; those of a Literal need not be told again.
        panel: the group of `--help` that it stands in; "" is the plain one.
        flag: whether it is a flag of its own on the command line; others are given as ``--set name=value``.
        repeat: whether several values are given by repeating the flag, as of paths, and not with commas between.
        forms: where the option is itself a dataclass of options: what makes one, by name. Besides itself it may be
            the name of a form, values by name, or words of both kinds such as ``["paper", "rope=false"]``.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[Any, ...] = ()
    panel: str = ""
    flag: bool = True
    repeat: bool = False
    forms: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def option(default: Any = MISSING, *, help: str, **rest: Any) -> Any:
    """A field that is an option; see `Option` for what can be told of it. Without a default it must be given."""
    return field(default=default, metadata={_KEY: Option(help=help, **rest)})


def options_of(kind: type) -> dict[str, tuple[Field, Any, Option]]:
    """The options of a dataclass by name: the field, its type, and what is known of it."""
    hints = _hints(kind)
    return {f.name: (f, hints[f.name], f.metadata[_KEY]) for f in fields(kind) if _KEY in f.metadata}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_options(instance: Any) -> None:
    """Refuses values that an option may not have; lists become the tuples that their fields are.

    Raises:
        ValueError: names the option, what it must be, and what came.
    """
    for name, (known, hint, about) in options_of(type(instance)).items():
        given = getattr(instance, name)
        value = _formed(name, given, hint, about) if about.forms else _converted(given, hint)
        # None of several is a value where it is the default.
        nothing = value == () and known.default != ()
        if nothing or not _fits(value, hint) or not all(_allowed(one, about) for one in _each(value)):
            raise ValueError(f"{name} must be {_described(hint, about)}, got {short(given)}")
        if value is not given:
            object.__setattr__(instance, name, value)


def read_options(kind: type[T], values: Mapping[str, Any], *, where: str = "options", **rest: Any) -> T:
    """Builds a dataclass from values by name, as YAML or a command line gives them.

    Args:
        kind: the dataclass.
        values: its options.
        where: what the values are of, for errors.
        rest: further fields, which are no options.

    Raises:
        ValueError: a name that is none of its options, one that is missing, or a value that it may not have.
    """
    known = options_of(kind)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{where} must be among {', '.join(known)}, got {short(unknown[0])}")
    missing = [name for name, (f, _, _) in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"{where} must have {' and '.join(missing)}, got none")
    return kind(**values, **rest)


def parse_options(kind: type, words: Sequence[str], *, where: str = "options") -> dict[str, Any]:
    """Values of options that are given as ``name=value``, read as the types of their fields.

    Raises:
        ValueError: no such option, or a value of another type.
    """
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in options_of(kind):
            raise ValueError(f"{where} must be NAME=VALUE, of {', '.join(options_of(kind))}, got {short(word)}")
        found[name] = parse_value(name, text.strip(), options_of(kind)[name][1])
    return found


def parse_value(name: str, text: str, hint: Any) -> Any:
    """A value out of the text of a command line, by the type that it must be of; several have commas or spaces between.

    Raises:
        ValueError: the text is no such value.
    """
    inner = [one for one in get_args(hint) if one is not NoneType] if _is_union(hint) else [hint]
    if NoneType in get_args(hint) and text.lower() in ("", "none"):
        return None
    for one in inner:
        if get_origin(one) is tuple:
            words = text.replace(",", " ").split()
            return tuple(parse_value(name, word, get_args(one)[0]) for word in words)
        if one is bool and text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        if one in (int, float):
            try:
                return one(text)
            except ValueError:
                continue
        if one in (str, Path) or get_origin(one) is Literal:
            return Path(text) if one is Path else text
    raise ValueError(f"{name} must be {_described(hint, Option(help=''))}, got {short(text)}")


def choices_of(hint: Any, about: Option) -> tuple[Any, ...]:
    """The values that an option may be, or each of several; none where they are not counted."""
    if about.choices or get_origin(hint) is Literal:
        return about.choices or get_args(hint)
    kinds = get_args(hint) if _is_union(hint) or get_origin(hint) is tuple else ()
    return next((found for kind in kinds if (found := choices_of(kind, about))), ())


def nested(hint: Any) -> type | None:
    """The dataclass of options that an option is itself, if it is one."""
    return next((kind for kind in (hint, *get_args(hint)) if has_options(kind)), None)


def _formed(name: str, given: Any, hint: Any, about: Option) -> Any:
    """A dataclass out of what YAML or a command line says of it; what is one already, or none, stays."""
    kind = nested(hint)
    if given is None or isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return read_options(kind, given, where=name)
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{name} must be {', '.join(about.forms)} or values by name, got {short(given)}")
    forms = [word for word in words if "=" not in word]
    if len(forms) > 1 or not set(forms) <= set(about.forms):
        raise ValueError(f"{name} must be one of {', '.join(about.forms)}, or NAME=VALUE, got {short(forms[-1])}")
    values = parse_options(kind, [word for word in words if "=" in word], where=name)
    return about.forms[forms[0]](**values) if forms else kind(**values)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _each(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple) else (value,)


def _converted(value: Any, hint: Any) -> Any:
    """Lists as tuples, one value for several, whole numbers as such, and texts as paths, where the field asks so."""
    kinds = get_args(hint) if _is_union(hint) else (hint,)
    several = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if several is not None and value is not None:
        inner = get_args(several)[0]
        values = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_converted(one, inner) for one in values)
    if isinstance(value, str) and Path in kinds and str not in kinds:
        return Path(value)
    whole = isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds
    if float in kinds and int not in kinds and isinstance(value, int) and _fits(value, float):
        return float(value)
    return int(value) if whole else value


def _fits(value: Any, hint: Any) -> bool:
    if _is_union(hint):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        # A whole number may have more digits than any float.
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and abs(value) <= sys.maxsize
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    return hint is Any or isinstance(value, hint)


def _allowed(value: Any, about: Option) -> bool:
    if about.choices and value is not None:
        return value in about.choices
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    return about.low <= value <= about.high and about.above < value < about.below


def _described(hint: Any, about: Option) -> str:
    """What a value must be, for the sentence that refuses another one."""
    kinds = [one for one in get_args(hint) if one is not NoneType] if _is_union(hint) else [hint]
    names = [_named(kind, about) for kind in kinds]
    bounds = [
        f"{word} {value}"
        for word, value in (
            ("at least", about.low),
            ("above", about.above),
            ("at most", about.high),
            ("below", about.below),
        )
        if math.isfinite(value)
    ]
    none = " or none" if NoneType in get_args(hint) else ""
    return " ".join([" or ".join(names), " and ".join(bounds)]).strip() + none


def _named(kind: Any, about: Option) -> str:
    if get_origin(kind) is tuple:
        return f"one or several, each {_named(get_args(kind)[0], about)}"
    if choices_of(kind, about):
        return f"one of {', '.join(map(str, choices_of(kind, about)))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def has_options(kind: Any) -> bool:
    """Whether a type is a dataclass with options."""
    return isinstance(kind, type) and is_dataclass(kind) and bool(options_of(kind))
