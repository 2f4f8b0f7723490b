"""Time to the first token of a whole model: dense attention of several kinds, and gates at several densities."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.bench.attention import Sparse, require_dense, require_selection, require_sparse, share_of
from seerattn.bench.dense import default_backends, sdpa_backend
from seerattn.bench.model import Size, first_layer_only, gate_form
from seerattn.bench.model_runs import ModelRuns, random_batch
from seerattn.bench.options import PUBLISHED_DENSITIES, ModelBench, contexts, densities, impl
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import long_runs, reset_peak, synchronize
from seerattn.hf.attach import set_policy
from seerattn.hf.meters import record_density
from seerattn.ops.resolve import preferred
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.policies import TopK


def prefill(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, chunk: int = 0) -> int:
    """The first token that follows a prompt, with a cache filled for the ones after it.

    The prompt comes in calls of ``chunk`` tokens, 0 is one call.
    """
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in input_ids.split(chunk or input_ids.shape[1], dim=1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


class AttentionClock:
    """Adds up the time inside the attention function of a model while it is installed.

    On a GPU it records events and waits for none, so that what it measures runs as without it.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def installed(self, implementation: str) -> Iterator[AttentionClock]:
        """Watches the attention function of that name inside the ``with``."""
        attend = ALL_ATTENTION_FUNCTIONS[implementation]

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            out = attend(*args, **kwargs)
            self._marks.append((begin, self._mark()))
            return out

        ALL_ATTENTION_FUNCTIONS[implementation] = timed
        try:
            yield self
        finally:
            ALL_ATTENTION_FUNCTIONS[implementation] = attend

    def take(self) -> float:
        """Seconds since the last time; waits for the device."""
        synchronize(self._device)
        marks, self._marks = self._marks, []
        if self._device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in marks) / 1e3
        return sum(end - begin for begin, end in marks)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True, kw_only=True)
class TTFTBench(ModelBench):
    """Time to first token ("ttft_s"), the share of attention in it ("attention_share") and "peak_memory_gib".

    The model has random weights, and so have its gates; top-k computes the blocks that it is told to whatever the
    scores. Dense runs are those of the unpatched model.

    Attributes:
        densities: shares of the causal block area that are computed.
        chunks: tokens of the calls that a prompt with gates comes in, 0 for one call; top-k is told its length.
        impl: of the sparse attention; None is the fastest one.
    """

    contexts: tuple[int, ...] = contexts(8192, 16384, 32768, 65536, 131072, low=2)
    densities: tuple[float, ...] = densities(*PUBLISHED_DENSITIES)
    chunks: tuple[int, ...] = option(
        (0,), help="Tokens of a call of a prompt with gates; 0 is one call.", low=0, flag=False
    )
    impl: str | None = impl()

    def run(self, session: Session, subject: Size) -> list[Result]:
        """See `Bench`."""
        impl = self.impl or preferred("block_sparse_attention", "auto", session.device)
        bench = _Prefills(session, subject, self.repeats, impl)
        rows: list[Result | None] = []
        # Gates are attached once for all lengths.
        for name in self.baselines or default_backends(session.device):
            rows += [row for tokens in self.lengths for row in bench.dense(tokens, name)]
        for form, tokens, density in product(self.gates, self.lengths, sorted(self.densities)):
            for chunk in sorted({chunk for chunk in self.chunks if chunk < tokens}):
                rows += bench.sparse(tokens, form, density, chunk)
        return [row for row in rows if row is not None]


class _Prefills(ModelRuns):
    """Prefills of one model."""

    quantities = ("ttft_s", "attention_share", "peak_memory_gib")

    def dense(self, tokens: int, name: str) -> list[Result | None]:
        """The unpatched model with one SDPA backend."""

        def run() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.device):
                require_dense(self.session, self.shape, name)
                return self._run(self.model.plain(), tokens)

        return self.measure(tokens, name, run, f"dense {name}", cell={}, realised_density=1.0)

    def sparse(self, tokens: int, form: str, density: float, chunk: int) -> list[Result | None]:
        """The model with gates of a form, and top-k of a density, for a prompt in calls of ``chunk`` tokens."""
        c, policy = gate_form(form), TopK(density=density, length=tokens if chunk else None)
        kind = Sparse(self.impl, c.block_q, c.block_k, share_of(c))

        def run() -> dict[str, dict[str, Any]]:
            require_sparse(self.session, self.shape, kind)
            require_selection(self.session, self.shape, form, c.block_q, c.block_k, "auto")
            model = self.model.gated(form)
            set_policy(model, policy)
            return self._run(model, tokens, chunk)

        values = of_gates(form) | {"settings": policy.to_dict(), "density": density, "seed": 0}
        label = f"gates {form}, density {density:g}" + (f", chunks of {chunk:,}" if chunk else "")
        cell = kind.cell(self.shape) | ({"chunk": chunk} if chunk else {})
        return self.measure(tokens, self.impl, run, label, cell=cell, **values)

    def _run(self, model: PreTrainedModel | PeftModel, tokens: int, chunk: int = 0) -> dict[str, dict[str, Any]]:
        input_ids = random_batch(self.size, tokens, self.device)["input_ids"]
        self.session.release()
        # One layer of the full length compiles and loads everything there is, at a share of the time.
        with first_layer_only(self.model.base), record_density(model) as meter:
            prefill(model, input_ids, chunk)
        reset_peak(self.device)
        clock = AttentionClock(self.device)

        def one() -> float:
            prefill(model, input_ids, chunk)
            return clock.take()

        with clock.installed(self.model.base.config._attn_implementation):
            seconds, inside = long_runs(one, self.device, repeats=self.repeats)
        found = {"ttft_s": median(seconds), "attention_share": median(a / s for a, s in zip(inside, seconds))}
        realised = meter.mean() if meter.layers else 1.0
        return self.fields(found, {"seconds": seconds, "attention": inside}, realised_density=realised)
