"""One token of every sequence in one layer: dense attention, choice and sparse attention, and what the host takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seerattn.bench.check import GATE_TOKENS, check_decoding, check_token_choice
from seerattn.bench.decode import random_cache
from seerattn.bench.dense import sdpa_backend
from seerattn.bench.inputs import Shape, random_lists
from seerattn.bench.model import TINY, BenchModel, gate_form, layer_context, random_gate, rotary_tables
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import graph_time, pipeline_time
from seerattn.gate.attn_gate import AttnGate
from seerattn.gate_decode import GateDecoder
from seerattn.gate_memory import GateMemory
from seerattn.hf.attach import set_policy
from seerattn.hf.meters import record_density
from seerattn.ops.decode_attention import decode_attention
from seerattn.results.record import Result
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.policies import TopK
from seerattn.selection.selector import AttentionContext, Memory

# Keys of a sequence; where there are more, there are more sequences.
LONGEST = 32768
DENSITIES = (0.05, 0.1, 0.2, 0.5)
POLICY = TopK(density=0.1)
# Calls of a graph read more than this together before one reads again what another one did.
COLD_BYTES = 200e6
# A model that is bound by the host.
HOST_LAYERS, HOST_TOKENS, HOST_ROOM, HOST_TURNS = 8, 1024, 4096, 5


class DecodeLayer:
    """One layer at one number of keys, and the times that a table tells of it.

    On a GPU calls are timed in a CUDA graph of several, so the host is not in them.

    Args:
        session: what runs them.
        shape: the heads of the layer.
        keys: of all sequences together.
    """

    def __init__(self, session: Session, shape: Shape, keys: int) -> None:
        self.session, self.shape, self.device = session, shape, session.device
        self.batch = max(1, keys // LONGEST)
        self.tokens = keys // self.batch
        size = 2 * self.batch * shape.kv_heads * self.tokens * shape.head_dim * shape.dtype.itemsize
        self._copies = int(-(-COLD_BYTES // size)) if self.device.type == "cuda" else 1
        self._clock = {"clock": "graph" if self.device.type == "cuda" else "wall"}

    @cached_property
    def _q(self) -> Tensor:
        return self._draw(self.batch, self.shape.heads, 1, self.shape.head_dim)

    @cached_property
    def _caches(self) -> list[tuple[Tensor, Tensor]]:
        size = (self.batch, self.shape.kv_heads, self.tokens, self.shape.head_dim)
        return [(self._draw(*size), self._draw(*size)) for _ in range(self._copies)]

    def _draw(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.shape.dtype, device=self.device).normal_()

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.full((self.batch,), self.tokens, dtype=torch.int32, device=self.device)

    def dense(self, name: str) -> Result | None:
        """Time of attention to all keys by one of PyTorch's backends ("decode_attention_ms", method "dense")."""

        def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            with sdpa_backend(name, self.device):
                return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=grouped)[:, :, 0]

        def run() -> dict[str, Any]:
            check = lambda: check_decoding(attend, self.shape, self.device, block_k=None)  # noqa: E731
            self.session.check(f"dense {name} of one token", check)
            calls = [lambda k=k, v=v: attend(self._q[:, :, 0], k, v) for k, v in self._caches]
            return graph_time(calls, self.device).fields()

        return self._measured("decode_attention_ms", name, run, f"dense {name}", realised_density=1.0)

    def choosing(self, form: str) -> Result | None:
        """Time of a gate with random weights and top-k, from the query on ("decode_select_ms")."""

        def run() -> dict[str, Any]:
            gate = random_gate(gate_form(form), self.shape, self.device)
            check = lambda: check_token_choice(  # noqa: E731
                lambda q, k: GateDecoder(gate, TopK(density=0.3)).select_token(q, k, self._context(k.shape[2])),
                gate,
                self.shape,
                rotary_tables(self.shape, GATE_TOKENS + 1, self.device),
                density=0.3,
            )
            self.session.check(f"choice of one token by the gate {form}", check)
            decoder, k = GateDecoder(gate, POLICY), self._caches[0][0]
            contexts = [replace(self._context(self.tokens), memory=self._memory(gate)) for _ in range(self._copies)]
            with torch.no_grad():
                counts = decoder.select_token(self._q, k, contexts[0]).counts
                calls = [lambda at=context: decoder.select_token(self._q, k, at) for context in contexts]
                fields = graph_time(calls, self.device).fields()
            return fields | {"realised_density": float(counts.float().mean()) / -(-self.tokens // decoder.block_size)}

        values = of_gates(form) | {"settings": POLICY.to_dict(), "density": POLICY.density, "seed": 0}
        return self._measured("decode_select_ms", "auto", run, f"gate {form}", {"form": form}, **values)

    def sparse(self, density: float, block_k: int) -> Result | None:
        """Time of attention to random blocks ("decode_attention_ms", method "random")."""

        def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, blocks: DecodeBlocks | None) -> Tensor:
            return decode_attention(q, k, v, lengths=lengths, blocks=blocks)

        def run() -> dict[str, Any]:
            check = lambda: check_decoding(attend, self.shape, self.device, block_k=block_k)  # noqa: E731
            self.session.check(f"attention of one token to blocks of {block_k}", check)
            drawn = [
                random_lists(self.shape, self._lengths, self.tokens, block_k=block_k, density=density, seed=seed)
                for seed in range(8 * self._copies)
            ]
            calls = [
                lambda at=self._caches[i % self._copies], blocks=blocks: attend(
                    self._q[:, :, 0], *at, self._lengths, blocks
                )
                for i, blocks in enumerate(drawn)
            ]
            realised = float(drawn[0].counts.float().mean()) / -(-self.tokens // block_k)
            return graph_time(calls, self.device).fields() | {"realised_density": realised}

        values = {"method": "random", "kind": "static", "name": "random", "density": density, "seed": 0}
        cell = {"keys_of_a_block": block_k, "page": 0}
        return self._measured("decode_attention_ms", "auto", run, f"density {density:g}", cell, **values)

    def _context(self, tokens: int) -> AttentionContext:
        """What a layer of the model tells of a token behind others."""
        context = layer_context(self.shape, tokens, self.device)
        own = {name: getattr(context.rotary, name)[:, -1:] for name in ("cos", "sin")}
        return replace(context, rotary=None, token_rotary=replace(context.rotary, **own), shared={})

    def _memory(self, gate: AttnGate) -> Memory:
        """Random gate keys of all blocks that are finished."""
        config, past = gate.config, self.tokens - 1
        windows = past // config.block_k * config.key_subblocks
        keys = self._draw(self.batch, gate.k_weight.shape[0], windows, gate.gate_dim, dtype=torch.float32)
        return Memory(past, replace(GateMemory.of(Memory(), gate), tokens=past, keys=keys))

    def _measured(
        self,
        what: str,
        impl: str,
        run: Callable[[], dict[str, Any]],
        label: str,
        cell: dict[str, Any] | None = None,
        **values: Any,
    ) -> Result | None:
        cell = {"dtype": self.shape.dtype_name, "batch": self.batch} | self._clock | (cell or {})
        blank = self.session.blank(what, model=str(self.shape), context=self.tokens, impl=impl, cell=cell, **values)
        return self.session.measured(blank, run, label=f"{self.batch:>3} x {self.tokens:>7,}, one token, {label}")


def decode_rows(
    session: Session, shape: Shape, keys: Sequence[int], baselines: Sequence[str], form: str
) -> list[dict[str, Any]]:
    """Rows of a table by the keys of all sequences; what could not be measured in full is missing."""
    rows, block_k = [], gate_form(form).block_k
    for number in sorted(set(keys)):
        layer = DecodeLayer(session, shape, number)
        dense = [row for row in map(layer.dense, baselines) if row is not None and row.value is not None]
        choosing = layer.choosing(form)
        sparse = {density: layer.sparse(density, block_k) for density in DENSITIES}
        del layer
        session.release()
        if dense and all(row is not None and row.value is not None for row in (choosing, *sparse.values())):
            rows.append(
                {
                    "tokens": number,
                    "dense_ms": min(row.value for row in dense),
                    "overhead_ms": choosing.value,
                    "sparse_ms": {str(density): row.value for density, row in sparse.items()},
                }
            )
    return rows


def decode_host(session: Session, shape: Shape, form: str) -> Result | None:
    """What the host takes for a sparse layer of a decoded token ("decode_host_ms"), by steps of a narrow model."""
    size = replace(TINY, name=str(shape), layers=HOST_LAYERS, whole=HOST_LAYERS, shape=shape)

    def run() -> dict[str, Any]:
        model = BenchModel(size, session.device, "sparse").gated(form)
        set_policy(model, None, decode_policy=POLICY)
        cache = random_cache(size, 1, HOST_TOKENS, HOST_ROOM, session.device)
        token = torch.full((1, 1), 3, device=session.device)

        def step() -> None:
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache, use_cache=True)

        with record_density(model) as meter:
            step()
        # The least: whatever else the host does only adds to it.
        ms = [each for _ in range(HOST_TURNS) for each in pipeline_time(step, session.device, budget_ms=20.0).runs]
        fields = {"n": len(ms), "realised_density": meter.decode.mean(), "samples": {"step_ms": ms}}
        return fields | {"value": round(min(ms) / HOST_LAYERS, 5)}

    values = of_gates(form) | {"settings": POLICY.to_dict(), "density": POLICY.density, "seed": 0}
    cell = {"dtype": shape.dtype_name, "layers": HOST_LAYERS}
    blank = session.blank("decode_host_ms", model=size.name, context=HOST_TOKENS, impl="sparse", cell=cell, **values)
    return session.measured(blank, run, label="host, a sparse layer of one token")
