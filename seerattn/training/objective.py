"""`Objective`: the losses of fine-tuning as one module, so that DDP and FSDP see a single forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seerattn.hf.capturing import learning
from seerattn.hf.chunked_loss import head_losses
from seerattn.hf.identity import transformers_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from seerattn.hf.finetuning import SparseTraining


class Objective(nn.Module):
    """Language-model loss of a model, and while it has gates theirs.

    Args:
        model: a causal language model, with or without gates.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> PreTrainedModel:
        """The model without its adapter."""
        return transformers_model(self.model)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, sparse: SparseTraining | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Losses of a batch.

        Every sample counts the same, however many documents it holds. The first token of a document is not predicted.

        Args:
            input_ids: int64 ``[B, S]``.
            position_ids: int64 ``[B, S]``, beginning anew with every document.
            sparse: attends in the layers with gates; None is dense attention.

        Returns:
            Cross-entropy a token, and the gates' loss if they learn.
        """
        backbone, inputs = self.base.base_model, {"input_ids": input_ids, "position_ids": position_ids}
        with nullcontext() if sparse is None else learning(sparse):
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
        labels = input_ids[:, 1:].masked_fill(position_ids[:, 1:] == 0, -100)
        losses = head_losses(self.base, hidden[:, :-1], labels)
        loss = (losses.sum(1) / (labels != -100).sum(1)).mean()
        return loss, None if sparse is None or sparse.loss_fn is None else sparse.total()

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        # By this name the Trainer knows what a checkpoint leaves out, and then ties the weights.
        state = self.state_dict()
        return [name for name in state if name not in without_shared(state)]

    def tie_weights(self) -> None:
        """Ties those weights of the model that are one."""
        self.base.tie_weights()

    def set_checkpointing(self, enabled: bool) -> None:
        """Whether decoder layers run again in the backward pass in place of keeping what they computed."""
        # transformers 5.23 renames the methods.
        name = "activation" if hasattr(self.base, "activation_checkpointing_enable") else "gradient"
        if enabled:
            options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(self.base, f"{name}_checkpointing_enable")(**options)
        else:
            getattr(self.base, f"{name}_checkpointing_disable")()

    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        count = self.base.config.get_text_config().num_hidden_layers
        lists = (m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return next(lists)

    def base_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's own weights out of this module's state, under their own names."""
        prefix = next(name for name, module in self.named_modules() if module is self.base) + "."
        return {name.removeprefix(prefix): x for name, x in state.items() if "seer_gate" not in name}

    def gate_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gates' weights out of this module's state, under the names of the adapter."""
        return {name.removeprefix("model."): x for name, x in state.items() if "seer_gate" in name}


def is_gate(name: str) -> bool:
    """Whether a parameter of that name belongs to a gate."""
    return "seer_gate" in name


def without_shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a state, tied ones once, as safetensors asks for it."""
    kept: dict[tuple, str] = {}
    for name, tensor in state.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else (name,), name)
    return {name: state[name] for name in kept.values()}


def stand_in(module: nn.Module) -> None:
    """Puts host tensors that hold one number each, seen at full shape, in the place of weights on the meta device.

    Accelerate finds the shard of a weight in the optimizer by the weight's address. On the meta device all addresses
    are 0, and the optimizer would be given the last shard in place of every other one.
    """
    stands: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.is_meta:
                seen = torch.empty((), dtype=weight.dtype).expand(weight.shape)
                stand = nn.Parameter(seen, requires_grad=weight.requires_grad)
                part._parameters[name] = stands.setdefault(weight, stand)


def first_broken(objective: Objective, input_ids: Tensor, position_ids: Tensor, sparse: SparseTraining | None) -> str:
    """Where a forward of a batch whose loss is not finite first yields something that is not."""
    found: list[str] = []

    def look(what: str, tensor: Tensor) -> None:
        if not found and not bool(torch.isfinite(tensor).all()):
            found.append(what)

    def watch(index: int):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            look("the embeddings", args[0]) if index == 0 else None
            look(f"the output of layer {index}", output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(objective.layers())]
    try:
        with torch.no_grad():
            loss, _ = objective(input_ids, position_ids, sparse)
    finally:
        for handle in handles:
            handle.remove()
    if sparse is not None and sparse.loss_fn is not None:
        for layer, metrics in sparse.metrics().items():
            look(f"the gate's loss of layer {layer}", metrics["loss"])
    look("the language-model head", loss)
    return found[0] if found else "no layer when the batch ran again"
