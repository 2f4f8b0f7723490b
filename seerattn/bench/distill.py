"""Speed of gate distillation: whole training steps beside plain forwards of the same model, which are its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from peft import PeftModel

from seerattn.bench.attention import require_dense
from seerattn.bench.attention_map import attention_with_map
from seerattn.bench.check import check_pooled
from seerattn.bench.dense import sdpa_backend
from seerattn.bench.model import BenchModel, Size, gate_form
from seerattn.bench.session import Session
from seerattn.bench.timing import long_runs, peak_gib, reset_peak
from seerattn.hf.distillation import GateLosses
from seerattn.ops.resolve import preferred
from seerattn.results.record import Result
from seerattn.training.layer_loss import LayerLoss

QUANTITIES = ("tokens_per_second", "peak_memory_gib")
# The published recipe: steps, samples of a step, tokens of a sample (arXiv 2410.13276, section 5).
RECIPE = (500, 16, 65536)


def bench_distill(
    session: Session,
    size: Size,
    *,
    lengths: Sequence[int],
    baselines: Sequence[str],
    form: str,
    repeats: int = 3,
) -> list[Result]:
    """Tokens a second and peak memory of training steps and of plain forwards, at every length.

    A step is what `seerattn.training` does for a micro-batch of one sample: forward with `GateLosses`, backward,
    clipping and AdamW. (With accumulation the last two come once for several micro-batches.) Where the length is that
    of the published recipe, "distill_hours" follows: what the whole recipe takes on this device. Where fewer
    layers than the whole model's are measured it is scaled to all of them; ``cell["layers"]`` says how many were run.

    Args:
        session: what runs the measurements.
        size: of the model.
        lengths: tokens of a sample.
        baselines: SDPA backends of the plain forward.
        form: name of the gates.
        repeats: timed runs of a cell, 2 at least; long ones are repeated twice.

    Returns:
        The results that there are.
    """
    bench = _Steps(session, size, BenchModel(size, session.device), max(2, repeats))
    rows: list[Result | None] = []
    for name in baselines:
        rows += [row for tokens in sorted(lengths) for row in bench.forward(tokens, name)]
    for tokens in sorted(lengths):
        rows += bench.distill(tokens, form)
    return [row for row in rows if row is not None]


class _Steps:
    """Forwards and training steps of one model."""

    def __init__(self, session: Session, size: Size, model: BenchModel, repeats: int) -> None:
        self.session, self.size, self.model, self.repeats = session, size, model, repeats

    def forward(self, tokens: int, name: str) -> list[Result | None]:
        """The unpatched model without a graph."""

        def run() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.session.device), torch.no_grad():
                require_dense(self.session, self.size.shape, name)
                model, inputs = self.model.plain(), self._inputs(tokens)
                return self._run(lambda: model(**inputs, logits_to_keep=1, use_cache=False), tokens)

        label = f"plain forward, dense {name}"
        return self._measure(tokens, name, "forward", run, label=label, values={"realised_density": 1.0})

    def distill(self, tokens: int, form: str) -> list[Result | None]:
        """The model with fresh gates, training them; and the hours of the recipe."""
        device, shape = self.session.device, self.size.shape
        impl = preferred("attention_map", "auto", device)
        c = gate_form(form)
        sizes = {"block_q": c.block_q, "block_k": c.block_k}

        def run() -> dict[str, dict[str, Any]]:
            self.session.check(f"pooled {impl}", lambda: check_pooled(attention_with_map, shape, device))
            return self._run(_training_step(self.model.gated(form), self._inputs(tokens)), tokens)

        values = {"selector": "gate", "gates": form, "realised_density": 1.0, "seed": 0}
        label = f"distillation of gates {form}"
        rows = self._measure(tokens, impl, "distill", run, label=label, values=values, cell=sizes)
        return [*rows, self._hours(rows[0], label)]

    def _hours(self, speed: Result | None, label: str) -> Result | None:
        steps, samples, tokens = RECIPE
        if speed is None or speed.value is None or speed.context != tokens:
            return None

        def run() -> dict[str, Any]:
            seconds = steps * samples * tokens / speed.value * self.size.whole / self.size.layers
            return {"value": round(seconds / 3600, 2), "n": speed.n, "realised_density": 1.0}

        values = {"selector": speed.selector, "gates": speed.gates, "seed": speed.seed}
        cell = {name: value for name, value in speed.cell.items() if name not in ("impl", "device")}
        blank = self.session.blank(
            "distill_hours", model=speed.model, context=tokens, impl=speed.cell["impl"], cell=cell, **values
        )
        scaled = "" if self.size.layers == self.size.whole else f", scaled from {self.size.layers} layers"
        return self.session.measured(
            blank, run, label=f"{label}, hours of {steps} steps x {samples} x {tokens}{scaled}"
        )

    def _inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        input_ids = torch.randint(3, self.size.vocab, (1, tokens), generator=generator)
        positions = torch.arange(tokens)[None]
        return {"input_ids": input_ids.to(self.session.device), "position_ids": positions.to(self.session.device)}

    def _measure(
        self,
        tokens: int,
        impl: str,
        work: str,
        run: Callable[[], dict[str, dict[str, Any]]],
        *,
        label: str,
        values: dict[str, Any],
        cell: dict[str, Any] | None = None,
    ) -> list[Result | None]:
        session = self.session
        cell = {"dtype": self.size.shape.dtype_name, "layers": self.size.layers, "work": work} | (cell or {})
        blanks = [
            session.blank(what, model=self.size.name, context=tokens, impl=impl, cell=cell, **values)
            for what in QUANTITIES
            if what != "peak_memory_gib" or session.device.type == "cuda"
        ]
        return session.measured_together(blanks, run, label=f"{tokens:>7,} tokens, {label}")

    def _run(self, step: Callable[[], object], tokens: int) -> dict[str, dict[str, Any]]:
        device = self.session.device
        self.session.release()
        step()
        reset_peak(device)
        seconds, _ = long_runs(step, device, repeats=self.repeats)
        fields = {"n": len(seconds), "samples": {"seconds": [round(s, 5) for s in seconds]}}
        found = {"tokens_per_second": tokens / median(seconds)} | peak_gib(device)
        return {what: fields | {"value": round(value, 3)} for what, value in found.items()}


def _training_step(model: PeftModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def step() -> None:
        out = model(**inputs, gate_losses=GateLosses(LayerLoss()), logits_to_keep=1, use_cache=False)
        out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
