"""Gates as a PEFT adapter, so that every way of loading, saving and training of PEFT and transformers serves them.

Importing this module registers the method "seer" with PEFT. `import seerattn` arranges that it is imported as soon as
PEFT is. Gates are no tuner layers: PEFT neither finds other adapters inside of them nor switches both together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from seerattn.gate.config import AttnGateConfig
from seerattn.gate_files import GATES, check_identity, read_config
from seerattn.hf.attention import IMPLEMENTATIONS
from seerattn.hf.batching import leave_batching, let_batch
from seerattn.hf.capturing import Capture, learning
from seerattn.hf.config import SeerConfig, check_folder
from seerattn.hf.distillation import GateLosses
from seerattn.hf.gates import (
    SWITCH,
    GateSwitch,
    SeerGates,
    add_gate,
    attach_layer,
    await_weights,
    delete_gate,
    detach_layers,
    make_gate,
)
from seerattn.hf.identity import identity, transformers_model
from seerattn.hf.placement import dense_implementation, set_implementation
from seerattn.hf.probe import probe
from seerattn.hf.state import Attachment, attachment_of
from seerattn.selection.policies import policy_from_dict


class SeerModel(BaseTuner):
    """The PEFT tuner: puts gates beside the attention modules of a model; trains them in its forward."""

    prefix = "seer_"
    tuner_layer_cls = SeerGates
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # Not BaseTuner's: it would share the configs of an adapter that the model has already, and mark the model.
        nn.Module.__init__(self)
        self.training = model.training
        self.model = model
        self.targeted_module_names: list[str] = []
        # transformers gives a config, and holds the adapter itself from then on; PEFT gives a dictionary.
        switched = self._switched = isinstance(peft_config, PeftConfig)
        self._configs = _GateConfigs(self)
        self._configs.update({adapter_name: peft_config} if switched else peft_config)
        self._others: dict[str, PeftConfig] | None = None
        self.active_adapter: str | list[str] = adapter_name
        self.register_load_state_dict_pre_hook(_to_own_names)
        config = self._configs[adapter_name]
        if not config.keeps_base:
            freeze = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        if not config.keeps_base:
            # What PEFT does with the first adapter of a model, and what its own methods ask a model for.
            if freeze:
                self._freeze_base()
            owner, name = (model, SWITCH) if switched else (self, "seer_status")
            owner.add_module(name, GateSwitch(self.attachment, acts=switched))
        if switched:
            model.peft_config = getattr(model, "peft_config", {}) | self._configs
            model._load_pretrained_model = partial(_load_checked, model)

    # A property, as an adapter that PEFT puts around the gates would otherwise write its configs into theirs.
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs of the gates, or of the adapter around them once there is one."""
        return self._configs if self._others is None else self._others

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        """The adapter around the gates gives back what it was given."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *arguments: Any, low_cpu_mem_usage: bool = False, **options: Any
    ) -> None:
        """Puts gates of the named config beside the attention modules. See `BaseTuner.inject_adapter`.

        Raises:
            ValueError: the model cannot be served or is another one than the config's; it is as it was.
        """
        config, base = self._configs[adapter_name], transformers_model(model)
        attachment = attachment_of(base)
        if attachment is not None and not attachment.policies:
            raise ValueError("model must have no selectors, got one with some; call seerattn.detach(model) first")
        dense = dense_implementation(base)
        # Of a second set of gates the layers are proven already.
        layers = {layer.layer: layer for layer in (probe(base) if attachment is None else attachment.layers.values())}
        wanted = sorted(layers) if config.layers is None else sorted(config.layers)
        if not wanted or not set(wanted) <= set(layers):
            raise ValueError(f"layers must be among the full-attention layers {sorted(layers)}, got {wanted}")
        if any(layer.part for layer in layers.values()):
            self._check_dealt_out(config)
        found = identity(base, [layers[index] for index in wanted])
        if config.base_model is not None:
            check_identity(config.base_model, found)
        form = AttnGateConfig.from_dict(config.gate)
        gates = {index: make_gate(layers[index], form) for index in wanted}
        budgets = config.head_budgets(found, wanted)
        # All that can be refused is; the model changes from here on.
        if attachment is None:
            attachment = Attachment(dense)
            for index in wanted:
                attach_layer(layers[index], attachment)
            set_implementation(base, IMPLEMENTATIONS[dense])
            let_batch(base)
        for index, gate in gates.items():
            if low_cpu_mem_usage:
                gate = _without_weights(gate)
            elif config.inference_mode:
                await_weights(gate)
            gate.requires_grad_(not config.inference_mode)
            add_gate(layers[index], adapter_name, gate)
        config.base_model, config.layers = found, wanted
        config.target_modules = [layers[index].name for index in wanted]
        self.targeted_module_names = config.target_modules
        for policies, saved in (
            (attachment.policies, config.policy),
            (attachment.decode_policies, config.decode_policy),
        ):
            policies[adapter_name] = None if saved is None else policy_from_dict(saved)
        attachment.budgets[adapter_name] = budgets
        if attachment.active is None or adapter_name in self.active_adapters:
            attachment.active = adapter_name
        attachment.refresh()

    def _check_dealt_out(self, config: SeerConfig) -> None:
        """Refuses what no process of a model can do that has some heads of every layer (tensor parallelism)."""
        if self._switched:
            raise ValueError(
                "gates must be loaded by seerattn.attach or PeftModel.from_pretrained where heads are dealt out to "
                "processes (tensor parallelism), got load_adapter, which takes whole tensors alone"
            )
        if not config.inference_mode:
            raise ValueError(
                "gates must learn on a model in one piece, got one whose heads are dealt out to processes (tensor "
                "parallelism); train them without tp_plan, and attach the folder"
            )

    def _freeze_base(self) -> None:
        gates = {id(p) for gate in self.attachment.gates().values() for p in gate.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in gates:
                parameter.requires_grad_(False)

    @property
    def attachment(self) -> Attachment:
        """What was attached to the model.

        Raises:
            ValueError: it was taken off again.
        """
        found = attachment_of(self.model)
        if found is None:
            raise ValueError("gates must be attached to be used, got a model that they were detached from")
        return found

    # What PEFT does with adapters, for gates alone.

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one set of gates the active one."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"one set of gates must be active at a time, got {names}; name one of them")
        self.attachment.active, self.active_adapter = names[0], names[0]
        self.attachment.refresh()
        for name in self._configs:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether named gates learn."""
        for layer in self.attachment.layers.values():
            for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
                if name in getattr(layer.module, GATES, {}):
                    getattr(layer.module, GATES)[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes one set of gates."""
        if adapter_name not in self._configs:
            raise ValueError(f"adapter_name must be one of {list(self._configs)}, got {adapter_name!r}")
        del self._configs[adapter_name]
        delete_gate(self.attachment, adapter_name)
        self.active_adapter = self.attachment.active or []

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.attachment.enabled = enabled
        self.attachment.refresh()

    def disable_adapter_layers(self) -> None:
        """Runs the model without gates; other adapters stay as they are."""
        self._enable_adapter_layers(False)

    def enable_adapter_layers(self) -> None:
        """Runs the model with gates again."""
        self._enable_adapter_layers(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Gates are fp32 always, and adapters of others are not ours to cast."""

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> nn.Module:
        if merge:
            raise ValueError("gates cannot be merged into the weights of the model; use unload")
        take_off(transformers_model(self.model))
        return self.model

    def _prepare_adapter_config(self, peft_config: SeerConfig, model_config: dict) -> SeerConfig:
        return peft_config

    def _create_and_replace(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("gates stand beside modules and replace none")

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], **others: Any
    ) -> dict[str, Tensor]:
        # A name that is within a gate already went to the place where PEFT takes it off.
        own = re.compile(rf"\.{GATES}\.(\w+\.)?{re.escape(adapter_name)}\.")
        return in_peft_names({key: x for key, x in state_dict.items() if own.search(key)}, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SeerConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        foreign = next((key for key in state_dict if f".{GATES}." not in key), None)
        if foreign is not None:
            raise ValueError(f"gates must hold tensors of gates alone, got {foreign[:100]}")
        return {key.replace(f".{GATES}.", f".{GATES}.{adapter_name}."): x for key, x in state_dict.items()}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """See the model's own; PEFT asks for it whatever the model is."""
        return self.model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        *args: Any,
        gate_losses: GateLosses | None = None,
        segment_ids: Tensor | None = None,
        seer_training: Capture | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; given `gate_losses`, runs it dense, without a graph, and trains the gates.

        Args:
            args: as the model takes them.
            gate_losses: collects the losses of the layers; the output's ``loss`` is then their total.
            segment_ids: int ``[B, S]``, documents of packed rows, for training; by default documents begin where
                ``position_ids`` begin anew.
            seer_training: attends in the layers with gates in place of their policy, with a graph.
            kwargs: as the model takes them. ``labels`` are dropped while gates alone learn.

        Raises:
            ValueError: labels for gates that learn, which no loss of the model's outputs can train.
        """
        if kwargs.get("labels", 0) is None:
            del kwargs["labels"]  # PEFT adds it for models that know no labels too
        with ExitStack() as stack:
            if seer_training is not None:
                stack.enter_context(learning(seer_training))
            if gate_losses is None:
                if "labels" in kwargs and seer_training is None:
                    self._check_nothing_is_to_learn()
                return self.model(*args, **kwargs)
            kwargs.pop("labels", None)
            gate_losses.segment_ids = segment_ids
            stack.enter_context(learning(gate_losses))
            stack.enter_context(torch.no_grad())
            out = self.model(*args, **kwargs)
        out["loss"] = gate_losses.total()
        return out

    def _check_nothing_is_to_learn(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        gates = self.attachment.running.gates.values()
        if any(p.requires_grad for gate in gates for p in gate.parameters()):
            raise ValueError(
                "gates must be trained by their own loss, got labels alone, whose loss gives gates no gradient; use "
                "seerattn distill or pass gate_losses=GateLosses(...), or freeze the gates to train something else"
            )


class _GateConfigs(dict):
    """The configs of gates by the names of their adapters; those of another tuner are put aside.

    PEFT lets a tuner around another one write into the dictionary of that one, in which both may be called "default".
    """

    def __init__(self, tuner: SeerModel) -> None:
        super().__init__()
        self._tuner = tuner

    def update(self, configs: dict[str, PeftConfig]) -> None:
        if all(isinstance(config, SeerConfig) for config in configs.values()):
            super().update(configs)
            return
        self._tuner._others = dict(configs)
        for config in configs.values():
            if str(getattr(config, "target_modules", "")).lower() == "all-linear":
                # PEFT leaves the head out, but only of a transformers model, which it does not see here.
                config.target_modules = _all_linear(transformers_model(self._tuner.model))


def _all_linear(base: PreTrainedModel) -> set[str]:
    head = base.get_output_embeddings()
    return {name for name, part in base.named_modules() if isinstance(part, nn.Linear) and part is not head}


def in_peft_names(state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """A state in which the name of the adapter comes last but one, as PEFT takes it off there alone.

    Norms of gates are modules of their own, so that it would stay in the names of their weights.
    """
    found = {}
    for key, x in state_dict.items():
        module, own, parameter = key.partition(f".{GATES}.{adapter_name}.")
        part, dot, last = parameter.rpartition(".")
        found[f"{module}.{GATES}.{part}.{adapter_name}.{last}" if own and dot else key] = x
    return found


def _to_own_names(tuner: SeerModel, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
    """Pre-hook of loading: the model at hand may hold its layers under other names than the one that was trained."""
    layers = {layer.module: layer.layer for layer in tuner.attachment.layers.values()}
    here = {layers[part]: f"{prefix}{name}" for name, part in tuner.named_modules() if part in layers}
    for key in [key for key in state_dict if f".{GATES}." in key]:
        module, _, parameter = key.partition(f".{GATES}.")
        layer = next((int(part) for part in reversed(module.split(".")) if part.isdigit()), None)
        if layer in here and module != here[layer]:
            state_dict[f"{here[layer]}.{GATES}.{parameter}"] = state_dict.pop(key)


def _without_weights(gate: nn.Module) -> nn.Module:
    """The gate with parameters on the meta device, as PEFT fills those by assignment; its frequencies are real."""
    for module in gate.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    return gate


def _load_checked(base: PreTrainedModel, /, *arguments: Any, **options: Any) -> Any:
    """`PreTrainedModel._load_pretrained_model`, by which transformers loads adapters, after a look at the files.

    transformers would load any tensor that has the name of a weight over that weight.
    """
    for file in options.get("checkpoint_files") or ():
        folder = Path(file).parent
        if _is_gate_folder(folder):
            try:
                check_folder(folder, SeerConfig.from_pretrained(str(folder)))
            except ValueError:
                take_off(base)
                raise
    return type(base)._load_pretrained_model(*arguments, **options)


def take_off(base: PreTrainedModel) -> None:
    """Takes gates and selectors off a transformers model, however they came there, and nothing else."""
    attachment = attachment_of(base)
    leave_batching(base)
    detach_layers(base)
    # None where the last adapter was deleted, with which transformers takes the dictionary away by itself.
    configs = base.__dict__.get("peft_config")
    for name in [name for name, config in (configs or {}).items() if isinstance(config, SeerConfig)]:
        del configs[name]
    if "_load_pretrained_model" in base.__dict__:
        del base._load_pretrained_model
        if configs == {}:
            del base.peft_config
            base._hf_peft_config_loaded = False
    if attachment is not None:
        set_implementation(base, attachment.dense)


def _is_gate_folder(folder: Path) -> bool:
    try:
        read_config(folder)
    except ValueError:
        return False
    return True


if PeftType("SEER") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="seer", config_cls=SeerConfig, model_cls=SeerModel)
