"""A process that hangs when another one dies says so and ends; one that is told to end with all others says nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from accelerate import PartialState
from two_processes import launch_two

from seerattn.training.watch import watching

# torchrun waits so long for a process that does not heed SIGTERM.
PATIENCE = 30


def ended(ending: str) -> tuple[str, float]:
    """What two processes that hang told on stderr until they ended, and the seconds that it took them."""
    begin = time.monotonic()
    done = launch_two(__file__, ending)
    assert done.returncode != 0
    return done.stderr, time.monotonic() - begin


def test_a_process_that_hangs_tells_of_the_one_that_died_and_ends() -> None:
    told, seconds = ended("die")
    assert told.count("process 1 of 2 (counted from 0) died, and the others end with it") == 1
    assert seconds < PATIENCE


def test_processes_that_are_told_to_end_do_so_and_tell_of_no_death() -> None:
    told, seconds = ended("told")
    assert "hanging" in told and " died" not in told and seconds < PATIENCE


if __name__ == "__main__":
    PartialState(cpu=True)
    with watching():
        print("hanging", file=sys.stderr, flush=True)
        if os.environ["RANK"] == "1":
            time.sleep(1)
            if sys.argv[1] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid(), signal.SIGTERM)
        # As in a collective on a device: nothing raises, and no handler ends it.
        threading.Event().wait()
