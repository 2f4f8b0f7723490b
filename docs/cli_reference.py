"""Writes docs/reference/cli.md from the commands themselves.

    .venv/bin/python docs/cli_reference.py

`tests/docs/test_reference.py` fails while the page is not what this makes.
"""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.core import TyperCommand, TyperGroup

from seerattn.cli import COMMANDS, build_app

PAGE = Path(__file__).parent / "reference" / "cli.md"
_HEAD = """\
# Command line

<!-- Made by `python docs/cli_reference.py`; change the commands, not this page. -->

`seerattn COMMAND --help` says the same in a terminal. `python -m seerattn` is the same command, as `torchrun` needs it.

"""


def commands() -> dict[str, TyperCommand | TyperGroup]:
    """Every top command by its name, with all that it has below it."""
    # One app imports the command that its arguments name, and no other.
    return {name: typer.main.get_command(build_app([name])).commands[name] for name in COMMANDS}


def page() -> str:
    """The whole page."""
    parts = []
    for name, command in commands().items():
        context = typer.Context(command, info_name=name)
        parts.append(get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="seerattn"))
    return _HEAD + re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
