"""The `seerattn` command. Sub-commands are imported when they are called, so that `seerattn --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, NamedTuple

import typer

from seerattn.cli.terminal import Group, open_streams, sentences


class _Command(NamedTuple):
    module: str
    attribute: str  # a function, or a typer app that has sub-commands of its own
    help: str


COMMANDS = {
    "distill": _Command("seerattn.cli.distill", "distill", "Learn the gates of a model from its own attention maps."),
    "finetune": _Command(
        "seerattn.cli.finetune", "finetune", "Train a model and its gates together while attention is sparse."
    ),
    "eval": _Command("seerattn.cli.evaluate", "evaluate", "Measure methods on tasks at equal density or equal time."),
    "calibrate": _Command("seerattn.cli.calibrate", "calibrate", "Fit gates to text: budgets of heads, or thresholds."),
    "search": _Command("seerattn.cli.search", "search", "Search rules for every head, for methods that need them."),
    "bench": _Command("seerattn.cli.bench", "app", "Measure speed and memory on this device."),
    "generate": _Command("seerattn.cli.generate", "generate", "Answer a text, read sparsely."),
    "serve": _Command("seerattn.cli.serve", "serve", "Answer requests over HTTP, as OpenAI's interface has it."),
    "report": _Command("seerattn.cli.report", "report", "Draw tables and figures from results."),
}


def build_app(args: Sequence[str]) -> typer.Typer:
    """The app with the one sub-command that `args` name imported, and the others known by name and help alone."""
    app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_root)
    called = next((arg for arg in args if not arg.startswith("-")), None)
    for name, command in COMMANDS.items():
        target = getattr(import_module(command.module), command.attribute) if name == called else _not_imported
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=command.help)
        else:
            app.command(name, help=target.__doc__ if name == called else command.help)(target)
    return app


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; what users got wrong ends as one sentence on stderr and exit code 2."""
    before = sys.argv
    args = list(before[1:] if args is None else args)
    # Results say by which command they were made.
    sys.argv = ["seerattn", *args]
    open_streams()
    try:
        with sentences():
            build_app(args)(args, prog_name="seerattn")
    finally:
        sys.argv = before


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("seerattn"))
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Learned block-sparse attention for the long-context language model you already have."""


def _not_imported() -> None:
    raise AssertionError("a sub-command is imported before it is called")
