"""Attention that also emits the map gates learn from: its time and memory beside dense attention and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.check import BLOCK, check_dense, check_pooled
from seerattn.bench.dense import BASELINES, dense_attention
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.session import Session
from seerattn.bench.timing import device_time, extra_memory
from seerattn.eval.results import Result
from seerattn.ops.pooled_attention import pooled_attention

PLAIN = "pytorch"


def plain_pooled_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target as one writes them down in PyTorch, with the whole map of probabilities."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    ahead = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill_(ahead, -torch.inf).softmax(-1)
    del scores
    target = F.max_pool2d(p, BLOCK, ceil_mode=True)
    return p.to(q.dtype) @ v, target / target.sum(-1, keepdim=True)


def bench_pooled(session: Session, shape: Shape, *, lengths: Sequence[int], variants: Sequence[str]) -> list[Result]:
    """Time ("pooled_ms") and memory beyond inputs and results ("extra_memory_mib") in blocks of 64 x 64.

    Args:
        session: what runs the measurements.
        shape: the heads of the layer.
        lengths: tokens.
        variants: implementations of `pooled_attention`, "pytorch" for the plain version, or names of dense attentions,
            which make no map.
    """
    rows: list[Result | None] = []
    for tokens in sorted(lengths):
        for name in variants:
            rows += _measure(session, shape, tokens, name)
            session.release()
    return [row for row in rows if row is not None]


def _measure(session: Session, shape: Shape, tokens: int, name: str) -> list[Result | None]:
    dense = name in BASELINES
    device = session.device
    cell = {"dtype": shape.dtype_name, "map": not dense, "block_q": BLOCK, "block_k": BLOCK}
    values = {"model": str(shape), "context": tokens, "impl": name, "cell": cell, "realised_density": 1.0}
    names = ["pooled_ms", *(["extra_memory_mib"] if device.type == "cuda" else [])]
    blanks = [session.blank(what, **values) for what in names]
    label = f"{tokens:>7,} tokens, {name}{' (dense, no map)' if dense else ''}"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        if dense:
            return dense_attention(name, q, k, v)
        if name == PLAIN:
            return lambda: plain_pooled_attention(q, k, v)
        return lambda: pooled_attention(q, k, v, block_q=BLOCK, block_k=BLOCK, impl=name)

    def run() -> dict[str, dict[str, Any]]:
        oracle = check_dense if dense else check_pooled
        session.check(f"{'dense' if dense else 'pooled'} {name}", lambda: oracle(lambda *x: call(*x)(), shape, device))
        one = call(*random_qkv(shape, tokens, device))
        # Memory first: a variant that has too little of it need not be timed.
        memory = extra_memory(one, device) / 2**20 if device.type == "cuda" else 0.0
        return {"pooled_ms": device_time(one, device).fields(), "extra_memory_mib": {"value": round(memory, 3), "n": 1}}

    return session.measured_together(blanks, run, label=label)
