"""What the links between GPUs carry: collectives of the sizes that training and prompts send."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seerattn.bench.session import Session
from seerattn.bench.timing import synchronize

BURST = 10  # calls that are timed together


def measure_links(
    session: Session, known: set[str], sizes: Sequence[int], repeats: int, late: Callable[[], bool]
) -> None:
    """Bytes that a process is sent by others, a second, of each collective and size; written by the first process.

    Args:
        session: of this process; those but the first have no file.
        known: keys of results that need no measuring.
        sizes: MiB of the whole tensor.
        repeats: bursts of a cell.
        late: whether nothing new is to be begun.
    """
    processes, device = dist.get_world_size(), session.device
    for name, make in COLLECTIVES.items():
        for megabytes in sizes:
            size = megabytes << 20
            cell = {"parts": "links", "work": name, "processes": processes, "bytes": size, "dtype": "bfloat16"}
            blank = session.blank("link_gb_per_second", model="", context=0, impl=dist.get_backend(), cell=cell)
            if blank.key in known:
                continue
            label = f"{name}, {megabytes} MiB, {processes} processes"
            if late():
                session.left_out.append(label)
                continue
            share = torch.full((size // 2 // processes,), float(dist.get_rank()), dtype=torch.bfloat16, device=device)
            run, check = make(share)
            run()
            check()
            seconds = _slowest([_burst(run, device) for _ in range(repeats)], device)
            sent = size * (processes - 1) / processes
            values = [BURST * sent / second / 1e9 for second in seconds]
            samples = {"seconds": [round(second / BURST, 6) for second in seconds]}
            row = {"value": round(median(values), 3), "n": len(values), "samples": samples}
            session.measured(blank, lambda row=row: row, label=label)


def _burst(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of some calls one after the other."""
    dist.barrier()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(BURST):
        run()
    synchronize(device)
    return time.perf_counter() - begin


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def _gather(share: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """What FSDP2 does with weights: every process gets all shares."""
    whole = share.new_empty(share.numel() * dist.get_world_size())

    def check() -> None:
        assert [int(part[0]) for part in whole.chunk(dist.get_world_size())] == list(range(dist.get_world_size()))

    return lambda: dist.all_gather_into_tensor(whole, share), check


def _scatter(share: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """What FSDP2 does with gradients: every process gets the sum of its share."""
    whole = torch.ones(share.numel() * dist.get_world_size(), dtype=share.dtype, device=share.device)

    def check() -> None:
        assert int(share[0]) == dist.get_world_size()

    return lambda: dist.reduce_scatter_tensor(share, whole), check


def _exchange(share: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """What context parallelism does with heads and tokens: every process sends a part to every other one."""
    processes = dist.get_world_size()
    whole = share.repeat(processes)
    found = torch.empty_like(whole)

    def check() -> None:
        assert [int(part[0]) for part in found.chunk(processes)] == list(range(processes))

    return lambda: dist.all_to_all_single(found, whole), check


def _reduce(share: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """What tensor parallelism does with the output of a layer, and DDP with gradients: every process gets the sum."""
    whole = torch.zeros(share.numel() * dist.get_world_size(), dtype=share.dtype, device=share.device)

    def check() -> None:
        assert not bool(whole.any())

    return lambda: dist.all_reduce(whole), check


COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all-gather": _gather,
    "reduce-scatter": _scatter,
    "all-to-all": _exchange,
    "all-reduce": _reduce,
}
