"""Flags out of options: a command takes dataclasses, and its flags, YAML file and help come from their fields.

    @from_options
    def distill(config: DistillConfig, model: Annotated[str, typer.Option(help="...")]) -> None: ...

Every option that is a flag becomes ``--its-name``, every other one is given as ``--set name=value``. A file of
``--config`` gives values by name; what stands on the command line goes before it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from seerattn.options import (
    choices_of,
    has_options,
    nested,
    options_of,
    parse_options,
    parse_value,
    read_options,
)
from seerattn.texts import short, visible
from seerattn.yaml_files import read_yaml

_METAVARS = {int: "NUMBER", float: "NUMBER", Path: "PATH"}
_CONFIG = "YAML file of options by name; flags go before it."
_SET = "A rarer option, may be repeated."


def from_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of the dataclasses that it takes; it is called with them built and checked."""
    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters
    kinds = {name: hints[name] for name in given if has_options(hints[name])}
    own = [p.replace(annotation=hints[name]) for name, p in given.items() if name not in kinds]
    flags = [
        _parameter(name, *known) for kind in kinds.values() for name, known in options_of(kind).items() if known[2].flag
    ]
    rest = {n: known for kind in kinds.values() for n, known in options_of(kind).items() if not known[2].flag}
    if rest:
        told = " ".join(_told(name, *known) for name, known in rest.items())
        flags.append(_keyword("set_", list[str] | None, f"{_SET} {told}", "--set", metavar="NAME=VALUE"))
    flags.append(_keyword("config_", Path | None, _CONFIG, "--config", metavar="PATH"))

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        file, words = arguments.pop("config_"), arguments.pop("set_", None) or []
        # An experiment knows which of its values are places beside the file.
        read = next((kind.read_file for kind in kinds.values() if hasattr(kind, "read_file")), read_yaml)
        values = {} if file is None else read(file)
        known = {name for kind in kinds.values() for name in options_of(kind)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"{file} must hold options among {', '.join(sorted(known))}, got {short(unknown[0])}")
        for kind in kinds.values():
            mine = [word for word in words if _name_of(word) in options_of(kind)]
            values |= parse_options(kind, mine, where="set")
            for name, (_, hint, about) in options_of(kind).items():
                text = arguments.pop(name) if about.flag else None
                # What is empty was given, too; a flag that may be repeated comes as an empty list where it was not.
                if isinstance(text, str):
                    values[name] = parse_value(name, text, hint)
                elif text not in (None, []):
                    values[name] = text
        lost = [word for word in words if _name_of(word) not in rest]
        if lost:
            raise ValueError(f"set must be NAME=VALUE of {', '.join(rest)}, got {visible(lost[0])}")
        built = {
            name: read_options(kind, {n: values[n] for n in options_of(kind) if n in values})
            for name, kind in kinds.items()
        }
        command(**arguments, **built)

    # Those without a default first, as Python has it.
    own.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *flags]]
    wrapped.__signature__ = inspect.Signature(keyword)
    return wrapped


def _parameter(name: str, field: Any, hint: Any, about: Any) -> inspect.Parameter:
    """The flag of one option. Its own default is None, so that one that is given is told from one that is not."""
    kinds = [one for one in get_args(hint) if one is not NoneType] or [hint]
    kinds = kinds if get_origin(hint) not in (Literal, tuple) else [hint]
    rest: dict[str, Any] = {"rich_help_panel": about.panel or None}
    help = about.help if get_origin(hint) is Literal else _helped(hint, about)
    names: tuple[str, ...] = ()
    if bool in kinds:
        kind: Any = bool | None
        # What is off needs no flag that turns it off.
        names = () if field.default else (f"--{name.replace('_', '-')}",)
    elif get_origin(hint) is Literal:
        kind = hint | None
    elif about.forms:
        kind = list[str] | None
        rest["metavar"] = "FORM or NAME=VALUE"
        told = " ".join(_told(name, *known) for name, known in options_of(nested(hint)).items())
        help += f" May be repeated. FORM is {' or '.join(about.forms)}. {told}"
    elif about.repeat:
        kind = list[str] | None
        rest["metavar"] = "TEXT"
    else:
        kind = str | None
        rest["metavar"] = _METAVARS.get(kinds[0], "TEXT" if get_origin(kinds[0]) is not tuple else "VALUE,...")
    if field.default is MISSING:
        return _keyword(name, kind, f"{help} Must be given.", *names, **rest)
    return _keyword(name, kind, help, *names, show_default=_shown(field.default), **rest)


def _keyword(name: str, kind: Any, help: str, *flags: str, show_default: Any = False, **rest: Any) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(*flags, help=help, show_default=show_default, **rest)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown(default: Any) -> str | bool:
    if default is None or default == "":
        return False
    if isinstance(default, bool):
        return "yes" if default else False
    values = default if isinstance(default, tuple) else (default,)
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) or False


def _told(name: str, field: Any, hint: Any, about: Any) -> str:
    """An option that is no flag of its own, for the help of the flag that takes it."""
    default = f" ({_shown(field.default)})" if field.default is not MISSING and _shown(field.default) else ""
    return f"{name}{default}: {_helped(hint, about)}"


def _helped(hint: Any, about: Any) -> str:
    """What an option is for, and which values it may be."""
    choices = ", ".join(map(str, choices_of(hint, about)))
    return about.help + (f" Of {choices}." if choices else "")


def _name_of(word: str) -> str:
    return word.partition("=")[0].strip().replace("-", "_")
