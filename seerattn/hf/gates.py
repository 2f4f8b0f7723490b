"""Gates beside an attention module: made, placed, and given back.

Nothing of the model is wrapped. The gates of a layer are one more child of its attention module, and a forward
pre-hook hands the attention function what it needs; so every other adapter, hook and name stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.gate_files import GATES
from seerattn.hf.attention import add_call
from seerattn.hf.placement import execution_device
from seerattn.hf.rotary import gate_rotation
from seerattn.hf.state import Attachment, AttentionLayer, LayerState

# Name of the `GateSwitch` of a model that transformers loaded gates into, which skips what is called as gates are.
SWITCH = "gate_switch"


class SeerGates(nn.ModuleDict):
    """The gates of one attention layer, by the names of their adapters; always fp32, whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeerGates:
        # model.to(bfloat16) must round neither the gates nor their frequencies.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this on any module that has it, after it has loaded weights on whatever device.
        if adapter_name in self:
            place = device or execution_device(self.__dict__["_attention"])
            if place.type != "meta":
                self[adapter_name].to(place)


class GateSwitch(nn.Module, BaseTunerLayer):
    """Tells PEFT and transformers, which find adapters by this class, that gates are there and whether they are used.

    Args:
        attachment: of the model.
        acts: whether it also switches the gates, as nothing else does where transformers holds the adapter. Within a
            tuner of PEFT it must not: other adapters around the gates would switch them as well.
    """

    adapter_layer_names = ()

    def __init__(self, attachment: Attachment, *, acts: bool) -> None:
        super().__init__()
        self.attachment, self.acts = attachment, acts

    @property
    def disable_adapters(self) -> bool:
        """See `BaseTunerLayer.disable_adapters`."""
        return not self.attachment.enabled

    @property
    def active_adapter(self) -> str | list[str]:
        """See `BaseTunerLayer.active_adapter`."""
        return self.attachment.active or []

    def enable_adapters(self, enabled: bool) -> None:
        """See `BaseTunerLayer.enable_adapters`."""
        if self.acts:
            self.attachment.enabled = enabled
            self.attachment.refresh()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; names of other adapters leave the gates as they are."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.attachment.policies]
        if self.acts and len(own) > 1:
            raise ValueError(f"one set of gates must be active at a time, got {own}; name one of them")
        if self.acts and own:
            self.attachment.active = own[0]
            self.attachment.refresh()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Holds nothing that could be moved."""

    def delete_adapter(self, adapter_name: str) -> None:
        """See `BaseTunerLayer.delete_adapter`."""
        if self.acts and adapter_name in self.attachment.policies:
            delete_gate(self.attachment, adapter_name)


def attach_layer(layer: AttentionLayer, attachment: Attachment) -> None:
    """Makes an attention module hand our attention function what it needs."""
    module = layer.module
    module._seer = LayerState(layer, attachment)
    module._seer_hook = module.register_forward_pre_hook(add_call, with_kwargs=True)
    attachment.layers[layer.layer] = layer


def detach_layers(model: nn.Module) -> None:
    """Takes hooks, states and gates off every layer of ``model``; what they chose is gone."""
    for module in model.modules():
        if "_seer" in module.__dict__:
            module._seer_hook.remove()
            del module._seer_hook, module._seer
            if GATES in module._modules:
                delattr(module, GATES)
    model._modules.pop(SWITCH, None)


def make_gate(layer: AttentionLayer, form: AttnGateConfig) -> AttnGate:
    """A fresh gate for a layer, fp32.

    Raises:
        ValueError: the form does not fit the layer.
    """
    rotation = {}
    if form.rope:
        rotation = gate_rotation(layer.rotation, gate_dim=form.gate_dim or layer.head_dim)._asdict()
    return AttnGate(
        form,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        part=layer.part,
        **rotation,
    ).float()


def add_gate(layer: AttentionLayer, name: str, gate: AttnGate) -> None:
    """Puts a gate beside an attention module, where that runs, under the name of its adapter."""
    module = layer.module
    if GATES not in module._modules:
        holder = SeerGates()
        holder.__dict__["_attention"] = module  # not a child: the module is the parent
        holder.train(module.training)
        module.add_module(GATES, holder)
    place = execution_device(module)
    if place.type != "meta" and not any(p.is_meta for p in gate.parameters()):
        gate = gate.to(place)
    gate.train(module.training)
    getattr(module, GATES)[name] = gate


def delete_gate(attachment: Attachment, name: str) -> None:
    """Removes one set of gates; another one, if there is any, becomes active."""
    for layer in attachment.layers.values():
        holder = layer.module._modules.get(GATES)
        if holder is not None and name in holder:
            del holder[name]
    attachment.policies.pop(name, None)
    attachment.decode_policies.pop(name, None)
    attachment.budgets.pop(name, None)
    if attachment.active == name:
        attachment.active = next(iter(attachment.policies), None)
    attachment.refresh()


def await_weights(gate: AttnGate) -> None:
    """Fills a gate with NaN, to be overwritten by a checkpoint.

    PEFT only warns of tensors that it misses; `check_filled` refuses them.
    """
    for parameter in gate.parameters():
        nn.init.constant_(parameter, torch.nan)
    gate.__dict__["_awaits"] = True
