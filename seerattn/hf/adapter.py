"""Gates as a PEFT adapter, so that every way of loading, saving and training of PEFT and transformers serves them.

Importing this module registers the method "seer" with PEFT. `import seerattn` arranges that it is imported as soon as
PEFT is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattn.gate.attn_gate import AttnGate
from seerattn.gate.config import AttnGateConfig
from seerattn.gate_selector import GateSelector
from seerattn.hf.attention import IMPLEMENTATIONS, LayerCall, LayerState, check_implementation, layer_states
from seerattn.hf.checkpoint import check_gate_folder
from seerattn.hf.distillation import GateLosses
from seerattn.hf.probe import AttentionLayer, dense_implementation, probe, set_implementation
from seerattn.hf.rotary import gate_frequencies
from seerattn.selection.policies import Policy, policy_from_dict

logger = logging.getLogger(__name__)


def _register_type(name: str) -> None:
    # PeftType is a closed enumeration and register_peft_method refuses names that it lacks.
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on members are plain class attributes; the enum's own __setattr__ would refuse this one.
    type.__setattr__(PeftType, name, member)


if "SEER" not in PeftType._member_map_:
    _register_type("SEER")


@dataclass
class SeerConfig(PeftConfig):
    """Configuration of the gates of a model, saved as ``adapter_config.json``.

    Attributes:
        gate: form of the gates, `AttnGateConfig.to_dict`.
        policy: `Policy.to_dict` of the policy to start with; None runs dense until `set_policy`.
        layers: indices of the decoder layers with a gate; None is every full-attention layer.
        base_model: architecture and sizes of the model that the gates belong to, filled in when they are attached.
        target_modules: names of the gated modules, filled in when they are attached.
    """

    gate: dict = field(default_factory=lambda: AttnGateConfig().to_dict())
    policy: dict | None = None
    layers: list[int] | None = None
    base_model: dict | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        # Without a task type, PeftModel does not go through the tuner's forward.
        self.task_type = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = PeftType("SEER")
        AttnGateConfig.from_dict(self.gate)
        if self.policy is not None:
            policy_from_dict(self.policy)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs) -> SeerConfig:
        """Reads the config of a folder or Hub repository; a folder must hold whole gates.

        Raises:
            ValueError: the folder's gates are missing, truncated or pickled.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.exists():
            check_gate_folder(folder)
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"gates must be a folder or the name of gates on the Hub, got {pretrained_model_name_or_path}"
            ) from error


