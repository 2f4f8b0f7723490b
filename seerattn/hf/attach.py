"""The public way in: attach gates or any other selector to a model, change the policy, take all off again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from seerattn.gate.config import AttnGateConfig
from seerattn.hf.adapter import SeerModel, take_off
from seerattn.hf.attention import IMPLEMENTATIONS
from seerattn.hf.batching import let_batch
from seerattn.hf.config import SeerConfig
from seerattn.hf.gated import GatedModel, load_gated
from seerattn.hf.gates import attach_layer
from seerattn.hf.identity import transformers_model
from seerattn.hf.placement import dense_implementation, set_implementation
from seerattn.hf.probe import probe
from seerattn.hf.state import Attachment, attachment_of, check_attached_impl, check_fits, check_gated, check_policy
from seerattn.selection.decode_policy import check_decode_policy
from seerattn.selection.decode_selector import DecodeSelector
from seerattn.selection.policies import Policy
from seerattn.selection.selector import Selector

logger = logging.getLogger(__name__)

SelectorFactory = Callable[[int], Selector | None]
DecoderFactory = Callable[[int], DecodeSelector | None]


def attach(
    model: PreTrainedModel | PeftModel,
    gates: str | Path | AttnGateConfig | Selector | SelectorFactory,
    policy: Policy | None = None,
    *,
    decode_policy: Policy | DecodeSelector | DecoderFactory | None = None,
    impl: str = "auto",
    layers: list[int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Makes the attention of a model sparse: that of prompts, and of tokens that are decoded if that is asked for.

    Args:
        model: a decoder-only language model with ``attn_implementation`` "sdpa", "eager" or "banded", which is SDPA
            that does not compute what sliding windows hide.
        gates: what chooses the blocks:
            a folder or Hub id with trained gates;
            an `AttnGateConfig`, for fresh gates to be trained;
            any `Selector`, used by every layer, or a function from the layer's index to its selector (None leaves
            that layer dense).
        policy: replaces the policy that was saved with the gates. Without either, prompts run dense.
        decode_policy: chooses the blocks of every token that is decoded, by the same gates; it replaces the one that
            was saved with them. Without either, decoding is dense. With selectors it is a `DecodeSelector`, or a
            function from the layer's index to one.
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
    check_policy(policy)
    if isinstance(gates, (str, Path, AttnGateConfig)):
        check_decode_policy(decode_policy)
        return _attach_gates(model, gates, policy, decode_policy, impl, layers)
    if not isinstance(gates, Selector) and not callable(gates):
        raise ValueError(
            f"gates must be a folder, an AttnGateConfig, a Selector or a function of a layer's index, got {gates!r}"
        )
    if policy is not None:
        raise ValueError(f"policy must be None with a selector, which chooses by itself, got {policy}")
    if not (decode_policy is None or isinstance(decode_policy, DecodeSelector) or callable(decode_policy)):
        raise ValueError(
            f"decode_policy must be a DecodeSelector, a function of a layer's index or None with a selector, got "
            f"{decode_policy!r}"
        )
    _attach_selectors(model, gates, decode_policy, impl, layers)
    return model


def _attach_gates(
    model: PreTrainedModel | PeftModel,
    gates: str | Path | AttnGateConfig,
    policy: Policy | None,
    decode_policy: Policy | None,
    impl: str,
    layers: list[int] | None,
) -> GatedModel:
    if attachment_of(model) is not None:
        raise ValueError(
            "model must have no gates or selectors yet, got one with some; "
            "change them with seerattn.set_policy, or call seerattn.detach(model) first"
        )
    with _without_deprecation_of_peft():
        if isinstance(gates, AttnGateConfig):
            gated = GatedModel(model, SeerConfig(gate=gates.to_dict(), layers=layers))
        elif layers is not None:
            raise ValueError(f"layers must be None for saved gates, which name their layers, got {layers}")
        else:
            gated = load_gated(model, gates)
    attachment = gated.base_model.attachment
    try:
        check_fits(policy or attachment.policies["default"], attachment)
    except ValueError:
        take_off(transformers_model(model))
        raise
    attachment.refresh(impl)
    saved = attachment.policies["default"], attachment.decode_policies["default"]
    if policy is not None or decode_policy is not None:
        set_policy(gated, policy or saved[0], decode_policy=decode_policy or saved[1])
    elif saved == (None, None):
        logger.info("the gates have no policy and the model runs dense; seerattn.set_policy makes it sparse")
    return gated


@contextmanager
def _without_deprecation_of_peft() -> Iterator[None]:
    # PEFT 0.21 asks transformers 5.23 by an attribute that is deprecated there; users can do nothing about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _attach_selectors(
    model: PreTrainedModel | PeftModel,
    selector: Selector | SelectorFactory,
    decoder: DecodeSelector | DecoderFactory | None,
    impl: str,
    layers: list[int] | None,
) -> None:
    choose: SelectorFactory = (lambda _: selector) if isinstance(selector, Selector) else selector
    choose_token: DecoderFactory = decoder if callable(decoder) else (lambda _: decoder)
    base, attachment = transformers_model(model), attachment_of(model)
    found = {layer.layer: layer for layer in probe(base)} if attachment is None else attachment.layers
    wanted = sorted(found)
    if layers is not None:
        if not layers or not set(layers) <= set(wanted):
            raise ValueError(f"layers must be among {wanted}, got {layers}")
        wanted = layers
    chosen, decoders = ({index: of(index) for index in wanted} for of in (choose, choose_token))
    if attachment is None:
        attachment = Attachment(dense_implementation(base))
        for layer in found.values():
            attach_layer(layer, attachment)
        set_implementation(base, IMPLEMENTATIONS[attachment.dense])
        let_batch(base)
    attachment.chosen = chosen
    attachment.chosen_decoders = {index: one for index, one in decoders.items() if one is not None}
    attachment.refresh(impl)


def set_policy(
    model: nn.Module, policy: Policy | None, *, decode_policy: Policy | None = None, impl: str | None = None
) -> None:
    """Changes how a model with gates selects, for all that use it; also what `save_pretrained` saves.

    A forward that runs meanwhile ends as it began. For one request or thread there is `seerattn.policy`.

    Args:
        model: a `PeftModel` with gates, or a transformers model that loaded them as an adapter.
        policy: the new policy of prompts; None runs them dense.
        decode_policy: the new one of tokens that are decoded; None decodes dense, whatever it was before.
        impl: the new implementation, None keeps it.

    Raises:
        ValueError: the model has no gates, the policy does not fit it, or an unknown ``impl``.
    """
    check_policy(policy)
    check_decode_policy(decode_policy)
    if impl is not None:
        check_attached_impl(impl)
    attachment = check_gated(model, policy or decode_policy)
    check_fits(policy, attachment)
    attachment.set_policy(policy, decode_policy, impl)
    for part in model.modules():
        configs = part._configs if isinstance(part, SeerModel) else part.__dict__.get("peft_config", {})
        config = configs.get(attachment.active)
        if isinstance(config, SeerConfig):
            config.policy = None if policy is None else policy.to_dict()
            config.decode_policy = None if decode_policy is None else decode_policy.to_dict()


def detach(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Takes gates or selectors off again, and nothing else.

    Returns:
        What `attach` was given, with the attention implementation that it had before. A model without gates and
        selectors is returned as it is, and so is one around which PEFT put an adapter later.
    """
    if attachment_of(model) is None:
        return model
    take_off(transformers_model(model))
    own = isinstance(model, PeftModel) and isinstance(model.base_model, SeerModel)
    return model.base_model.model if own else model
