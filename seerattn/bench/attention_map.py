"""Attention that also emits the map gates learn from: its time and memory beside dense attention and plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.check import BLOCK, check_attention_map, check_dense
from seerattn.bench.dense import BACKENDS, BASELINES, default_baselines, dense_attention
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.options import LayerBench, contexts
from seerattn.bench.session import Session
from seerattn.bench.timing import device_time, extra_memory
from seerattn.ops.attention_map import attention_map
from seerattn.ops.resolve import IMPLS, preferred
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.map_form import PUBLISHED, MapForm

PLAIN = "pytorch"


def attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, form: MapForm = PUBLISHED, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Output and one map of `attention_map`."""
    out, (found,) = attention_map(q, k, v, form=form, block_q=BLOCK, block_k=BLOCK, impl=impl)
    return out, found


def plain_attention_with_map(q: Tensor, k: Tensor, v: Tensor, form: MapForm = PUBLISHED) -> tuple[Tensor, Tensor]:
    """The same as one writes it down in PyTorch, with the whole map of probabilities."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    ahead = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill_(ahead, -torch.inf).softmax(-1)
    del scores
    return p.to(q.dtype) @ v, _plain_map(p, form)


def _plain_map(p: Tensor, form: MapForm) -> Tensor:
    if form == PUBLISHED:
        tiles = F.max_pool2d(p, BLOCK, ceil_mode=True)
    else:
        pad = -p.shape[-1] % BLOCK
        shares = F.pad(p, (0, pad, 0, pad)).unflatten(-1, (-1, BLOCK))
        shares = (shares.amax(-1) if form.keys == "max" else shares.sum(-1)).unflatten(2, (-1, BLOCK))
        tiles = shares.amax(3) if form.power == math.inf else shares.pow(form.power).mean(3).pow(1 / form.power)
    return tiles / tiles.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class MapBench(LayerBench):
    """Time ("attention_map_ms") and memory beyond inputs and results ("extra_memory_mib") in blocks of 64 x 64.

    Attributes:
        variants: implementations of `attention_map`, "pytorch" for the plain version, or dense attentions, which make
            no map; none are those that can be compared on the device.
        targets: forms of the map, see `MapForm.parse`.
    """

    contexts: tuple[int, ...] = contexts(8192, 32768, 65536, 131072)
    variants: tuple[str, ...] = option(
        (),
        help="What to time, dense attention without a map too; default: what there is here.",
        choices=(*IMPLS["attention_map"], PLAIN, *BASELINES),
    )
    targets: tuple[str, ...] = option(
        (str(PUBLISHED),),
        help="Maps, keys:power of each: max or sum over keys, 1 to inf over rows, such as max:inf,sum:2.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.targets:
            MapForm.parse(text)

    def run(self, session: Session, subject: Shape) -> list[Result]:
        """See `Bench`."""
        device = session.device
        dense = [name for name in default_baselines(device) if name in BACKENDS]
        variants = self.variants or [preferred("attention_map", "auto", device), PLAIN, *dense]
        forms = dict.fromkeys(map(MapForm.parse, self.targets))
        rows: list[Result | None] = []
        for tokens in self.lengths:
            for name in variants:
                for form in [None] if name in BASELINES else forms:
                    rows += _measure(session, subject, tokens, name, form)
                    session.release()
        return [row for row in rows if row is not None]


def _measure(session: Session, shape: Shape, tokens: int, name: str, form: MapForm | None) -> list[Result | None]:
    """One variant, which makes no map without a form."""
    dense = form is None
    device = session.device
    cell = {"dtype": shape.dtype_name, "map": not dense, "block_q": BLOCK, "block_k": BLOCK}
    # The published one goes without saying, as in results from before there were others.
    cell |= {} if form in (None, PUBLISHED) else {"form": str(form)}
    values = {"model": str(shape), "context": tokens, "impl": name, "cell": cell, "realised_density": 1.0}
    names = ["attention_map_ms", *(["extra_memory_mib"] if device.type == "cuda" else [])]
    blanks = [session.blank(what, **values) for what in names]
    label = f"{tokens:>7,} tokens, {name} ({'dense, no map' if dense else form})"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        if dense:
            return dense_attention(name, q, k, v)
        if name == PLAIN:
            return lambda: plain_attention_with_map(q, k, v, form)
        return lambda: attention_with_map(q, k, v, form, name)

    def run() -> dict[str, dict[str, Any]]:
        oracle, what = (check_dense, "dense") if dense else (partial(check_attention_map, form=form), f"map {form} of")
        session.check(f"{what} {name}", lambda: oracle(lambda *x: call(*x)(), shape, device))
        one = call(*random_qkv(shape, tokens, device))
        # Memory first: a variant that has too little of it need not be timed.
        memory = extra_memory(one, device) / 2**20 if device.type == "cuda" else 0.0
        return {
            "attention_map_ms": device_time(one, device).fields(),
            "extra_memory_mib": {"value": round(memory, 3), "n": 1},
        }

    return session.measured_together(blanks, run, label=label)
