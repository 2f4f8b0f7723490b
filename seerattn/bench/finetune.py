"""Speed of fine-tuning with sparse attention: what one layer adds to a training step, and whole steps beside dense
ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from seerattn.bench.attention import Sparse, require_dense, require_selection, require_sparse, share_of
from seerattn.bench.backward import forward_and_backward
from seerattn.bench.check import BLOCK, TOKENS, check_attention_map
from seerattn.bench.dense import default_backends, dense_attention, sdpa_backend
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.bench.model import SIZES, BenchModel, Size, gate_form, rotary_tables
from seerattn.bench.model_runs import ModelRuns, random_batch
from seerattn.bench.options import ModelBench, contexts, densities, impl
from seerattn.bench.session import Session, of_gates
from seerattn.bench.timing import device_time, long_runs, reset_peak
from seerattn.hf.attention import seer_attention
from seerattn.hf.call import LayerCall
from seerattn.hf.capturing import learning
from seerattn.hf.finetuning import SparseTraining
from seerattn.hf.mask import make_mask
from seerattn.hf.state import layer_states
from seerattn.ops.attention_map import attention_map
from seerattn.ops.resolve import preferred
from seerattn.options import option
from seerattn.results.record import Result
from seerattn.selection.block_indices import num_query_blocks
from seerattn.selection.policies import TopK
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.objective import Objective, is_gate

# As near to 1 as keeps every block, yet by the sparse path: at 1 the model's own dense attention runs.
ALL_BLOCKS = 1 - 1e-9


@dataclass(frozen=True, kw_only=True)
class FinetuneBench(ModelBench):
    """One layer's attention and whole steps, dense and with `SparseTraining`, at every length.

    "finetune_layer_ms" is forward and backward of attention alone; with gates that is selection, block-sparse
    attention, the targets of a share of the query blocks and the gate's loss and gradient on them.
    "finetune_step_ms", "tokens_per_second" and "peak_memory_gib" are of the forward and backward of the whole model
    with gradient checkpointing and the language-model loss in pieces, for one sample and without an optimizer.

    Attributes:
        densities: shares of the causal block area that are computed; 1 is dense attention while gates learn.
        target_shares: shares of the query blocks whose targets are computed.
        impl: of the sparse attention; None is the fastest one.
    """

    contexts: tuple[int, ...] = contexts(32768, low=128)
    model: str = option("llama-3.2-1b", help="Shape, with random weights.", choices=(*SIZES,))
    densities: tuple[float, ...] = densities(0.1, 0.5)
    target_shares: tuple[float, ...] = option(
        (0.1, 1.0), help="Shares of the query blocks that gates learn from.", above=0, high=1, flag=False
    )
    impl: str | None = impl()

    def run(self, session: Session, subject: Size) -> list[Result]:
        """See `Bench`."""
        impl = self.impl or preferred("block_sparse_attention", "auto", session.device)
        bench = _Finetuning(session, subject, self.repeats, impl)
        rows: list[Result | None] = []
        for name, tokens in product(self.baselines or default_backends(session.device)[::-1], self.lengths):
            rows += [bench.dense_layer(tokens, name), *bench.dense_step(tokens, name)]
        # Gates are attached once for all lengths.
        sparse = product(self.gates, self.lengths, sorted(self.densities), self.target_shares)
        for form, tokens, density, share in sparse:
            rows += [bench.sparse_layer(tokens, form, density, share), *bench.sparse_step(tokens, form, density, share)]
        return [row for row in rows if row is not None]


class _Finetuning(ModelRuns):
    """Layers and steps of one model."""

    quantities = ("finetune_step_ms", "tokens_per_second", "peak_memory_gib")

    def dense_layer(self, tokens: int, name: str) -> Result | None:
        """Dense attention, as `seerattn bench attention --backward` times it."""

        def run() -> dict[str, Any]:
            require_dense(self.session, self.shape, name, backward=True)
            qkv = random_qkv(self.shape, tokens, self.device)
            attend = forward_and_backward(lambda *x: dense_attention(name, *x)(), *qkv)
            return device_time(attend, self.device).fields()

        return self._layer(tokens, name, run, f"dense {name}", {}, realised_density=1.0)

    def dense_step(self, tokens: int, name: str) -> list[Result | None]:
        """The unpatched model with one SDPA backend."""

        def run() -> dict[str, dict[str, Any]]:
            require_dense(self.session, self.shape, name, backward=True)
            # The forward that the backward pass repeats needs the backend as well.
            with sdpa_backend(name, self.device):
                return self._time_steps(self.model.plain(), tokens, lambda: None)

        return self._step(tokens, name, run, f"dense {name}", {}, realised_density=1.0)

    def sparse_layer(self, tokens: int, form: str, density: float, share: float) -> Result | None:
        """The attention of a layer of the model with gates, called as the model calls it."""

        def run() -> dict[str, Any]:
            self._require(form)
            layer = layer_step(self.model.gated(form), self.shape, tokens, self.device)
            training = sparse_training(density, share)
            layer(training)
            realised = _realised(training)
            timing = device_time(lambda: layer(sparse_training(density, share)), self.device)
            return timing.fields() | {"realised_density": realised}

        cell, values, label = self._sparse(form, density, share)
        return self._layer(tokens, self.impl, run, label, cell, **values)

    def sparse_step(self, tokens: int, form: str, density: float, share: float) -> list[Result | None]:
        """The model with fresh gates."""

        def run() -> dict[str, dict[str, Any]]:
            self._require(form)
            return self._time_steps(self.model.gated(form), tokens, lambda: sparse_training(density, share))

        cell, values, label = self._sparse(form, density, share)
        return self._step(tokens, self.impl, run, label, cell, **values)

    def _require(self, form: str) -> None:
        """Checks every part of sparse training and a whole step, once a session."""
        session, shape, device, c = self.session, self.shape, self.device, gate_form(form)
        kind = Sparse(self.impl, c.block_q, c.block_k, share_of(c))
        require_sparse(session, shape, kind, backward=True)
        require_selection(session, shape, form, c.block_q, c.block_k, "auto")
        session.check("targets of query blocks", lambda: check_attention_map(_attention_and_targets, shape, device))
        title = f"training step of gates {form} with all blocks, {self.impl}"
        session.check(title, lambda: check_step(shape, device, form=form, impl=self.impl))

    def _sparse(self, form: str, density: float, share: float) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Cell, values and label of a measurement with gates."""
        c, policy = gate_form(form), TopK(density=density)
        cell = Sparse(self.impl, c.block_q, c.block_k, share_of(c)).cell(self.shape)
        cell["target_share"] = share
        values = of_gates(form) | {"settings": policy.to_dict(), "density": density, "seed": 0}
        return cell, values, f"gates {form}, density {density:g}, targets of {share:.0%} of the query blocks"

    def _layer(
        self, tokens: int, impl: str, run: Callable[[], dict[str, Any]], label: str, cell: dict[str, Any], **values: Any
    ) -> Result | None:
        cell = {"dtype": self.shape.dtype_name, "work": "fine-tuning layer"} | cell
        sizes = {"model": str(self.shape), "context": tokens, "impl": impl}
        blank = self.session.blank("finetune_layer_ms", **sizes, cell=cell, **values)
        return self.session.measured(blank, run, label=f"{tokens:>7,} tokens, layer, {label}")

    def _step(
        self,
        tokens: int,
        impl: str,
        run: Callable[[], dict[str, dict[str, Any]]],
        label: str,
        cell: dict[str, Any],
        **values: Any,
    ) -> list[Result | None]:
        label = f"step of {self.size.layers} layers, {label}"
        return self.measure(tokens, impl, run, label, cell={"work": "fine-tuning step"} | cell, **values)

    def _time_steps(
        self, model: PreTrainedModel | PeftModel, tokens: int, training: Callable[[], SparseTraining | None]
    ) -> dict[str, dict[str, Any]]:
        objective, batch = trainable(model), random_batch(self.size, tokens, self.device)

        def step() -> SparseTraining | None:
            used = training()
            losses(objective, batch, used)[0].backward()
            objective.zero_grad(set_to_none=True)
            return used

        self.session.release()
        # It compiles what there is to compile; every step computes the same number of blocks.
        realised = _realised(step())
        reset_peak(self.device)
        seconds, _ = long_runs(step, self.device, repeats=self.repeats)
        found = {"finetune_step_ms": 1e3 * median(seconds), "tokens_per_second": tokens / median(seconds)}
        return self.fields(found, {"seconds": seconds}, realised_density=realised)


