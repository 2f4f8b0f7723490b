"""The public way in: attach gates or any other selector to a model, change the policy, take all off again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from seerattn.gate.config import AttnGateConfig
from seerattn.hf.adapter import SeerConfig, SeerLayer, SeerModel
from seerattn.hf.attention import (
    IMPLEMENTATIONS,
    LayerCall,
    LayerState,
    check_attached_impl,
    check_implementation,
    layer_states,
)
from seerattn.hf.probe import dense_implementation, probe, set_implementation
from seerattn.selection.policies import Policy
from seerattn.selection.selector import Selector

logger = logging.getLogger(__name__)

SelectorFactory = Callable[[int], Selector | None]


def attach(
    model: PreTrainedModel | PeftModel,
    gates: str | Path | AttnGateConfig | Selector | SelectorFactory,
    policy: Policy | None = None,
    *,
    impl: str = "auto",
    layers: list[int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Makes the prefill of a model sparse.

    Args:
        model: a decoder-only language model with ``attn_implementation`` "sdpa" or "eager".
        gates: what chooses the blocks:
            a folder or Hub id with trained gates;
            an `AttnGateConfig`, for fresh gates to be trained;
            any `Selector`, used by every layer, or a function from the layer's index to its selector (None leaves
            that layer dense).
        policy: replaces the policy that was saved with the gates. Without either, the model runs dense.
        impl: implementation of `block_sparse_attention`. "auto" takes the fastest, or dense attention where it expects
            that to be faster; "sparse" takes the fastest and is never dense, as measurements need it.
        layers: indices of decoder layers; by default all full-attention layers, or those of the saved gates.

    Returns:
        A `PeftModel` around the model for gates, the model itself for other selectors. Selectors that are attached
        a second time replace the first ones, also those of gates; `set_policy` brings gates back.

    Raises:
        ValueError: the model cannot be served, the gates are not whole or belong to another model, or gates are
            attached already.
    """
    check_attached_impl(impl)
    _check_policy(policy)
    if isinstance(gates, (str, Path, AttnGateConfig)):
        return _attach_gates(model, gates, policy, impl, layers)
    if not isinstance(gates, Selector) and not callable(gates):
        raise ValueError(
            f"gates must be a folder, an AttnGateConfig, a Selector or a function of a layer's index, got {gates!r}"
        )
    if policy is not None:
        raise ValueError(f"policy must be None with a selector, which chooses by itself, got {policy}")
    _attach_selectors(model, gates, impl, layers)
    return model


def _attach_gates(
    model: PreTrainedModel,
    gates: str | Path | AttnGateConfig,
    policy: Policy | None,
    impl: str,
    layers: list[int] | None,
) -> PeftModel:
    if isinstance(model, PeftModel) and not isinstance(model.base_model, SeerModel):
        raise ValueError(
            "model must be a plain transformers model, got a PeftModel; merge its adapter before attaching"
        )
    if layer_states(model):
        raise ValueError(
            "model must have no gates or selectors yet, got one with some; "
            "change them with seerattn.set_policy, or call seerattn.detach(model) first"
        )
    if isinstance(gates, AttnGateConfig):
        config = SeerConfig(gate=gates.to_dict(), layers=layers)
        # inference_mode is False: the gates are fresh and trainable.
        with _without_deprecation_of_peft():
            peft_model = get_peft_model(model, config)
    else:
        if layers is not None:
            raise ValueError(f"layers must be None for saved gates, which name their layers, got {layers}")
        config = SeerConfig.from_pretrained(str(gates))
        with _without_deprecation_of_peft():
            peft_model = PeftModel.from_pretrained(model, str(gates), config=config)
        try:
            for layer in _gated_layers(peft_model):
                layer.check_filled()
        except ValueError:
            peft_model.unload()
            raise
    if policy is not None:
        set_policy(peft_model, policy)
    for state in layer_states(peft_model):
        state.impl = impl
    if peft_model.active_peft_config.policy is None:
        logger.info("the gates have no policy and the model runs dense; seerattn.set_policy makes it sparse")
    return peft_model


@contextmanager
def _without_deprecation_of_peft() -> Iterator[None]:
    # PEFT 0.21 asks transformers 5.23 by an attribute that is deprecated there; users can do nothing about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _attach_selectors(
    model: PreTrainedModel | PeftModel, selector: Selector | SelectorFactory, impl: str, layers: list[int] | None
) -> None:
    choose: SelectorFactory = (lambda _: selector) if isinstance(selector, Selector) else selector
    states = {state.layer: state for state in layer_states(model)}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = [] if states else probe(base)
    wanted = sorted(states) if states else [layer.layer for layer in found]
    if layers is not None:
        if not layers or not set(layers) <= set(wanted):
            raise ValueError(f"layers must be among {wanted}, got {layers}")
        wanted = layers
    chosen = {index: choose(index) for index in wanted}
    if found:
        dense = dense_implementation(base)
        for layer in found:
            states[layer.layer] = _hook(layer.module, LayerState(layer.layer, layer.num_heads, layer.rotation))
        set_implementation(base, IMPLEMENTATIONS[dense])
    for index, state in states.items():
        state.selector, state.impl = chosen.get(index), impl


def _hook(module: nn.Module, state: LayerState) -> LayerState:
    def inject(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        check_implementation(module)
        call = LayerCall(state, kwargs["position_embeddings"], kwargs.get("position_ids"))
        return args, kwargs | {"seer": call}

    module._seer = state
    module._seer_hook = module.register_forward_pre_hook(inject, with_kwargs=True)
    return state


def set_policy(model: nn.Module, policy: Policy | None, *, impl: str | None = None) -> None:
    """Changes how a model with gates selects, at any time; also what `save_pretrained` saves.

    Args:
        model: a `PeftModel` with gates, or a transformers model that loaded them as an adapter.
        policy: the new policy; None runs dense.
        impl: the new implementation, None keeps it.

    Raises:
        ValueError: the model has no gates, or an unknown ``impl``.
    """
    if impl is not None:
        check_attached_impl(impl)
    _check_policy(policy)
    gated, states = _gated_layers(model), layer_states(model)
    if not states or (policy is not None and not gated):
        raise ValueError(f"model must have gates for a policy, got {type(model).__name__} without; use seerattn.attach")
    for layer in gated:
        layer.set_policy(policy)
    for state in states:
        if not gated:
            state.selector = None
        state.impl = impl or state.impl
    configs = getattr(model, "peft_config", {})
    for name in {name for layer in gated for name in layer.active_adapters}:
        configs[name].policy = None if policy is None else policy.to_dict()


def _check_policy(policy: Policy | None) -> None:
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy must be a policy such as TopK(density=0.1), or None for dense, got {policy!r}")


def _gated_layers(model: nn.Module) -> list[SeerLayer]:
    return [module for module in model.modules() if isinstance(module, SeerLayer)]


def detach(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Takes gates or selectors off again.

    Returns:
        The base model, with the attention implementation that it had before. A model without either is returned as
        it is.
    """
    if isinstance(model, PeftModel) and isinstance(model.base_model, SeerModel):
        return model.unload()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not layer_states(base):
        return model
    for name, module in list(base.named_modules()):
        if isinstance(module, SeerLayer):  # transformers put it there, which has no way to take it off
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.base_layer)
        elif "_seer_hook" in module.__dict__:
            module._seer_hook.remove()
            del module._seer_hook, module._seer
    loaded = getattr(base, "peft_config", {})
    for name in [name for name, config in loaded.items() if isinstance(config, SeerConfig)]:
        base.delete_adapter(name)
    set_implementation(base, dense_implementation(base))
    return model
