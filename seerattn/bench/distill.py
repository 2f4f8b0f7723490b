"""Speed of gate distillation: whole training steps beside plain forwards of the same model, which are its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import PeftModel

from seerattn.bench.attention import require_dense
from seerattn.bench.attention_map import attention_with_map
from seerattn.bench.check import check_attention_map
from seerattn.bench.dense import default_backends, sdpa_backend
from seerattn.bench.model import Size, gate_form
from seerattn.bench.model_runs import ModelRuns, random_batch
from seerattn.bench.options import ModelBench, contexts
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import long_runs, reset_peak
from seerattn.hf.distillation import GateLosses
from seerattn.ops.resolve import preferred
from seerattn.results.record import Result
from seerattn.training.layer_loss import LayerLoss

# The published recipe: steps, samples of a step, tokens of a sample (arXiv 2410.13276, section 5).
RECIPE = (500, 16, 65536)


@dataclass(frozen=True, kw_only=True)
class DistillBench(ModelBench):
    """Tokens a second and peak memory of training steps and of plain forwards, at every length.

    A step is what `seerattn.training` does for a micro-batch of one sample: forward with `GateLosses`, backward,
    clipping and AdamW. (With accumulation the last two come once for several micro-batches.) Where the length is that
    of the published recipe, "distill_hours" follows: what the whole recipe takes on this device. Where fewer
    layers than the whole model's are measured it is scaled to all of them; ``cell["layers"]`` says how many were run.
    """

    contexts: tuple[int, ...] = contexts(8192, 32768, 65536, low=128)

    def run(self, session: Session, subject: Size) -> list[Result]:
        """See `Bench`."""
        bench = _Steps(session, subject, self.repeats)
        rows: list[Result | None] = []
        for name in self.baselines or default_backends(session.device):
            rows += [row for tokens in self.lengths for row in bench.forward(tokens, name)]
        for form in self.gates:
            rows += [row for tokens in self.lengths for row in bench.distill(tokens, form)]
        return [row for row in rows if row is not None]


class _Steps(ModelRuns):
    """Forwards and training steps of one model."""

    quantities = ("tokens_per_second", "peak_memory_gib")

    def forward(self, tokens: int, name: str) -> list[Result | None]:
        """The unpatched model without a graph."""

        def run() -> dict[str, dict[str, Any]]:
            with sdpa_backend(name, self.device), torch.no_grad():
                require_dense(self.session, self.shape, name)
                model, inputs = self.model.plain(), random_batch(self.size, tokens, self.device)
                return self._run(lambda: model(**inputs, logits_to_keep=1, use_cache=False), tokens)

        label = f"plain forward, dense {name}"
        return self.measure(tokens, name, run, label, cell={"work": "forward"}, realised_density=1.0)

    def distill(self, tokens: int, form: str) -> list[Result | None]:
        """The model with fresh gates, training them; and the hours of the recipe."""
        impl, c = preferred("attention_map", "auto", self.device), gate_form(form)

        def run() -> dict[str, dict[str, Any]]:
            check = lambda: check_attention_map(attention_with_map, self.shape, self.device)  # noqa: E731
            self.session.check(f"map of {impl}", check)
            batch = random_batch(self.size, tokens, self.device)
            return self._run(_training_step(self.model.gated(form), batch), tokens)

        label, cell = f"distillation of gates {form}", {"work": "distill", "block_q": c.block_q, "block_k": c.block_k}
        values = of_gates(form) | {"realised_density": 1.0, "seed": 0}
        rows = self.measure(tokens, impl, run, label, cell=cell, **values)
        return [*rows, self._hours(rows[0], label)]

    def _hours(self, speed: Result | None, label: str) -> Result | None:
        steps, samples, tokens = RECIPE
        if speed is None or speed.value is None or speed.context != tokens:
            return None

        def run() -> dict[str, Any]:
            seconds = steps * samples * tokens / speed.value * self.size.whole / self.size.layers
            return {"value": round(seconds / 3600, 2), "n": speed.n, "realised_density": 1.0}

        values = of_gates(speed.name) | {"seed": speed.seed}
        cell = {name: value for name, value in speed.cell.items() if name not in ("impl", "device")}
        blank = self.session.blank(
            "distill_hours", model=speed.model, context=tokens, impl=speed.cell["impl"], cell=cell, **values
        )
        scaled = "" if self.size.layers == self.size.whole else f", scaled from {self.size.layers} layers"
        return self.session.measured(
            blank, run, label=f"{label}, hours of {steps} steps x {samples} x {tokens}{scaled}"
        )

    def _run(self, step: Callable[[], object], tokens: int) -> dict[str, dict[str, Any]]:
        self.session.release()
        step()
        reset_peak(self.device)
        seconds, _ = long_runs(step, self.device, repeats=self.repeats)
        return self.fields({"tokens_per_second": tokens / median(seconds)}, {"seconds": seconds})


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
