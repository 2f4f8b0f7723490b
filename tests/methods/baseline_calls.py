"""Calls for baselines, and what slow re-computations of them share: everything in fp64, one number at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seerattn.methods.head_rules import HeadRules
from seerattn.selection import AttentionContext

CONTEXT = AttentionContext(layer=1, scale=0.25, softcap=None, unrotate=lambda x, start: x.float())


def calls(q_len: int, k_len: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, seed: int = 0):
    """Random q ``[B, H, T, 32]`` and k ``[B, HKV, S, 32]``, the last query being the last key."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, k_len, 32, generator=generator)[:, :, k_len - q_len :]
    return q * 1.5, torch.randn(batch, kv_heads, k_len, 32, generator=generator)


def rows_of(q_len: int, k_len: int, block: int) -> dict[int, list[int]]:
    """Positions of the queries of each absolute query block of a call."""
    rows: dict[int, list[int]] = {}
    for position in range(k_len - q_len, k_len):
        rows.setdefault(position // block, []).append(position)
    return rows


def products(q: Tensor, k: Tensor, batch: int, head: int) -> list[list[float]]:
    """q.k of one head in fp64, ``[T][S]``."""
    kv = head // (q.shape[1] // k.shape[1])
    return (q[batch, head].double() @ k[batch, kv].double().T).tolist()


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def kept(mask: Tensor, first: int) -> dict[int, set[int]]:
    """The key blocks of each absolute query block, of a mask ``[Nq, Nk]`` of one head."""
    return {first + row: set(blocks.nonzero().flatten().tolist()) for row, blocks in enumerate(mask)}


def profile(thresholds: list[list[float]], *, stride: int, block: int) -> HeadRules:
    """A plan of XAttention with these thresholds by layer and head."""
    sizes = {"layers": len(thresholds), "heads": len(thresholds[0]), "kv_heads": 1, "head_dim": 32}
    rules = [[{"threshold": value} for value in layer] for layer in thresholds]
    return HeadRules("xattention_profile", sizes, rules, {"stride": stride, "block": block})
