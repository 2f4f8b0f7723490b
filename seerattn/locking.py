"""A folder that one process at a time works in."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = "run.lock"


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds a folder inside the ``with``; the system lets go of it when the process ends, however that is.

    Args:
        folder: exists.
        name: the argument that it was given by, for the error.

    Raises:
        ValueError: another process holds it.
    """
    path = folder / LOCK_NAME
    descriptor = _open_locked(path, name)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # While it is held, so that nobody else's is deleted.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_unlocked(folder: Path, name: str) -> None:
    """Refuses a folder that another process holds, and leaves it as it is.

    Raises:
        ValueError: names the argument and the process.
    """
    path = folder / LOCK_NAME
    if path.is_file():
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor, path, name, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _open_locked(path: Path, name: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path, name, fcntl.LOCK_EX)
            # Whoever held it before may have deleted it since it was opened.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, name: str, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(errors="replace").strip() or "that has just begun"
        raise ValueError(
            f"{name} must be used by one run at a time, but process {holder} is working in {path.parent}; "
            "wait for it, or end it and resume the run"
        ) from None
    # Some network file systems know no locks.
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): start no second run in it while this one lasts", path.parent, error.strerror
        )
