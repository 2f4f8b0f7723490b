"""Meters of attached models: the blocks that layers compute and the time that they take.

`record_density` and `record_time` set one up for the length of a ``with``; the attention function feeds it. It sees
what its own thread or asyncio task runs, so requests that are served side by side count apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seerattn.hf.state import NO_GATE_BLOCK, Attachment, LayerState, Running, attachment_of
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.density_meter import DensityMeter


class AttentionTimes(NamedTuple):
    """Milliseconds of each forward for one sequence, summed over layers.

    Attributes:
        index: choosing blocks.
        attention: attention over the chosen blocks, or dense attention in layers without a selector.
    """

    index: list[float]
    attention: list[float]


class TimeMeter:
    """Measures how long layers take to choose blocks and to attend to them; see `record_time`.

    On a GPU events on the stream delimit both, so nothing waits until `times` is called; gaps in which the GPU waits
    for the host count, as they do for users. Elsewhere it is wall time. A first forward may compile kernels: leave it
    out of the ``with``.
    """

    def __init__(self) -> None:
        self._spans: dict[str, dict[int, list[tuple[int, Any, Any]]]] = {"index": {}, "attention": {}}

    @contextmanager
    def measure(self, layer: int, part: Literal["index", "attention"], query: Tensor) -> Iterator[None]:
        """Takes the time of a part of one call of a layer with queries ``[B, H, T, D]``."""
        begin = _instant(query.device)
        yield
        self._spans[part].setdefault(layer, []).append((query.shape[0], begin, _instant(query.device)))

    def times(self) -> AttentionTimes:
        """All forwards so far, in order."""
        if any(
            isinstance(begin, torch.cuda.Event) for spans in self._spans["attention"].values() for _, begin, _ in spans
        ):
            torch.cuda.synchronize()
        return AttentionTimes(*(self._per_forward(self._spans[part]) for part in AttentionTimes._fields))

    def _per_forward(self, layers: dict[int, list[tuple[int, Any, Any]]]) -> list[float]:
        forwards = max(map(len, self._spans["attention"].values()), default=0)
        sums = [0.0] * forwards
        for spans in layers.values():
            for forward, (batch, begin, end) in enumerate(spans):
                sums[forward] += _milliseconds(begin, end) / batch
        return sums


def _instant(device: torch.device) -> Any:
    """A point in time: an event on the stream of a GPU, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) if isinstance(begin, torch.cuda.Event) else 1e3 * (end - begin)


_DENSITY: ContextVar[tuple[tuple[Attachment | None, DensityMeter], ...]] = ContextVar("seerattn_density", default=())
_TIME: ContextVar[tuple[Attachment | None, TimeMeter] | None] = ContextVar("seerattn_time", default=None)


def density_meters(attachment: Attachment) -> list[DensityMeter]:
    """Those that count the blocks of a model in the context of the caller."""
    return [meter for attached, meter in _DENSITY.get() if attached is attachment]


def time_meter(attachment: Attachment) -> TimeMeter | None:
    """The one that takes the times of a model in the context of the caller."""
    found = _TIME.get()
    return found[1] if found is not None and found[0] is attachment else None


@contextmanager
def record_density(model: nn.Module) -> Iterator[DensityMeter]:
    """Counts the blocks that the layers of ``model`` compute inside the ``with``, in this thread or task alone.

    A thread that is started inside counts if it is given `contextvars.copy_context`.
    """
    meter = DensityMeter()
    token = _DENSITY.set((*_DENSITY.get(), (attachment_of(model), meter)))
    try:
        yield meter
    finally:
        _DENSITY.reset(token)


@contextmanager
def record_time(model: nn.Module) -> Iterator[TimeMeter]:
    """Takes the times of choosing blocks and of attention in the prefills of ``model`` inside the ``with``.

    Layers that were attached to but have no selector are timed as well, at their fastest: on a Hopper GPU their dense
    attention tries cuDNN first, as ``impl="auto"`` does.
    """
    meter = TimeMeter()
    token = _TIME.set((attachment_of(model), meter))
    try:
        yield meter
    finally:
        _TIME.reset(token)


def attend_counted(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, layer: int, meters: Sequence[DensityMeter], **options: Any
) -> Tensor:
    """`block_sparse_attention` over lists that were counted; meters are told what it skips."""
    if blocks.skip_threshold is None or not meters:
        return block_sparse_attention(q, k, v, blocks, **options)
    out, counts = block_sparse_attention(q, k, v, blocks, return_counts=True, **options)
    for meter in meters:
        meter.add_skipped(layer, blocks, counts)
    return out


def count_dense(
    meters: Sequence[DensityMeter],
    running: Running,
    state: LayerState,
    rows: Sequence[tuple[int, int]],
    device: torch.device,
) -> None:
    """Counts every causal block of rows of so many queries and keys that run dense."""
    if not meters:
        return
    gate = running.gates.get(state.layer)
    sizes = (NO_GATE_BLOCK, NO_GATE_BLOCK) if gate is None else (gate.config.block_q, gate.config.block_k)
    shape = {"batch": 1, "heads": state.heads, "block_q": sizes[0], "block_k": sizes[1], "device": device}
    for q_len, k_len in rows:
        blocks = BlockIndices.dense(q_len=q_len, k_len=k_len, **shape)
        for meter in meters:
            meter.add(state.layer, state.heads, blocks)