def sparse_training(density: float, target_share: float) -> SparseTraining:
    """What attends in one training step; it always draws the same query blocks."""
    return SparseTraining(density=density, loss_fn=LayerLoss(), target_share=target_share)


def trainable(model: PreTrainedModel | PeftModel) -> Objective:
    """A model whose every weight learns, with gradient checkpointing."""
    objective = Objective(model.requires_grad_(True)).train()
    objective.set_checkpointing(True)
    return objective


def losses(objective: Objective, batch: dict[str, Tensor], training: SparseTraining | None) -> tuple[Tensor, Tensor]:
    """What a step of `seerattn finetune` minimises, and the language-model loss in it."""
    loss, gate_loss = objective(**batch, sparse=training)
    return loss if gate_loss is None else loss + gate_loss, loss.detach()


def layer_step(
    model: PeftModel, shape: Shape, tokens: int, device: torch.device
) -> Callable[[SparseTraining], tuple[Tensor, ...]]:
    """The first layer's attention in a training step, and the gradients of q, k, v and of the layer's gate.

    Args:
        model: with gates.
        shape: of its heads.
        tokens: of the sample.
        device: of the model.
    """
    state = layer_states(model)[0]
    module = next(m for m in model.modules() if isinstance(m, LlamaAttention))
    parameters = list(state.gate.requires_grad_(True).parameters())
    tables, positions = rotary_tables(shape, tokens, device), torch.arange(tokens, device=device)[None]
    inputs = [x.requires_grad_() for x in random_qkv(shape, tokens, device)]
    dout = torch.randn_like(inputs[0]).transpose(1, 2).contiguous()

    def step(training: SparseTraining) -> tuple[Tensor, ...]:
        call = LayerCall(state, tables, positions)
        with learning(training):
            mask = make_mask(dense="sdpa", batch_size=1, q_length=tokens, kv_length=tokens, allow_is_causal_skip=True)
            out, _ = seer_attention("sdpa", module, *inputs, mask, seer=call, scaling=module.scaling)
        gate_loss = training.total()
        return torch.autograd.grad([out, gate_loss], [*inputs, *parameters], [dout, torch.ones_like(gate_loss)])

    return step


