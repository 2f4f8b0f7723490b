"""A file that is appended to by one process at a time, in pieces that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary


class NotWritten(OSError):
    """A piece could not be appended; the file holds what it held before."""


class _Lock:
    """An open file that no other process may append to. The system lets go of it when the process ends, however."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self.descriptor)


# By device and number of a file: in one process, what appends to the same file shares the lock.
_held: WeakValueDictionary[tuple[int, int], _Lock] = WeakValueDictionary()


class Appended:
    """Appends to a file, which is locked from now on if it exists, and from the first piece on if not.

    `flock` on the file itself leaves no second file behind, and no lock of a process that was killed.

    Args:
        path: the file.

    Raises:
        NotWritten: another process appends to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = self._whole = 0
        self._lock = _locked(path, os.O_RDWR | os.O_APPEND) if path.is_file() else None

    def begin(self, *, size: int, whole: int) -> None:
        """Says how many bytes were found, and how many of them to keep when writing goes on."""
        self._size, self._whole = size, whole

    def append(self, piece: bytes) -> None:
        """Appends a piece.

        Raises:
            NotWritten: the disk is full, for example, or something else changed the file meanwhile.
        """
        if self._lock is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        descriptor = self._lock.descriptor
        if not self._is_as_left(descriptor):
            raise NotWritten(
                f"output must be written by one command at a time, but {self.path} was changed meanwhile; "
                "it is left as it is now, run the command again"
            )
        try:
            os.ftruncate(descriptor, self._whole)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        # An interruption as well: half a piece must not stay.
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(descriptor, self._whole)
            self._size = os.fstat(descriptor).st_size
            if isinstance(error, OSError):
                raise NotWritten(
                    f"output must take another record, but {self.path} cannot be written: {error.strerror}; "
                    "what was written before is kept, run the command again when it can"
                ) from error
            raise
        self._size = self._whole = self._whole + len(piece)

    def _is_as_left(self, descriptor: int) -> bool:
        found = os.fstat(descriptor)
        with suppress(FileNotFoundError):
            return found.st_size == self._size and os.path.samestat(found, self.path.stat())
        return False


def _locked(path: Path, flags: int) -> _Lock:
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    held = _held.get((found.st_dev, found.st_ino))
    if held is not None:
        os.close(descriptor)
        return held
    lock = _Lock(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotWritten(
            f"output must be written by one command at a time, but another one is writing {path}; "
            "wait for it, or name another file"
        ) from None
    # Some network file systems know no locks; there `append` finds out what another process wrote.
    except OSError:
        pass
    _held[found.st_dev, found.st_ino] = lock
    return lock
