"""Saving whole files beside other processes, and folders that one process holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seerattn.locking import LOCK_NAME, check_unlocked, locked
from seerattn.saving import staged, sweep, write_whole


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_other_processes_write_is_not_touched_and_what_dead_ones_left_is_deleted(tmp_path: Path) -> None:
    machine = socket.gethostname().replace("-", "_").replace(".", "_")
    dead = tmp_path / f".incomplete-{machine}-{dead_process()}-abcd1234"
    alive = tmp_path / f".incomplete-{machine}-{os.getppid()}-abcd1234"
    elsewhere = tmp_path / f".incomplete-{machine}x-{dead_process()}-abcd1234"
    theirs = [alive, elsewhere, tmp_path / ".incomplete", tmp_path / ".incomplete-notes", tmp_path / "notes"]
    for folder in (dead, *theirs):
        folder.mkdir()
        (folder / "file").write_text("half")
    write_whole(tmp_path / "text", "whole")
    assert (tmp_path / "text").read_text() == "whole"
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == set(theirs)
    # Who is alone in a folder knows that all are dead.
    sweep(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {"text", "notes", ".incomplete-notes"}


def test_two_that_save_at_once_do_not_meet(tmp_path: Path) -> None:
    with staged(tmp_path, "one") as first:
        (first / "a").write_text("first")
        with staged(tmp_path, "another") as second:
            (second / "b").write_text("second")
        write_whole(tmp_path / "c", "third")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "b": "second", "c": "third"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, RuntimeError])
def test_what_is_not_whole_leaves_the_folder_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    told = OSError if error is RuntimeError else error
    with pytest.raises(told), staged(tmp_path, "it") as folder:
        (folder / "a").write_text("after")
        raise error("no space")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


HOLDER = """
import sys
from pathlib import Path
from seerattn.locking import locked
with locked(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_folder_is_held_by_one_process_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    check_unlocked(tmp_path, "output")
    for end in ("ends", "is killed"):
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout.readline() == "held\n"
            told = f"^output must be used by one run at a time, but process {holder.pid} on {socket.gethostname()} is"
            for _ in range(2):
                with pytest.raises(ValueError, match=told):
                    check_unlocked(tmp_path, "output")
                with pytest.raises(ValueError, match=told), locked(tmp_path, "output"):
                    pass
            if end == "is killed":
                holder.kill()
        assert (tmp_path / LOCK_NAME).exists() == (end == "is killed")
        check_unlocked(tmp_path, "output")
        with locked(tmp_path, "output"):
            assert (tmp_path / LOCK_NAME).read_text().split()[0] == str(os.getpid())
        assert list(tmp_path.iterdir()) == []