def check_step(
    shape: Shape, device: torch.device, *, form: str, impl: str, tokens: int = TOKENS, density: float = ALL_BLOCKS
) -> tuple[float, float]:
    """The worst error over its bound, and 1, of the loss and all gradients of a step that keeps every block.

    The model is narrow but has the heads that are measured. Its unpatched copy in fp64 is the oracle; a bound is twice
    the error of the unpatched model in its own dtype and one rounding of the value. Gradients are compared by norm.

    Args:
        shape: heads and dtype.
        device: where it runs.
        form: name of the gates.
        impl: of the sparse attention.
        tokens: of the sample.
        density: that the gates select.
    """
    # transformers refuses a width that is no multiple of the heads.
    size = Size("narrow", 2, 2, hidden=math.lcm(128, shape.heads), intermediate=128, vocab=256, shape=shape)
    bench, batch = BenchModel(size, device, impl), random_batch(size, tokens, device)
    for name, parameter in bench.base.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            # Heads that look somewhere: maps of fresh models are flat, and their gradients all rounding.
            parameter.mul_(8.0)
    exact = _loss_and_gradients(copy.deepcopy(bench.base).double(), batch, None)
    plain = _loss_and_gradients(bench.plain(), batch, None)
    # All targets: a step that learns from some only computes less of the same.
    found = _loss_and_gradients(bench.gated(form), batch, sparse_training(density, 1.0))
    unit = torch.finfo(shape.dtype).eps + 16 * torch.finfo(torch.float32).eps
    ratios = []
    for name, value in exact.items():
        own, error = (float((x[name].double() - value).norm()) for x in (plain, found))
        ratios.append(error / (2 * own + unit * float(value.norm())))
    # NaN is the largest of all, wherever it stands.
    return float(torch.tensor(ratios).max()), 1.0


def _loss_and_gradients(
    model: PreTrainedModel | PeftModel, batch: dict[str, Tensor], training: SparseTraining | None
) -> dict[str, Tensor]:
    """The language-model loss, and the gradients of the model's own weights under their names without gates."""
    objective = trainable(model)
    total, loss = losses(objective, batch, training)
    total.backward()
    named = {name: p for name, p in objective.named_parameters() if not is_gate(name)}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    objective.zero_grad(set_to_none=True)
    return {"loss": loss} | objective.base_state(gradients)


def _attention_and_targets(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(num_query_blocks(0, q.shape[2], BLOCK))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out, attention_map(q, k, query_blocks=rows, block_q=BLOCK, block_k=BLOCK).map


def _realised(training: SparseTraining | None) -> float:
    """Density of what was computed; dense attention counts nothing."""
    return training.meter.mean() if training is not None and training.meter.layers else 1.0
