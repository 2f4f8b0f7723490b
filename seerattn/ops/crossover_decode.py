"""When dense attention of decoded tokens is faster than choosing blocks and attending to those, by measured times.

Attention of one token is bound by the bytes that it reads. So a time is told by the number of keys of all sequences
together, whatever their number, and what another layer reads is looked up at as many keys as have its bytes. A table
may hold such times beside those of prompts (`seerattn.ops.crossover`): "decode_rows", of the same form, and
"decode_host_ms". For GPUs whose table has none, and for those without a table, the times of an H200 decide that are
shipped. A CPU has a fitted formula instead.

The host has its share as well, and it is the larger one: unless a CUDA graph repeats a step, it takes longer to launch
a sparse layer than most dense ones take. It does so in all, and not only by what it takes longer than for a dense one:
a step that is bound by the host takes what the host takes. So dense attention alone must take longer than that before
sparse attention pays.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seerattn.ops.crossover import (
    TABLES,
    LayerShape,
    Row,
    interpolate,
    load_table,
    read_file,
    read_host,
    read_rows,
    read_shape,
    table_path,
)
from seerattn.ops.resolve import preferred

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("crossover_decode_h200.json")


class DecodeTable:
    """Times of a decoded token of one layer.

    Attributes:
        rows: the times, ascending in keys of all sequences.
        shape: of the layer that they were taken of.
        host_ms: what the host takes for a sparse layer of a step that it launches kernel by kernel.
    """

    def __init__(self, rows: Sequence[Row], shape: LayerShape, host_ms: float) -> None:
        self.rows, self.shape, self.host_ms = tuple(sorted(rows, key=lambda row: row.tokens)), shape, host_ms
        self._keys = [row.tokens for row in self.rows]

    def dense(self, keys: int, shape: LayerShape) -> float:
        """Time of dense attention."""
        return self._at(keys, shape, [row.dense_ms for row in self.rows])

    def choosing(self, keys: int, shape: LayerShape) -> float:
        """Time of gate and choice, which read gate keys, so many for each key."""
        return self._at(keys, shape, [row.overhead_ms for row in self.rows])

    def sparse(self, keys: int, shape: LayerShape, density: float) -> float:
        """Time of sparse attention, linear between the densities that were measured."""
        densities = sorted(self.rows[0].sparse_ms, key=float)
        times = [self._at(keys, shape, [row.sparse_ms[each] for row in self.rows]) for each in densities]
        return interpolate(density, [*map(float, densities)], times)

    def _at(self, keys: int, shape: LayerShape, times: Sequence[float]) -> float:
        """The time of as many keys of the table's layer as have the bytes of these; in proportion beyond the last."""
        alike = keys * shape.kv_heads * shape.head_dim / (self.shape.kv_heads * self.shape.head_dim)
        return interpolate(alike, self._keys, times) * max(1.0, alike / self._keys[-1])


@functools.cache
def load_decode_table(device_name: str) -> DecodeTable:
    """The times of decoded tokens for a GPU: its own where its table has some, else those that are shipped.

    Raises:
        ValueError: the user's own table is not one.
    """
    path = table_path(device_name)
    if path.exists():
        load_table(device_name)
        own = read_file(path, lambda values: _read(values) if "decode_rows" in values else None)
        if own is not None:
            return own
    if "H200" not in device_name:
        logger.info(
            "%s has no times of decoded tokens, those of an H200 are used; seerattn bench crossover", device_name
        )
    return read_file(SHIPPED, _read)


def _read(values: Mapping[str, Any]) -> DecodeTable:
    return DecodeTable(read_rows(values["decode_rows"]), read_shape(values), read_host(values["decode_host_ms"]))


def prefer_dense_decode(
    *,
    keys: int,
    density: float,
    device: torch.device | str,
    shape: LayerShape = TABLES,
    graphs: bool = False,
) -> bool:
    """Whether dense attention of one token of every sequence is expected to be faster than choice and sparse attention.

    Args:
        keys: of all sequences together.
        density: share of their blocks that is read.
        device: where the step runs. A kind of device that was not measured never prefers dense.
        shape: of the layer; its batch are the sequences.
        graphs: whether CUDA graphs repeat the step, so that the host takes no time for it.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _prefer_dense_cpu(keys, density, shape)
    if device.type != "cuda":
        return False
    return _prefer_dense_cuda(keys, density, device, shape, graphs)


@functools.lru_cache(maxsize=4096)  # the layers of a step ask the same
def _prefer_dense_cuda(keys: int, density: float, device: torch.device, shape: LayerShape, graphs: bool) -> bool:
    if preferred("decode_attention", "auto", device) == "reference":
        return True
    table = load_decode_table(torch.cuda.get_device_name(device))
    sparse = table.choosing(keys, shape) + table.sparse(keys, shape, density)
    return max(sparse, 0.0 if graphs else table.host_ms) >= table.dense(keys, shape)


# AVX-512 Xeon, ms of a layer of a whole step, dense, and sparse at density .1 and .2, default gate, 64 x 64 blocks:
#   sequences x keys          1 x 1k       1 x 4k       1 x 16k      1 x 32k      4 x 4k       4 x 16k
#   8/2 of 64, fp32         .42 1.2 1.2  .87 1.4 1.6  3.4 2.5 3.5  8.7 4.3 6.5  2.9 2.6 3.6   17 7.3  11
#   32/8 of 128, fp32       3.3 3.9 4.2  9.1 6.2 8.0   33  13  20   66  23  39   32  16  24  128  44 120
#   32/8 of 128, bf16       2.4 3.4 3.9  4.9 5.4 6.8   25  12  19   45  21  38   17  14  21   77  41 100
#   8/2 of 64, two threads  .38 1.2 1.3  .74 1.4 1.5  2.3 2.0 2.5  5.1 3.1 4.2  1.8 2.1 2.5   10 4.9 7.2
# In units of dense attention, so that no cell above runs sparse that was slower so: what a listed block costs against
# the same block there (it is gathered before it is read), and what a sequence and a layer cost, in keys and in numbers
# of keys.
CPU_PER_DENSITY = 5.0
CPU_PER_SEQUENCE = 2000.0
CPU_PER_LAYER = 2e5


def _prefer_dense_cpu(keys: int, density: float, shape: LayerShape) -> bool:
    apart = CPU_PER_SEQUENCE * shape.batch + CPU_PER_LAYER / (shape.kv_heads * shape.head_dim)
    return CPU_PER_DENSITY * density + apart / keys >= 1
