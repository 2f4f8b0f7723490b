"""`FinetuneTrainer`: trains a model and its gates together while attention is sparse."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seerattn.hf.finetuning import SampleMeter, SparseTraining
from seerattn.training.layer_loss import LayerLoss
from seerattn.training.objective import first_broken, is_gate, stand_in, without_shared
from seerattn.training.trainer import RecordedTrainer, first_not_finite

if TYPE_CHECKING:
    from seerattn.training.finetune import FinetuneConfig


class _MicroBatch(NamedTuple):
    """What a record wants to know of a forward; numbers stay on the device until then."""

    loss: Tensor
    gate_losses: dict[int, Tensor]  # empty where the gates did not learn
    meter: SampleMeter | None


class FinetuneTrainer(RecordedTrainer):
    """Trains everything in an `Objective`.

    No weight stands between the two losses: that of the gates reaches the gates alone, they are clipped by themselves,
    and AdamW's steps do not depend on the scale of a gradient.

    Args:
        autocasts: compute in bfloat16 in place of the Trainer's ``bf16``, by which FSDP would round the gates as well.
        **kwargs: those of `RecordedTrainer`.
    """

    config: FinetuneConfig
    shown = ("loss", "gate_loss", "sparsity")
    remedy = "a smaller lr or gate_lr"

    def __init__(self, *, autocasts: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._autocasts = autocasts
        self.metrics: list[_MicroBatch] = []
        self._gates_checked = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the model and one for the gates."""
        if self.optimizer is None:
            if self.args.process_index > 0:
                stand_in(self.model)  # the first process has the weights that all get
            named = list((self.model if model is None else model).named_parameters())
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [{"params": [p for name, p in named if not is_gate(name)], "lr": self.config.lr}]
            if not self.config.dense:
                groups.append({"params": [p for name, p in named if is_gate(name)], "lr": self.config.gate_lr})
            self.optimizer = kind(groups, **options | {"weight_decay": 0.0})
        return self.optimizer

    def compute_loss_context_manager(self) -> AbstractContextManager:
        """See `Trainer`; what autocasts here keeps no copies of weights that FSDP gathers and frees layer by layer."""
        if not self._autocasts:
            return super().compute_loss_context_manager()
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)

    def sparse_training(self, inputs: dict[str, Tensor]) -> SparseTraining | None:
        """What attends in the forward of a batch of the current step; None is dense attention without gates."""
        config, step = self.config, self.state.global_step
        if config.dense:
            return None
        return SparseTraining(
            density=1 - config.sparsity_at(step),
            loss_fn=LayerLoss(loss=config.loss, row_weight=config.row_weight) if self._learns(step) else None,
            target_share=config.target_share,
            seed=config.seed,
            step=step,
            segment_ids=inputs.get("segment_ids"),
        )

    def _learns(self, step: int) -> bool:
        return step % self.config.target_every == 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross-entropy of the next token plus the gates' loss.

        Raises:
            ValueError: the loss is not finite on some process.
        """
        sparse = self.sparse_training(inputs)
        batch = {name: inputs[name] for name in ("input_ids", "position_ids")}
        loss, gate_loss = model(**batch, sparse=sparse)
        gates = {} if gate_loss is None else {layer: m["loss"] for layer, m in sparse.metrics().items()}
        self.metrics.append(_MicroBatch(loss.detach(), gates, None if sparse is None else sparse.meter))
        total = loss if gate_loss is None else loss + gate_loss.to(loss.device)
        finite = torch.isfinite(total.detach())
        # All processes must know: one that stopped alone would leave the others waiting.
        if bool(self.accelerator.reduce((~finite).float(), reduction="sum") > 0):
            objective = self.accelerator.unwrap_model(model)
            # On all of them, since FSDP gathers weights on the way.
            with self.compute_loss_context_manager():
                where = first_broken(objective, **batch, sparse=self.sparse_training(inputs))
            seen = [] if bool(finite) else [(float(total.detach()), where)]
            value, where = gather_object(seen)[0]
            step = self.state.global_step + 1
            self.stop(f"loss must be finite, got {value}", f"first seen in {where}", step)
        return total

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips the model and the gates each by themselves: neither loss is to scale the other's steps.

        Raises:
            ValueError: a gradient is not finite, or a gate has none.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.config.dense and not self._gates_checked and self._learns(self.state.global_step):
            missing = [name for name, p in named if is_gate(name) and p.grad is None]
            if missing:
                raise ValueError(
                    f"every gate must have a gradient after the first step, got none for {len(missing)} weights such "
                    f"as {missing[0]}; with FSDP, wrap gates as units of their own: add AttnGate to "
                    "transformer_layer_cls_to_wrap"
                )
            self._gates_checked = True
        norms = []
        for gates in (False, True):
            group = [(name, p) for name, p in named if is_gate(name) == gates and p.grad is not None]
            if not group:
                continue
            norm = torch.nn.utils.get_total_norm([p.grad for _, p in group])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not bool(torch.isfinite(norm)):
                self._stop_at_gradients(group)
            torch.nn.utils.clip_grads_with_norm_([p for _, p in group], self.args.max_grad_norm, norm)
            norms.append(norm)
        return norms[0]

    def _stop_at_gradients(self, group: list[tuple[str, nn.Parameter]]) -> NoReturn:
        """Says on every process which gradient broke first on any; under FSDP each holds a shard of every one."""
        # The backward pass comes from the end of the model.
        first, step = first_not_finite([(name, p.grad) for name, p in reversed(group)]), self.state.global_step + 1
        if first is None:
            what = "gradients must have a finite norm, got one that overflows"
            self.stop(what, "though each of them is finite", step)
        self.stop("gradients must be finite, got others", f"first seen in that of {first}", step)

    def summarize(self, micro_batches: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Means over all micro-batches since the last record; of the gates' loss over those in which gates learned."""
        metrics, self.metrics = self.metrics, []
        densities = [1.0 if m.meter is None or not m.meter.layers else m.meter.mean() for m in metrics]
        learned = [m.gate_losses for m in metrics if m.gate_losses]
        layers = sorted(learned[0]) if learned else []
        values = [torch.stack([m.loss for m in metrics]).mean().cpu(), torch.tensor(densities).double().mean()]
        values += [torch.stack([losses[layer] for losses in learned]).mean().cpu() for layer in layers]
        loss, density, *gates = self.mean_over_processes(torch.stack([x.double() for x in values]))
        record = {"loss": loss, "sparsity": 1 - density}
        if not gates:
            return record, {}
        layer_loss = {str(layer): x for layer, x in zip(layers, gates)}
        gate_loss = sum(gates) / len(gates)
        self.tell_rise(gate_loss)
        return record | {"gate_loss": gate_loss}, {"layer_gate_loss": layer_loss}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, without_shared(self.model.state_dict() if state_dict is None else state_dict))

    def whole_state(self) -> dict[str, Tensor]:
        """The state of the `Objective`, gathered where FSDP shards it; to be called on all processes."""
        return self.accelerator.get_state_dict(self.model_wrapped)