class SeerLayer(nn.Module, BaseTunerLayer):
    """An attention module and its gates, one an adapter name."""

    adapter_layer_names = ("seer_gate",)

    def __init__(self, base_layer: nn.Module, found: AttentionLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.seer_gate = nn.ModuleDict()
        self.found = found
        self._policies: dict[str, Policy | None] = {}
        self._seer = LayerState(found.layer, found.num_heads, found.rotation)

    def add_gate(self, adapter_name: str, config: SeerConfig) -> None:
        """Makes the gate of one adapter: fresh, or to be filled by a checkpoint."""
        gate_config, found = AttnGateConfig.from_dict(config.gate), self.found
        frequencies = None
        if gate_config.rope:
            frequencies = gate_frequencies(found.rotation, gate_dim=gate_config.gate_dim or found.head_dim)
        gate = AttnGate(
            gate_config,
            num_heads=found.num_heads,
            num_kv_heads=found.num_kv_heads,
            head_dim=found.head_dim,
            inv_freq=frequencies,
        ).float()
        if config.inference_mode:
            # To be overwritten by the checkpoint. PEFT only warns of tensors that it misses; `check_filled` refuses.
            for parameter in gate.parameters():
                nn.init.constant_(parameter, torch.nan)
        device = next(self.base_layer.parameters()).device
        self.seer_gate[adapter_name] = gate if device.type == "meta" else gate.to(device)
        self._policies[adapter_name] = None if config.policy is None else policy_from_dict(config.policy)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_policy(self, policy: Policy | None) -> None:
        """Changes the policy of the active adapter."""
        for name in self.active_adapters:
            self._policies[name] = policy
        self._select()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `BaseTunerLayer.set_adapter`; one set of gates is active at a time."""
        super().set_adapter(adapter_names, inference_mode)
        # PEFT also calls this to enable an adapter again: a selector that was attached over the gates then stays.
        if self._active()[0] is not self._seer.gate:
            self._select()

    def _active(self) -> tuple[AttnGate | None, Policy | None]:
        names = [name for name in self.active_adapters if name in self.seer_gate]
        if len(names) > 1:
            raise ValueError(f"one set of gates must be active at a time, got {names}; use set_adapter")
        return (self.seer_gate[names[0]], self._policies[names[0]]) if names else (None, None)

    def _select(self) -> None:
        gate, policy = self._active()
        self._seer.gate = gate
        self._seer.selector = None if gate is None or policy is None else GateSelector(gate, policy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the attention module; its attention function finds the gate in the keyword ``seer``."""
        training = kwargs.pop("seer_training", None)
        if not self.disable_adapters:
            self.check_filled()
            check_implementation(self.base_layer)
            training = None if self._seer.gate is None else training
            kwargs["seer"] = LayerCall(self._seer, kwargs["position_embeddings"], kwargs.get("position_ids"), training)
        return self.base_layer(*args, **kwargs)

    def check_filled(self) -> None:
        """Refuses gates that a checkpoint should have filled and did not.

        Raises:
            ValueError: the active gate holds NaN.
        """
        gate = self._seer.gate
        if gate is None or gate is self.__dict__.get("_filled"):
            return
        if any(bool(p.isnan().any()) for p in gate.parameters()):
            raise ValueError(
                f"gates must be finite in every layer, got none for layer {self._seer.layer}; the checkpoint does not "
                "hold them, load whole gates of this model"
            )
        self.__dict__["_filled"] = gate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeerLayer:
        # model.to(bfloat16) must round neither the gates nor their frequencies.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base_layer._apply(fn, recurse)
        self.seer_gate._apply(move, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SeerModel(BaseTuner):
    """The PEFT tuner: wraps attention modules in `SeerLayer`; trains gates in its forward."""

    prefix = "seer_"
    tuner_layer_cls = SeerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: SeerConfig, model_config: dict) -> SeerConfig:
        return peft_config

    def _prepare_model(self, peft_config: SeerConfig, model: PreTrainedModel) -> None:
        wrapped = [module for module in model.modules() if isinstance(module, SeerLayer)]
        if not wrapped and layer_states(model):
            raise ValueError("model must have no selectors, got one with some; call seerattn.detach(model) first")
        dense = dense_implementation(model)
        # Of a second set of gates the layers are proven already.
        found = [layer.found for layer in wrapped] or probe(model)
        layers = {layer.layer: layer for layer in found}
        wanted = sorted(layers) if peft_config.layers is None else peft_config.layers
        if not wanted or not set(wanted) <= set(layers):
            raise ValueError(f"layers must be among the full-attention layers {sorted(layers)}, got {wanted}")
        fingerprint = _fingerprint(model, layers[wanted[0]])
        if peft_config.base_model not in (None, fingerprint):
            raise ValueError(
                f"gates must belong to the model, got gates for {peft_config.base_model} and a model with {fingerprint}"
            )
        peft_config.base_model = fingerprint
        peft_config.target_modules = [layers[index].name for index in wanted]
        self._found = {layer.module: layer for layer in found}
        set_implementation(model, IMPLEMENTATIONS[dense])

    def _create_and_replace(
        self,
        peft_config: SeerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SeerLayer):
            target.add_gate(adapter_name, peft_config)
            return
        layer = SeerLayer(target, self._found[target])
        layer.set_adapter(adapter_name)
        layer.add_gate(adapter_name, peft_config)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError("gates cannot be merged into the weights of the model; use unload")
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        set_implementation(model, dense_implementation(model))
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(
        self,
        *args: Any,
        gate_losses: GateLosses | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; given `gate_losses`, runs it dense, without a graph, and trains the gates.

        Args:
            args: as the model takes them.
            gate_losses: collects the losses of the layers; the output's ``loss`` is then their total.
            segment_ids: int ``[B, S]``, documents of packed rows, for training; by default documents begin where
                ``position_ids`` begin anew.
            kwargs: as the model takes them. ``labels`` are dropped in training, the base model being frozen.
        """
        if gate_losses is None:
            return self.model(*args, **kwargs)
        kwargs.pop("labels", None)
        gate_losses.segment_ids = segment_ids
        with torch.no_grad():
            out = self.model(*args, seer_training=gate_losses, **kwargs)
        out["loss"] = gate_losses.total()
        return out


def _fingerprint(model: PreTrainedModel, layer: AttentionLayer) -> dict:
    config = model.config.get_text_config()
    return {
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
    }


if PeftType("SEER") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="seer", config_cls=SeerConfig, model_cls=SeerModel)
