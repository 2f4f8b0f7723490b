"""What the processes of a run say when one of them dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object

from seerattn.training.processes import processes

# Seconds that a process which a collective told of a loss waits to see whose it is.
_SEEN_WITHIN = 5.0
# And before it leaves, so that the others, who look at about the same time, do not take it for one that died.
_LINGER = 1.0


class Peer(NamedTuple):
    """A process of the run: its rank, the machine that it is on, and its number there."""

    rank: int
    host: str
    pid: int


@contextmanager
def watching() -> Iterator[None]:
    """Ends a run whose other process dies in one sentence, which the first process that is left says.

    The others are told by torchrun, with SIGTERM, or by a collective that fails. While one hangs on a device no handler
    of Python's runs, so a thread listens to the signal. Processes of other machines are told to have died, not which.

    Raises:
        ValueError: another process died; on the first one that is left, the others of them exit.
    """
    if processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    peers = [Peer(*x) for x in gather_object([(int(os.environ["RANK"]), socket.gethostname(), os.getpid())])]
    listener = _Listener(peers)
    listener.begin()
    try:
        yield
    except RuntimeError as error:
        # It may be a collective whose other side died, which shows a moment later.
        deadline = time.monotonic() + _SEEN_WITHIN
        while not (lost := _dead(peers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not lost or not listener.claim():
            raise
        time.sleep(_LINGER)
        if not _first_left(peers, lost):
            sys.exit(1)
        raise ValueError(_sentence(peers, lost)) from error
    except BaseException:
        # All of them raise what they found together, and those that end first are no loss.
        listener.claim()
        raise
    finally:
        listener.end()


class _Listener:
    """Hears SIGTERM in a thread of its own."""

    def __init__(self, peers: list[Peer]) -> None:
        self._peers = peers
        self._once = threading.Lock()

    def claim(self) -> bool:
        """Whether nobody has begun to say what happened; then the caller does."""
        return self._once.acquire(blocking=False)

    def begin(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Python writes to the socket as soon as the signal is there, whatever the main thread waits for.
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True).start()

    def end(self) -> None:
        signal.set_wakeup_fd(self._fd)
        signal.signal(signal.SIGTERM, self._handler)
        self._writer.close()

    def _listen(self) -> None:
        with self._reader:
            while heard := self._reader.recv(1):
                if heard[0] == signal.SIGTERM and self.claim():
                    self._leave()

    def _leave(self) -> None:
        lost = _dead(self._peers)
        if lost and _first_left(self._peers, lost):
            logging.getLogger(__name__).error(_sentence(self._peers, lost))
        time.sleep(_LINGER)
        os._exit(128 + signal.SIGTERM)


def _dead(peers: list[Peer]) -> list[Peer]:
    """Those of this machine that are no more."""
    return [peer for peer in peers if peer.host == socket.gethostname() and not _is_alive(peer.pid)]


def _is_alive(pid: int) -> bool:
    # Until torchrun looks, a process that died is a zombie.
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _first_left(peers: list[Peer], lost: list[Peer]) -> bool:
    """Whether this process has the lowest rank of those that are left."""
    return min(peer.rank for peer in peers if peer not in lost) == int(os.environ["RANK"])


def _sentence(peers: list[Peer], lost: list[Peer]) -> str:
    who = " and ".join(str(peer.rank) for peer in lost)
    return (
        f"process {who} of {len(peers)} (counted from 0) died, and the others end with it; what was saved is whole: "
        "find out why it died, such as for lack of memory, and resume the run, which goes on from its last checkpoint "
        "on any number of processes that divides the batch"
    )
