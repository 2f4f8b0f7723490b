"""When dense attention is faster than gate + selection + sparse attention, by measured times.

A table holds times of one attention layer on one device (`seerattn bench crossover` makes it): by length the time of
dense attention, of gate and selection, and of sparse attention by density. A user's own table comes first, then the
one that is shipped for H100 cards, which also stands in for GPUs without a table. A CPU has a fitted formula instead.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seerattn.ops.resolve import preferred

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("crossover_h100.json")


@dataclass(frozen=True)
class Row:
    """Times in milliseconds of one layer whose queries are all of its ``tokens``."""

    tokens: int
    dense_ms: float
    overhead_ms: float  # gate and selection
    sparse_ms: dict[str, float]  # by density

    def sparse(self, density: float) -> float:
        """Time of sparse attention at a density, linear between those that were measured."""
        known = sorted((float(d), ms) for d, ms in self.sparse_ms.items())
        return _interpolate(density, [d for d, _ in known], [ms for _, ms in known])


def table_path(device_name: str) -> Path:
    """Where the table of a device lies in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "seerattn", "crossover", re.sub(r"[^A-Za-z0-9.]+", "-", device_name).strip("-") + ".json")


@functools.cache
def load_table(device_name: str) -> tuple[Row, ...]:
    """The rows of the table for a GPU, ascending in tokens.

    Raises:
        ValueError: the user's own table is not one.
    """
    path = table_path(device_name)
    if not path.exists():
        if "H100" not in device_name:
            logger.info("%s has no crossover table, that of an H100 is used; seerattn bench crossover", device_name)
        path = SHIPPED
    try:
        rows = tuple(Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
        _check_rows(rows)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} must be a table of seerattn bench crossover, got {got}; delete it") from error
    return tuple(sorted(rows, key=lambda row: row.tokens))


def _check_rows(rows: Sequence[Row]) -> None:
    """Refuses rows that a decision could not be made by, whichever call it is for."""
    if not rows:
        raise ValueError("no rows")
    for row in rows:
        if not isinstance(row.sparse_ms, dict) or not row.sparse_ms or row.sparse_ms.keys() != rows[0].sparse_ms.keys():
            raise ValueError("rows whose sparse_ms are not of the same densities")
        numbers = [row.tokens, row.dense_ms, row.overhead_ms, *row.sparse_ms.values(), *map(float, row.sparse_ms)]
        # NaN is in no range, and products of times and tokens must stay finite.
        if not all(0 <= number < 1e15 for number in numbers):
            raise ValueError("numbers that are no times, densities or tokens")


def prefer_dense(*, q_len: int, k_len: int, density: float, device: torch.device | str, selected: bool = False) -> bool:
    """Whether dense attention is expected to be faster than gate + selection + sparse attention.

    Args:
        q_len: query tokens ``T`` of the call, the last of its keys.
        k_len: key tokens ``S``.
        density: share of the causal block area that is computed.
        device: where the call runs. A kind of device that was not measured never prefers dense.
        selected: the blocks are chosen already, so that the cost of choosing no longer counts.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _prefer_dense_cpu(q_len, k_len, density)
    if device.type != "cuda":
        return False
    return _prefer_dense_cuda(q_len, k_len, density, device, selected)


@functools.lru_cache(maxsize=4096)  # layers of a model ask the same, and interpolating takes 20 us of a short prefill
def _prefer_dense_cuda(q_len: int, k_len: int, density: float, device: torch.device, selected: bool) -> bool:
    # Gathers in plain torch took twice as long as dense attention (whole prefill of 8 x 8192 tokens on an H100).
    if preferred("block_sparse_attention", "auto", device) == "reference":
        return True
    row = _at(load_table(torch.cuda.get_device_name(device)), k_len)
    # The table's calls have as many queries as keys; a chunk of queries is a share of that triangle.
    share = _pairs(q_len, k_len) / _pairs(k_len, k_len)
    overhead = 0.0 if selected else row.overhead_ms
    return overhead + row.sparse(density) * share >= row.dense_ms * share


def _at(rows: Sequence[Row], tokens: int) -> Row:
    """The times at a length: linear between two that were measured, those of the nearest beyond."""
    lengths = [row.tokens for row in rows]

    def at(values: Sequence[float]) -> float:
        return _interpolate(tokens, lengths, values)

    densities = rows[0].sparse_ms
    sparse = {d: at([row.sparse_ms[d] for row in rows]) for d in densities}
    return Row(tokens, at([row.dense_ms for row in rows]), at([row.overhead_ms for row in rows]), sparse)


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_left(xs, x)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def _pairs(q_len: int, k_len: int) -> float:
    """(query, key) pairs of causal attention."""
    return q_len * (k_len - q_len) + q_len * (q_len + 1) / 2


# AVX-512 Xeon, one thread, CPU time in ms, default gate, H 8, HKV 2, D 64, fp32, 64 x 64 blocks; dense first:
#   T  512:   5    density .42:  11
#   T 1024:  14    density .23:  20   .43:  24
#   T 2048:  47    density .12:  43   .28:  55   .38:  63   .52:  75
#   T 4096: 164    density .09:  78   .31: 146   .41: 152   .50: 189   .61: 219
# and with two threads, wall time: T 16384: 1270, density .10: 365. In units of dense attention: what a listed block
# costs against the same block there, and what a key costs (pooling, scoring, choosing) in (query, key) pairs.
CPU_PER_DENSITY = 1.6
CPU_PER_KEY = 700.0


def _prefer_dense_cpu(q_len: int, k_len: int, density: float) -> bool:
    return CPU_PER_DENSITY * density + CPU_PER_KEY * k_len / _pairs(q_len, k_len) > 1
