"""Time to the first token of a whole model: dense attention of several kinds, and gates at several sparsities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.bench.attention import Sparse, require_dense, require_selection, require_sparse, share_of
from seerattn.bench.dense import sdpa_backend
from seerattn.bench.model import BenchModel, Size, first_layer_only, gate_form
from seerattn.bench.session import Session
from seerattn.bench.timing import long_runs, peak_gib, reset_peak, synchronize
from seerattn.hf.attach import set_policy
from seerattn.hf.meters import record_density
from seerattn.results.record import Result
from seerattn.selection.policies import TopK

QUANTITIES = ("ttft_s", "attention_share", "peak_memory_gib")


def prefill(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor) -> int:
    """The first token that follows a prompt, with a cache filled for the ones after it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
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


def bench_ttft(
    session: Session,
    size: Size,
    *,
    lengths: Sequence[int],
    sparsities: Sequence[float],
    baselines: Sequence[str],
    forms: Sequence[str],
    impl: str,
    repeats: int = 3,
) -> list[Result]:
    """Time to first token ("ttft_s"), the share of attention in it ("attention_share") and "peak_memory_gib".

    The model has random weights, and so have its gates; top-k computes the blocks that it is told to whatever the
    scores. Dense runs are those of the unpatched model.

    Args:
        session: what runs the measurements.
        size: of the model.
        lengths: tokens of the prompt.
        sparsities: shares of the causal block area that are not computed.
        baselines: SDPA backends.
        forms: names of gates.
        impl: of the sparse attention.
        repeats: timed runs of a cell, 2 at least; long ones are repeated twice.

    Returns:
        The results that there are.
    """
    model = BenchModel(size, session.device, impl)
    bench = _Prefills(session, size, model, max(2, repeats))
    rows: list[Result | None] = []
    # Gates are attached once for all lengths.
    for name in baselines:
        rows += [row for tokens in sorted(lengths) for row in bench.dense(tokens, name)]
    for form in forms:
        for tokens in sorted(lengths):
            for sparsity in sorted(sparsities, reverse=True):
                rows += bench.sparse(tokens, form, impl, density=round(1 - sparsity, 6))
    return [row for row in rows if row is not None]


class _Prefills:
    """Prefills of one model; three quantities come from the same runs."""

    def __init__(self, session: Session, size: Size, model: BenchModel, repeats: int) -> None:
        self.session, self.size, self.model, self.repeats = session, size, model, repeats

    def dense(self, tokens: int, name: str) -> list[Result | None]:
        """The unpatched model with one SDPA backend."""

        def run() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.session.device):
                require_dense(self.session, self.size.shape, name)
                return self._run(self.model.plain(), tokens)

        return self._measure(tokens, name, run, label=f"dense {name}", values={"realised_density": 1.0}, cell={})

    def sparse(self, tokens: int, form: str, impl: str, *, density: float) -> list[Result | None]:
        """The model with gates of a form, and top-k of a density."""
        c, policy = gate_form(form), TopK(density=density)
        kind = Sparse(impl, c.block_q, c.block_k, share_of(c))

        def run() -> dict[str, dict[str, Any]]:
            require_sparse(self.session, self.size.shape, kind)
            require_selection(self.session, self.size.shape, form, c.block_q, c.block_k, "auto")
            model = self.model.gated(form)
            set_policy(model, policy)
            return self._run(model, tokens)

        values = {"selector": "gate", "gates": form, "policy": policy.to_dict(), "density": density, "seed": 0}
        label = f"gates {form}, sparsity {1 - density:.3g}"
        return self._measure(tokens, impl, run, label=label, values=values, cell=kind.cell(self.size.shape))

    def _measure(
        self,
        tokens: int,
        impl: str,
        run: Callable[[], dict[str, dict[str, Any]]],
        *,
        label: str,
        values: dict[str, Any],
        cell: dict[str, Any],
    ) -> list[Result | None]:
        session = self.session
        cell = {"dtype": self.size.shape.dtype_name, "layers": self.size.layers} | cell
        blanks = [
            session.blank(what, model=self.size.name, context=tokens, impl=impl, cell=cell, **values)
            for what in QUANTITIES
            if what != "peak_memory_gib" or session.device.type == "cuda"
        ]
        return session.measured_together(blanks, run, label=f"{tokens:>7,} tokens, {label}")

    def _run(self, model: PreTrainedModel | PeftModel, tokens: int) -> dict[str, dict[str, Any]]:
        session, device = self.session, self.session.device
        generator = torch.Generator().manual_seed(tokens)
        input_ids = torch.randint(3, self.size.vocab, (1, tokens), generator=generator).to(device)
        session.release()
        # One layer of the full length compiles and loads everything there is, at a share of the time.
        with first_layer_only(self.model.base), record_density(model) as meter:
            prefill(model, input_ids)
        reset_peak(device)
        clock = AttentionClock(device)

        def one() -> float:
            prefill(model, input_ids)
            return clock.take()

        with clock.installed(self.model.base.config._attn_implementation):
            seconds, inside = long_runs(one, device, repeats=self.repeats)
        samples = {"seconds": [round(s, 5) for s in seconds], "attention": [round(s, 5) for s in inside]}
        fields = {"n": len(seconds), "samples": samples, "realised_density": meter.mean() if meter.layers else 1.0}
        found = {"ttft_s": median(seconds), "attention_share": median(a / s for a, s in zip(inside, seconds))}
        found |= peak_gib(device)
        return {what: fields | {"value": round(value, 5)} for what, value in found.items()}
