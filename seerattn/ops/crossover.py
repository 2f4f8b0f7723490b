"""When dense attention is faster than gate + selection + sparse attention, by measured times.

A table holds times of one attention layer on one device (`seerattn bench crossover` makes it): by length the time of
dense attention, of gate and selection, and of sparse attention by density. A user's own table comes first, then the
one that is shipped for H100 cards, which also stands in for GPUs without a table. A CPU has a fitted formula instead.

A time is what the host takes to launch or what the device takes to work, whichever is longer. Work of a layer of
another shape is that of the table's in proportion to their sizes; what the host takes is the same for all. So a small
model goes sparse at longer prompts than a large one, and a batch at shorter ones.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from seerattn.ops.resolve import preferred

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHIPPED = Path(__file__).with_name("crossover_h100.json")


class LayerShape(NamedTuple):
    """What the work of an attention layer grows with; by default that of Llama-3.1-8B for one sequence."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


# Of tables that do not tell theirs.
TABLES = LayerShape()


@dataclass(frozen=True)
class Row:
    """Times in milliseconds of one layer whose queries are all of its ``tokens``.

    Where tokens are decoded (`seerattn.ops.crossover_decode`), one query of every sequence reads ``tokens`` keys of all
    of them together.
    """

    tokens: int
    dense_ms: float
    overhead_ms: float  # gate and selection
    sparse_ms: dict[str, float]  # by density


class Times:
    """Times of one part of a layer by length, each taken apart into the host's and the device's share.

    The host is what limits a length if the next one takes hardly longer: less than the root of what its work grows by.
    The work there is then unknown, and taken to be that of the next length in proportion.

    Args:
        tokens: lengths, ascending.
        ms: the time of each.
        power: of the length with which work grows at least.
    """

    def __init__(self, tokens: Sequence[int], ms: Sequence[float], power: int) -> None:
        self._tokens, self._work, self._host = tokens, list(ms), [0.0] * len(ms)
        growth = [(b / a) ** power for a, b in pairwise(tokens)]
        bound = [i for i, times in enumerate(growth) if ms[i + 1] ** 2 < ms[i] ** 2 * times]
        limited = bound[-1] + 1 if bound else 0
        for i in reversed(range(limited)):
            self._work[i] = min(self._work[i + 1] / growth[i], ms[i])
        self.host = min(ms[:limited], default=0.0)
        self._host = [*ms[:limited], *[self.host] * (len(ms) - limited)]

    def at(self, tokens: int, work: float = 1.0) -> float:
        """Time at a length with ``work`` times the work; linear between two lengths, that of the nearest beyond."""
        times = [max(host, work * each) for host, each in zip(self._host, self._work)]
        return interpolate(tokens, self._tokens, times)


class Table:
    """A crossover table.

    Attributes:
        rows: the times, ascending in tokens.
        shape: of the layer that they were taken of.
        host_ms: what the host takes longer for a sparse layer of a model than for a dense one.
    """

    def __init__(self, rows: Sequence[Row], shape: LayerShape, host_ms: float | None) -> None:
        self.rows, self.shape = tuple(sorted(rows, key=lambda row: row.tokens)), shape
        lengths = [row.tokens for row in self.rows]
        self._dense = Times(lengths, [row.dense_ms for row in self.rows], 2)
        self._choosing = Times(lengths, [row.overhead_ms for row in self.rows], 1)
        self._sparse = {
            float(d): Times(lengths, [row.sparse_ms[d] for row in self.rows], 2)
            for d in sorted(self.rows[0].sparse_ms, key=float)
        }
        self.host_ms = self._alone() if host_ms is None else host_ms

    def _alone(self) -> float:
        """`host_ms` by the calls alone, which is less than a model takes around them."""
        sparse = min(times.host for times in self._sparse.values())
        return max(0.0, self._choosing.host + sparse - self._dense.host)

    def dense(self, q_len: int, k_len: int, shape: LayerShape) -> float:
        """Time of dense attention."""
        return self._dense.at(k_len, self._products(q_len, k_len, shape))

    def choosing(self, k_len: int, shape: LayerShape) -> float:
        """Time of gate and selection, which read queries and keys."""
        return self._choosing.at(k_len, _vectors(shape) / _vectors(self.shape))

    def sparse(self, q_len: int, k_len: int, shape: LayerShape, density: float) -> float:
        """Time of sparse attention, linear between the densities that were measured."""
        work = self._products(q_len, k_len, shape)
        return interpolate(density, [*self._sparse], [times.at(k_len, work) for times in self._sparse.values()])

    def _products(self, q_len: int, k_len: int, shape: LayerShape) -> float:
        """Work of a call in units of the table's, whose queries are all tokens; a chunk has a share of the pairs."""
        share = _pairs(q_len, k_len) / _pairs(k_len, k_len)
        sizes = shape.batch * shape.heads * shape.head_dim
        return share * sizes / (self.shape.batch * self.shape.heads * self.shape.head_dim)


