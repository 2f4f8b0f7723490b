"""Time of a decoded token of a whole model: dense, and with gates that choose what each token reads.

Steps are launched by the host, kernel by kernel, or as one CUDA graph (`seerattn.decode_graphs`), the dense ones too;
"compiled" is a graph whose norms and MLPs are compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from seerattn.bench.dense import BACKENDS, sdpa_backend
from seerattn.bench.model import Size, gate_form
from seerattn.bench.model_runs import ModelRuns
from seerattn.bench.options import ModelBench, contexts, densities, gates
from seerattn.bench.serve import ROUNDINGS, default_dense
from seerattn.bench.session import CheckFailed, Session, of_gates
from seerattn.bench.timing import long_runs, reset_peak
from seerattn.hf.attach import set_policy
from seerattn.hf.decode_graph import DecodeGraph
from seerattn.hf.identity import transformers_model
from seerattn.hf.meters import record_density
from seerattn.hf.state import attachment_of
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.policies import Policy, TopK

# A graph is recorded at the second step.
WARM_UPS = 3
LAUNCHES = ("host", "graph", "compiled")


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for the tokens to come.

    A `DynamicLayer` copies all of them for every token, and a `StaticLayer` needs a mask, with which
    scaled_dot_product_attention has no fast kernel.

    Args:
        room: ``[2, B, HKV, S, D]`` for keys and values.
        tokens: those that are there.
    """

    def __init__(self, room: Tensor, tokens: int) -> None:
        super().__init__()
        self.room = room
        self.dtype, self.device, self.is_initialized = room.dtype, room.device, True
        self.keys, self.values = room[:, :, :, :tokens]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Puts new tokens behind the others; see `CacheLayerMixin`."""
        begin = self.keys.shape[2]
        self.room[0, :, :, begin : begin + key_states.shape[2]] = key_states
        self.room[1, :, :, begin : begin + key_states.shape[2]] = value_states
        self.keys, self.values = self.room[:, :, :, : begin + key_states.shape[2]]
        return self.keys, self.values


def random_cache(size: Size, batch: int, tokens: int, more: int, device: torch.device) -> DynamicCache:
    """A cache of random keys and values of ``tokens`` tokens, with room for ``more``."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, batch, size.shape.kv_heads, tokens + more, size.shape.head_dim)
    cache = DynamicCache()
    for _ in range(size.layers):
        room = torch.empty(shape, dtype=size.shape.dtype, device=device).normal_(generator=generator)
        cache.layers.append(RoomyLayer(room, tokens))
    return cache


