"""Saving that is whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Folders that are written to carry the machine and the process that writes: what is left of dead ones can be told.
_STAGING = re.compile(r"\.incomplete(-(?P<machine>\w+)-(?P<process>\d+)-\w{8})?")


@contextmanager
def staged(
    folder: Path, what: str, *, main: bool = True, agree: Callable[[Path | None], Path] | None = None
) -> Iterator[Path]:
    """Yields an empty folder to write to, and moves what it holds into ``folder`` when all of it is written.

    Args:
        folder: exists; entries of the same name are replaced.
        what: what is saved, for the error.
        main: whether this process makes the empty folder and moves; the others only write.
        agree: where several processes write, gives each the folder that the main one made.

    Raises:
        OSError: something could not be written. ``folder`` is as it was.
    """
    staging = None
    try:
        staging = _make_staging(folder) if main else None
        staging = staging if agree is None else agree(staging)
        yield staging
    # A full disk is an OSError in Python, a RuntimeError in torch.save, a SafetensorError in safetensors.
    except (OSError, RuntimeError, SafetensorError) as error:
        _delete(staging)
        raise OSError(f"{what} could not be saved in {folder}: {error}; what was saved before is as it was") from error
    except BaseException:
        _delete(staging)
        raise
    if main:
        for entry in sorted(staging.iterdir()):
            os.replace(entry, folder / entry.name)
        staging.rmdir()


def _delete(staging: Path | None) -> None:
    if staging is not None:
        shutil.rmtree(staging, ignore_errors=True)


def _make_staging(folder: Path) -> Path:
    sweep(folder)
    return Path(tempfile.mkdtemp(prefix=f".incomplete-{_machine()}-{os.getpid()}-", dir=folder))


def sweep(folder: Path, *, alone: bool = False) -> None:
    """Deletes what dead processes of this machine were writing in a folder.

    Args:
        folder: where they wrote.
        alone: nobody else writes there, so processes of all machines are dead.
    """
    for entry in folder.glob(".incomplete*"):
        found = _STAGING.fullmatch(entry.name)
        if found and entry.is_dir() and not entry.is_symlink() and (alone or _is_dead(found)):
            shutil.rmtree(entry, ignore_errors=True)


def is_staging(path: Path) -> bool:
    """Whether a path is named as the folders that are written to."""
    return _STAGING.fullmatch(path.name) is not None


def _machine() -> str:
    return re.sub(r"\W", "_", socket.gethostname()) or "_"


def _is_dead(found: re.Match[str]) -> bool:
    if found["machine"] != _machine():
        return False
    try:
        os.kill(int(found["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a text, whole or not at all."""
    with staged(path.parent, path.name) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
