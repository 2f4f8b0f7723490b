"""Pools of workers: order, GPUs, logs, failures, and how they end."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import worker_pool
from worker_pool import Job, WorkerPool

FOREVER = float("inf")


def write(path: Path) -> None:
    path.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    print(f"wrote {path.name}")


def fail() -> None:
    raise ValueError("no such thing")


def ignore_every_request_to_end(path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path.write_text(str(os.getpid()))
    time.sleep(600)


def ask_to_end(process: int, path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process, number)
    path.touch()


@pytest.mark.parametrize(("seen", "given"), [(None, {"0", "1"}), ("4,GPU-5", {"4", "GPU-5"})])
def test_jobs_wait_for_what_they_need_and_spread_over_gpus(
    seen: str | None,
    given: set[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    log = tmp_path / "logs" / "all.txt"
    jobs = [Job("third", partial(write, third), log, needs=first)]
    jobs += [Job(path.name, partial(write, path), log) for path in (first, second)]
    pool = WorkerPool(jobs, at_once=2, gpus=2)
    pool.work(FOREVER)
    assert not (pool.failed or pool.waiting or pool.working)
    assert {first.read_text(), second.read_text()} == given
    assert third.stat().st_mtime_ns > first.stat().st_mtime_ns
    # What they print is in the log alone, that of one after that of another.
    assert sorted(log.read_text().splitlines()) == ["wrote first", "wrote second", "wrote third"]
    out, errors = capfd.readouterr()
    assert [line.partition(" ")[0] for line in out.splitlines()][-1] == "third:" and "wrote" not in out + errors


def test_failed_job_is_told_with_the_end_of_its_log_and_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs = [
        Job("late", partial(write, tmp_path / "late"), tmp_path / "late.txt", needs=tmp_path / "never"),
        Job("wrong", fail, tmp_path / "wrong.txt"),
        Job("right", partial(write, tmp_path / "right"), tmp_path / "right.txt"),
    ]
    pool = WorkerPool(jobs, at_once=1, gpus=0)
    pool.work(FOREVER)
    assert pool.failed == ["wrong"] and pool.waiting == jobs[:1] and not pool.working
    said = capsys.readouterr().out
    assert "wrong: failed" in said and "  ValueError: no such thing" in said and "right: finished" in said
    assert (tmp_path / "right").read_text() == os.environ.get("CUDA_VISIBLE_DEVICES", "none")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals act as in a shell that ignores none, whatever the one that started the suite does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.usefixtures("handlers")
def test_crew_that_is_ended_kills_processes_that_do_not_end_when_asked(
    number: signal.Signals, raised: type[BaseException], tmp_path: Path
) -> None:
    begun = [tmp_path / str(number) for number in range(3)]
    jobs = [Job(path.name, partial(ignore_every_request_to_end, path), tmp_path / "log.txt") for path in begun]
    pool = WorkerPool(jobs, at_once=3, gpus=0)

    def end() -> None:
        while not all(path.exists() and path.read_text() for path in begun):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(raised):
        pool.work(FOREVER)
    for worker in pool.working:
        worker.process.join()
        assert worker.process.exitcode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("handlers")
def test_signals_that_were_ignored_when_the_crew_began_stay_ignored(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pool = WorkerPool(
        [Job("it", partial(ask_to_end, os.getpid(), tmp_path / "it"), tmp_path / "log.txt")], at_once=1, gpus=0
    )
    pool.work(FOREVER)
    assert (tmp_path / "it").exists() and not pool.failed


class Stubborn:
    """A process that does not end before it is killed, on a clock of its own."""

    now = 0.0

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def terminate(self) -> None:
        self.seen.append(("asked", Stubborn.now))

    def join(self, seconds: float) -> None:
        Stubborn.now += seconds

    def kill(self) -> None:
        self.seen.append(("killed", Stubborn.now))


def test_processes_have_two_seconds_together_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool.time, "monotonic", lambda: Stubborn.now)
    pool, processes = WorkerPool([], at_once=3, gpus=0), [Stubborn() for _ in range(3)]
    pool.working = [worker_pool._Worker(None, process, 0.0, None) for process in processes]
    pool.work(0.0)
    assert [process.seen for process in processes] == [[("asked", 0.0), ("killed", 2.0)]] * 3


def test_deadline_ends_processes_and_leaves_the_rest_undone(tmp_path: Path) -> None:
    jobs = [Job(str(n), partial(time.sleep, 600), tmp_path / "log.txt") for n in range(2)]
    pool = WorkerPool(jobs, at_once=1, gpus=0)
    pool.work(time.monotonic() + 0.5)
    assert pool.waiting == jobs[1:] and [worker.process.exitcode for worker in pool.working] == [-signal.SIGTERM]