def static_cache(
    model: PreTrainedModel, size: Size, batch: int, tokens: int, more: int, device: torch.device
) -> StaticCache:
    """A static cache of the same keys and values as `random_cache` gives."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + more)
    for layer, held in zip(cache.layers, random_cache(size, batch, tokens, more, device).layers):
        layer.lazy_initialization(held.keys[:, :, :0], held.values[:, :, :0])
        # In the place of what it has just made, so that there is room for one of them alone.
        layer.keys, layer.values = held.room
        layer.cumulative_length.fill_(tokens)
    return cache


def decoded_tokens(
    model: PreTrainedModel | PeftModel,
    size: Size,
    batch: int,
    tokens: int,
    more: int,
    launch: str,
) -> Iterator[Tensor]:
    """Logits of one token after the other, behind a cache of random keys.

    Args:
        model: of that size, attached to unless the host launches steps.
        size: its size.
        batch: sequences.
        tokens: behind which the first one is decoded.
        more: tokens that there is room for.
        launch: "host", or how a graph is made: "graph", or "compiled" with norms and MLPs by `torch.compile`.

    Raises:
        CheckFailed: steps that should be a graph are none.
    """
    cache: Cache
    inner = transformers_model(model)
    device = inner.device
    if launch != "host":
        cache = static_cache(inner, size, batch, tokens, more, device)
        on_gpu = device.type == "cuda"
        forward = DecodeGraph(inner, attachment_of(model), records=on_gpu, compile=launch == "compiled")
    else:
        cache, forward = random_cache(size, batch, tokens, more, device), model
    token = torch.full((batch, 1), 3, device=device)
    while True:
        with torch.no_grad():
            logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
        if launch != "host" and forward.refused is not None:
            raise CheckFailed(f"steps must be a graph, got none: {forward.refused}")
        yield logits


@dataclass(frozen=True, kw_only=True)
class DecodeBench(ModelBench):
    """Milliseconds of a decoded token ("decode_ms") of all sequences together, and "peak_memory_gib".

    The model, its gates and what its cache holds are random; top-k reads the share that it is told to, whatever the
    scores. Gate keys are made before the clock starts. Dense steps that the host launches are those of the unpatched
    model; as a graph they attend by this library's kernel to all keys. Before runs are timed, the same with gates that
    keep all blocks is held against the unpatched model.

    Attributes:
        densities: shares of the blocks that a token reads.
        baselines: SDPA backends of dense steps.
        batches: sequences that are decoded together.
        steps: tokens of a timed run.
        launches: how steps are launched.
    """

    contexts: tuple[int, ...] = contexts(32768, 131072, low=2)
    densities: tuple[float, ...] = densities(0.1)
    gates: tuple[str, ...] = gates("default")
    baselines: tuple[str, ...] = option(
        (), help="Dense attention; default: flash, on a CPU sdpa.", choices=(*BACKENDS,), flag=False
    )
    batches: tuple[int, ...] = option((1, 4), help="Sequences that are decoded together.", low=1)
    steps: int = option(16, help="Tokens of a timed run.", low=1, flag=False)
    launches: tuple[str, ...] = option(
        (),
        help="By the host, as a CUDA graph, or as one with compiled norms and MLPs; default: host, graph.",
        choices=LAUNCHES,
        flag=False,
    )

    def run(self, session: Session, subject: Size) -> list[Result]:
        """See `Bench`."""
        bench = _Steps(session, subject, self.repeats, "sparse")
        launches = self.launches or (("host", "graph") if session.device.type == "cuda" else ("host",))
        rows: list[Result | None] = []
        for tokens, batch, launch in product(self.lengths, sorted(set(self.batches)), launches):
            for name in (self.baselines or (default_dense(session.device),)) if launch == "host" else (launch,):
                rows += bench.dense(tokens, batch, name, self.steps)
            for form, density in product(self.gates, sorted(self.densities)):
                rows += bench.sparse(tokens, batch, form, density, self.steps, launch)
        return [row for row in rows if row is not None]


class _Steps(ModelRuns):
    """Decode steps of one model."""

    quantities = ("decode_ms", "peak_memory_gib")

    def dense(self, tokens: int, batch: int, name: str, steps: int) -> list[Result | None]:
        """The unpatched model with one SDPA backend, or a graph of steps over all keys, by its name."""

        def by_host() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.device):
                return self._run(self.model.plain(), tokens, batch, steps, "host")

        def as_graph() -> dict[str, dict[str, Any]]:
            self._check("default", None, name)
            set_policy(model := self.model.gated("default"), None)
            return self._run(model, tokens, batch, steps, name)

        label = f"{batch:>2} at a time, dense {name}"
        run = by_host if name in BACKENDS else as_graph
        impl, launch = (name, "host") if name in BACKENDS else ("triton", name)
        return self.measure(tokens, impl, run, label, cell={"batch": batch, "launch": launch}, realised_density=1.0)

    def sparse(
        self, tokens: int, batch: int, form: str, density: float, steps: int, launch: str
    ) -> list[Result | None]:
        """The model with gates of a form, and top-k of a density for each token."""
        policy = TopK(density=density)

        def run() -> dict[str, dict[str, Any]]:
            self._check(form, TopK(density=1.0), launch)
            model = self.model.gated(form)
            set_policy(model, None, decode_policy=policy)
            return self._run(model, tokens, batch, steps, launch)

        values = of_gates(form) | {"settings": policy.to_dict(), "density": density, "seed": 0}
        # A token is a query block of its own.
        cell = {"batch": batch, "block_q": 1, "block_k": gate_form(form).block_k, "share": "group", "launch": launch}
        label = f"{batch:>2} at a time, gates {form}, density {density:g}, by {launch}"
        return self.measure(tokens, self.impl, run, label, cell=cell, **values)

    def _run(
        self, model: PreTrainedModel | PeftModel, tokens: int, batch: int, steps: int, launch: str
    ) -> dict[str, dict[str, Any]]:
        self.session.release()
        reset_peak(self.device)
        walk = decoded_tokens(model, self.size, batch, tokens, steps * (self.repeats + 1) + WARM_UPS, launch)
        with record_density(model) as meter:
            for _ in range(WARM_UPS):
                next(walk)

        def one() -> None:
            for _ in range(steps):
                next(walk)

        runs, _ = long_runs(one, self.device, repeats=self.repeats)
        seconds = [each / steps for each in runs]
        realised = meter.decode.mean() if meter.decode.layers else 1.0
        return self.fields({"decode_ms": median(seconds) * 1e3}, {"seconds": seconds}, realised_density=realised)

    def _check(self, form: str, policy: Policy | None, launch: str) -> None:
        """Holds steps that read all blocks against the unpatched model.

        Raises:
            CheckFailed: they give other logits, roundings aside.
        """
        tokens, batch = 5 * gate_form(form).block_k + 7, 2

        def logits(model: PreTrainedModel | PeftModel, launch: str) -> Tensor:
            # The third step is the first one that a graph repeats.
            *_, third = islice(decoded_tokens(model, self.size, batch, tokens, 3, launch), 3)
            return third.double()

        def run() -> tuple[float, float]:
            expected = logits(self.model.plain(), "host")
            model = self.model.gated(form)
            set_policy(model, None, decode_policy=policy)
            bound = ROUNDINGS * torch.finfo(self.shape.dtype).eps * float(expected.abs().max())
            return float((logits(model, launch) - expected).abs().max()), bound

        said = "without a policy" if policy is None else f"of gates {form} that read all blocks"
        self.session.check(f"steps {said}, by {launch}", run, oracle="the unpatched model")
