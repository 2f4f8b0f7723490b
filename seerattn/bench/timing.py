"""How long a call takes: medians and spread, of the device's own clock or of the wall's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
# Runs of at least this many seconds are repeated twice, shorter ones as often as asked.
LONG_RUN = 5.0
QUANTILES = (0.0, 0.2, 0.5, 0.8, 1.0)
MIN_RUNS, MAX_RUNS = 3, 200
# Larger than the L2 cache of any GPU.
L2_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the runs of one call, the warm-up not among them."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)

    def fields(self) -> dict[str, Any]:
        """What a `Result` holds of it: the median, the number of runs and their quantiles."""
        spread = np.quantile(self.runs, QUANTILES).round(5).tolist()
        return {
            "value": round(self.median, 5),
            "n": len(self.runs),
            "samples": {"quantiles": list(QUANTILES), "ms": spread},
        }


def device_time(run: Callable[[], object], device: torch.device, *, budget_ms: float = 60.0) -> Timing:
    """Time of a call on the device: CUDA events with a cold L2 cache on a GPU, the wall clock on a CPU.

    Args:
        run: the call.
        device: where it runs.
        budget_ms: how long the timed runs may take together; there are 3 in any case.
    """
    run()
    if device.type != "cuda":
        return _repeat(run, device, calls=1, budget_ms=budget_ms)
    # As `triton.testing.do_bench`, which spends eight runs on one value where a call takes half a second.
    cold = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    first = _events([run], cold)[0]
    return Timing(tuple(_events([run] * max(MIN_RUNS, min(MAX_RUNS, int(budget_ms / max(first, 1e-3)))), cold)))


def graph_time(calls: list[Callable[[], object]], device: torch.device, *, budget_ms: float = 40.0) -> Timing:
    """Time of one of these calls in a CUDA graph of all of them; on a CPU the first one by the wall clock."""
    if device.type != "cuda":
        return device_time(calls[0], device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    runs: list[float] = []
    graph.replay()
    while len(runs) < 5 or (sum(runs) * len(calls) < budget_ms and len(runs) < 100):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        runs.append(begin.elapsed_time(end) / len(calls))
    return Timing(tuple(runs))


def pipeline_time(run: Callable[[], object], device: torch.device, *, budget_ms: float = 60.0) -> Timing:
    """Wall time of a call among others like it, as in a forward pass: the slower of host and device counts.

    Short calls are bound by the host, which CUDA events do not see. Each run is a burst of calls without a wait
    between them, divided by their number.
    """
    run()
    first = _burst(run, device, 1)
    return _repeat(run, device, calls=max(1, int(budget_ms / 6 / max(first, 1e-3))), budget_ms=budget_ms)


def _events(runs: list[Callable[[], object]], cold: torch.Tensor) -> list[float]:
    """Milliseconds between two events around each run, after the cache was overwritten."""
    marks = []
    for run in runs:
        cold.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize(cold.device)
    return [begin.elapsed_time(end) for begin, end in marks]


def _repeat(run: Callable[[], object], device: torch.device, *, calls: int, budget_ms: float) -> Timing:
    runs: list[float] = []
    while len(runs) < MIN_RUNS or sum(runs) * calls < budget_ms:
        runs.append(_burst(run, device, calls))
    return Timing(tuple(runs))


def _burst(run: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3 / calls


def long_runs(run: Callable[[], T], device: torch.device, *, repeats: int) -> tuple[list[float], list[T]]:
    """Seconds and results of repeated runs of something that takes long; a warm-up is the caller's business."""
    seconds: list[float] = []
    results: list[T] = []
    while len(seconds) < repeats and (len(seconds) < 2 or seconds[0] < LONG_RUN):
        synchronize(device)
        begin = time.perf_counter()
        results.append(run())
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds, results


def peak_gib(device: torch.device) -> dict[str, float]:
    """The most that a GPU's memory held since `reset_peak`, under the name of its quantity; nothing on a CPU."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def reset_peak(device: torch.device) -> None:
    """Begins to watch the peak of a GPU's memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Waits for the queued work of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of a GPU's memory that a call held at its peak beyond its inputs and its result.

    Args:
        run: the call; returns a tensor or several.
        device: a CUDA device, the only kind whose memory PyTorch counts.
    """
    synchronize(device)
    reset_peak(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    synchronize(device)
    tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    kept = sum(x.untyped_storage().nbytes() for x in tensors)
    return max(0, torch.cuda.max_memory_allocated(device) - before - kept)
