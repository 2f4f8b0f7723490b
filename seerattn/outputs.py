"""Where commands write. A file that is not ours is never written, cut or deleted; one of the same kind may be replaced.

A file is ours if it reads as what we would write there, or is empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def check_output(path: Path, name: str, kind: str, read: Callable[[Path], T]) -> T | None:
    """Refuses a place for an output that cannot be written, or that holds what is not ours.

    Args:
        path: the place; nothing needs to be there, nor its folder.
        name: the argument that it was given by.
        kind: what we write there, such as "a plan".
        read: reads such a file, and raises ValueError for any other.

    Returns:
        What was read; None where nothing is, or an empty file.

    Raises:
        ValueError: names the argument and says what to do.
    """
    there = _nearest(path)
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise ValueError(f"{name} must be a file that can be written, got {path}")
    if there != path:
        return None
    if not path.is_file():
        raise ValueError(f"{name} must be a file, got {path}, which is none; name another one")
    if path.stat().st_size == 0:
        return None
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a new file or {kind}, got {path}, which is something else ({error}); name another file"
        ) from error


def check_folder(path: Path, name: str) -> None:
    """Refuses a folder for outputs that cannot be made or written.

    Raises:
        ValueError: names the argument.
    """
    there = _nearest(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{name} must be a folder that can be written, got {path}")


def _nearest(path: Path) -> Path:
    """The path itself if something is there, or else the nearest folder above it that is."""
    return next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
