"""A pool: jobs in processes of their own, so many at a time, until all are done or a deadline comes.

Each writes to its own log and sees one of the GPUs. What a job has to show for itself when it is ended half-way is its
own affair: a pool that is given it again starts it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

_GRACE = 2.0  # seconds that all processes together have to end when they are asked to


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        name: what the pool calls it.
        work: called in the process, to which it is pickled.
        log: file that what it prints is appended to.
        needs: file without which it cannot begin.
    """

    name: str
    work: Callable[[], None]
    log: Path
    needs: Path | None = None

    @property
    def ready(self) -> bool:
        """Whether it can begin."""
        return self.needs is None or self.needs.exists()


class _Worker(NamedTuple):
    job: Job
    process: BaseProcess
    begin: float
    gpu: int | None


class WorkerPool:
    """Works on jobs in their order, each as soon as what it needs is there.

    Args:
        jobs: what is to be done.
        at_once: processes at a time, which share the cores.
        gpus: GPUs to spread them over.
    """

    def __init__(self, jobs: list[Job], *, at_once: int, gpus: int) -> None:
        self.waiting, self.at_once, self.gpus = list(jobs), at_once, gpus
        self.working: list[_Worker] = []
        self.failed: list[str] = []

    def work(self, deadline: float) -> None:
        """Returns when nothing is left that can be done, or right after the deadline, with every process ended."""
        with _ended_by_sigterm():
            try:
                while (self.waiting or self.working) and time.monotonic() < deadline:
                    self._start()
                    self._look()
                    if not self.working and not any(job.ready for job in self.waiting):
                        break
                    time.sleep(0.2)
            finally:
                self._end()

    def _start(self) -> None:
        for job in [job for job in self.waiting if job.ready][: self.at_once - len(self.working)]:
            self.waiting.remove(job)
            busy = [worker.gpu for worker in self.working]
            gpu = min(range(self.gpus), key=busy.count) if self.gpus > 1 else None
            threads = max(1, (os.cpu_count() or 1) // self.at_once)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.touch()
            # A process that is forked cannot use the GPU.
            process = multiprocessing.get_context("spawn").Process(target=_in_a_process, args=(job, gpu, threads))
            process.start()
            self.working.append(_Worker(job, process, time.monotonic(), gpu))

    def _look(self) -> None:
        for worker in [worker for worker in self.working if worker.process.exitcode is not None]:
            self.working.remove(worker)
            job, failed = worker.job, worker.process.exitcode != 0
            seconds = time.monotonic() - worker.begin
            print(f"{job.name}: {'failed' if failed else 'finished'} after {seconds:.0f} s", flush=True)
            if failed:
                self.failed.append(job.name)
                tail = job.log.read_text(errors="replace").splitlines()[-12:]
                print("\n".join(f"  {line}" for line in tail), flush=True)

    def _end(self) -> None:
        # Whoever set a deadline has something to do after it, which a process that lets the GPU go must not hold up.
        for worker in self.working:
            worker.process.terminate()
        limit = time.monotonic() + _GRACE
        for worker in self.working:
            worker.process.join(max(0.0, limit - time.monotonic()))
            worker.process.kill()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the ``with`` SIGTERM raises, as SIGINT does: it would end the pool alone, and leave its processes at work.

    Whoever had a signal ignored when the pool was started, as `nohup` and shells do for jobs in the background, keeps
    it ignored.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_a_process(job: Job, gpu: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    if gpu is not None:
        # Whoever started the pool may have kept it to some GPUs of the machine.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    job.work()