def _vectors(shape: LayerShape) -> int:
    """Numbers of one token's queries and keys, of all sequences."""
    return shape.batch * (shape.heads + shape.kv_heads) * shape.head_dim


def table_path(device_name: str) -> Path:
    """Where the table of a device lies in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "seerattn", "crossover", re.sub(r"[^A-Za-z0-9.]+", "-", device_name).strip("-") + ".json")


@functools.cache
def load_table(device_name: str) -> Table:
    """The table for a GPU.

    Raises:
        ValueError: the user's own table is not one.
    """
    path = table_path(device_name)
    if not path.exists():
        if "H100" not in device_name:
            logger.info("%s has no crossover table, that of an H100 is used; seerattn bench crossover", device_name)
        path = SHIPPED
    return read_file(path, _read)


def read_file(path: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """What ``read`` makes of a file.

    Raises:
        ValueError: it is no table.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} must be a table of seerattn bench crossover, got {got}; delete it") from error


def _read(values: Mapping[str, Any]) -> Table:
    """The table that a file holds. Those of 0.2 and before tell neither batch nor host time, and may lack sizes."""
    rows, host_ms = read_rows(values["rows"]), values.get("host_ms")
    return Table(rows, read_shape(values), None if host_ms is None else read_host(host_ms))


def read_shape(values: Mapping[str, Any]) -> LayerShape:
    """Of which layer a table tells times; refuses one that does not exist."""
    shape = LayerShape(**{name: values[name] for name in LayerShape._fields if name in values})
    if not all(isinstance(size, int) and 1 <= size < 1e6 for size in shape):
        raise ValueError("a shape that no layer has")
    return shape


def read_host(host_ms: float) -> float:
    """What the host takes; refuses what is no time."""
    if not 0 <= host_ms < 1e15:
        raise ValueError("a host time that is none")
    return host_ms


def read_rows(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of a table; refuses those that a decision could not be made by, whichever call it is for."""
    rows = [Row(**row) for row in values]
    if not rows:
        raise ValueError("no rows")
    for row in rows:
        if not isinstance(row.sparse_ms, dict) or not row.sparse_ms or row.sparse_ms.keys() != rows[0].sparse_ms.keys():
            raise ValueError("rows whose sparse_ms are not of the same densities")
        numbers = [row.tokens, row.dense_ms, row.overhead_ms, *row.sparse_ms.values(), *map(float, row.sparse_ms)]
        # NaN is in no range, and products of times and tokens must stay finite.
        if not all(0 <= number < 1e15 for number in numbers) or row.tokens < 1:
            raise ValueError("numbers that are no times, densities or tokens")
    return rows


def prefer_dense(
    *,
    q_len: int,
    k_len: int,
    density: float,
    device: torch.device | str,
    shape: LayerShape = TABLES,
    selected: bool = False,
) -> bool:
    """Whether dense attention is expected to be faster than gate + selection + sparse attention.

    Args:
        q_len: query tokens ``T`` of the call, the last of its keys.
        k_len: key tokens ``S``.
        density: share of the causal block area that is computed.
        device: where the call runs. A kind of device that was not measured never prefers dense.
        shape: of the layer. The formula of a CPU is relative to dense attention and holds for all.
        selected: the blocks are chosen already, so that the cost of choosing no longer counts.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _prefer_dense_cpu(q_len, k_len, density)
    if device.type != "cuda":
        return False
    return _prefer_dense_cuda(q_len, k_len, density, device, shape, selected)


@functools.lru_cache(maxsize=4096)  # forwards of the same length ask the same
def _prefer_dense_cuda(
    q_len: int, k_len: int, density: float, device: torch.device, shape: LayerShape, selected: bool
) -> bool:
    # Gathers in plain torch took twice as long as dense attention (whole prefill of 8 x 8192 tokens on an H100).
    if preferred("block_sparse_attention", "auto", device) == "reference":
        return True
    table = load_table(torch.cuda.get_device_name(device))
    dense, sparse = table.dense(q_len, k_len, shape), table.sparse(q_len, k_len, shape, density)
    if selected:
        return sparse >= dense
    # The host launches while the device works: whichever takes longer counts.
    return max(table.choosing(k_len, shape) + sparse, table.host_ms) >= dense


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """What lies between numbers at ascending places; that of the nearest place beyond them."""
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
