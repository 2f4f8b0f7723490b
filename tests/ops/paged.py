"""Rows whose keys and values are put into pages, as engines do it, for the tests of what reads them."""

from typing import NamedTuple

import torch
from torch import Tensor

# What stands in the table behind the pages of a row: nobody may look there.
NO_PAGE = 1 << 30


class Cache(NamedTuple):
    """Pages ``[pages, size, HKV, D]`` of keys and values, and the table of those of every row."""

    k: Tensor
    v: Tensor
    table: Tensor


def make_cache(rows: list[tuple[Tensor, Tensor]], size: int, *, shared: int = 0, packed: bool = False) -> Cache:
    """Puts ``(k, v)`` of rows, ``[HKV, n, D]`` each, into pages in a random order; all else in them is NaN.

    Args:
        rows: keys and values; the first ``shared`` tokens must be those of the first row.
        size: tokens of a page.
        shared: tokens whose whole pages are those of the first row.
        packed: K and V of a head lie side by side, heads before tokens, as in vLLM 0.32; else each for itself.
    """
    heads, _, dim = rows[0][0].shape
    numbers: list[list[int]] = []
    count = 0
    for k, _ in rows:
        kept = numbers[0][: min(shared, k.shape[1]) // size] if numbers else []
        own = -(-k.shape[1] // size) - len(kept)
        numbers.append(kept + list(range(count, count + own)))
        count += own
    count += 2  # pages of nobody
    place = torch.randperm(count, generator=torch.Generator().manual_seed(size)).tolist()
    storage = torch.full((count, heads, size, 2 * dim), torch.nan, dtype=rows[0][0].dtype)
    width = max(map(len, numbers)) + 1
    table = torch.full((len(rows), width), NO_PAGE, dtype=torch.int32)
    for b, (row, pages) in enumerate(zip(rows, numbers)):
        both = torch.cat(row, -1)
        for i, number in enumerate(pages):
            table[b, i] = place[number]
            part = both[:, i * size : (i + 1) * size]
            storage[place[number], :, : part.shape[1]] = part
    k, v = (x.transpose(1, 2) for x in storage.split(dim, -1))
    return Cache(*((k, v) if packed else (k.contiguous(), v.contiguous())), table)
