"""What commands share of the terminal: tables and sentences as they are, errors as one sentence, streams that exist."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from seerattn.texts import visible

# What libraries raise of bad files and devices and is no ValueError or OSError, by the module that says so.
_RAISED = (("safetensors", "SafetensorError"), ("yaml", "YAMLError"), ("torch", "OutOfMemoryError"))
# And what torch raises as a plain RuntimeError: how its message begins or goes on.
_DEVICE = ("CUDA error", "CUDA driver", "CUDA-capable", "No CUDA GPUs", "HIP error", "MPS backend", "NVIDIA driver")
_DEVICE += ("DefaultCPUAllocator", "can't allocate memory", "Storage size calculation overflowed", "cuDNN error")
_WIDTH = 160  # of a file or a pipe, which have none


def say(text: str, **style: Any) -> None:
    """A sentence on stderr."""
    screen(stderr=True).print(" ".join(map(visible, text.split())), soft_wrap=True, **style)


def screen(*, stderr: bool = False) -> Console:
    """A console that marks nothing up: what it shows may come from anywhere."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stderr or stream.isatty() else _WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def print_table(
    heads: Sequence[str],
    body: Sequence[Sequence[str]],
    *,
    texts: Collection[str] = (),
    title: str = "",
    fold: bool = False,
) -> None:
    """Shows the columns of a table that are not empty.

    Args:
        heads: names of the columns.
        body: lines of cells.
        texts: names of the columns that are not set to the right.
        title: stands above it.
        fold: break long cells over several lines instead of cutting them.
    """
    used = [i for i in range(len(heads)) if any(line[i] for line in body)]
    columns = (
        Column(visible(heads[i]), justify="left" if heads[i] in texts else "right", no_wrap=not fold, overflow="fold")
        for i in used
    )
    table = Table(*columns, box=None)
    for line in body:
        table.add_row(*(visible(line[i]) for i in used))
    if title:
        screen().print(f"\n{visible(title)}")
    screen().print(table)


class Group(TyperGroup):
    """Commands whose errors end as sentences before typer makes its own of some."""

    def invoke(self, ctx: Any) -> Any:
        with sentences():
            found = super().invoke(ctx)
            sys.stdout.flush()
            return found


@contextmanager
def sentences() -> Iterator[None]:
    """Ends the command with one sentence on stderr and exit code 2 for what a user can get wrong.

    Anything else is a mistake of ours, and shows where it happened. An interruption ends with 130, as shells say it.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted; what was finished before is kept", 130)
    except BrokenPipeError:
        _end("what read the output went away before all of it was shown", 2)
    except MemoryError as error:
        _end(f"memory must hold what is asked for, and did not: {error or 'nothing is left'}; ask for less", 2)
    except (ValueError, OSError, *_raised()) as error:
        _end(str(error), 2)
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _DEVICE):
            raise
        _end(f"the device could not do what was asked of it: {str(error).strip().splitlines()[0]}", 2)


def _raised() -> tuple[type[Exception], ...]:
    """The errors of the libraries that are imported: one that is not raises nothing, and is not imported for this."""
    return tuple(getattr(sys.modules[module], name) for module, name in _RAISED if module in sys.modules)


def _end(text: str, code: int) -> NoReturn:
    # What is left in the buffer of a stream that cannot be written would end in a traceback when Python ends.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    typer.echo(f"seerattn: {visible(' '.join(text.split()))}", err=True)
    sys.exit(code)


def open_streams() -> None:
    """Gives closed streams a place that takes everything, and lets all of them write what their encoding lacks.

    Otherwise the next file that is opened takes the number of a closed stream, and what is printed goes into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
