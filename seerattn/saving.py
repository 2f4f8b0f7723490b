"""Saving that is whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

STAGING = ".incomplete"


@contextmanager
def staged(folder: Path, what: str, *, main: bool = True) -> Iterator[Path]:
    """Yields an empty folder to write to, and moves what it holds into ``folder`` when all of it is written.

    Args:
        folder: exists; entries of the same name are replaced.
        what: what is saved, for the error.
        main: whether this process empties and moves; the others only write.

    Raises:
        OSError: something could not be written. ``folder`` is as it was.
    """
    staging = folder / STAGING
    if main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        yield staging
    # A full disk is an OSError in Python, a RuntimeError in torch.save, a SafetensorError in safetensors.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(f"{what} could not be saved in {folder}: {error}; what was saved before is as it was") from error
    if main:
        for entry in sorted(staging.iterdir()):
            os.replace(entry, folder / entry.name)
        staging.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a text, whole or not at all."""
    with staged(path.parent, path.name) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
