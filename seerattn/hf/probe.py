"""Proves, on the model at hand, what attachment assumes of its attention layers.

There is no table of architectures. One forward of 8 tokens through a spy finds the layers that reach the attention
interface; every layer is then run again without rotation, and un-rotating what it gave before must restore just that.

That proof needs weights. A model on the meta device shows its layers and their shapes, enough for a plan; every layer
then counts as rotated, and its rotation refuses to be used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from seerattn.hf.attention import IMPLEMENTATIONS
from seerattn.hf.mask import CallMask, make_mask
from seerattn.hf.rotary import Rotation, unproven
from seerattn.hf.state import AttentionLayer

PROBE = "seer_probe"
PROBE_TOKENS = 8
# Largest error of an un-rotated vector relative to the largest entry: rounding of the vectors themselves, with room.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class _Spy:
    """What one forward showed."""

    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor, Any, dict]] = field(default_factory=list)
    inputs: dict[nn.Module, tuple[tuple, dict]] = field(default_factory=dict)
    tables: list[tuple[nn.Module, tuple, dict, Any]] = field(default_factory=list)


_SPY: ContextVar[_Spy] = ContextVar("seerattn_probe")


def _spy_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    _SPY.get().calls.append((module, query, key, value, attention_mask, kwargs))
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _spy_mask(**arguments: Any) -> CallMask | Tensor | None:
    return make_mask(dense="eager", **arguments)


AttentionInterface.register(PROBE, _spy_attention)
AttentionMaskInterface.register(PROBE, _spy_mask)


def probe(model: PreTrainedModel) -> list[AttentionLayer]:
    """The attention layers of ``model`` that can be sparse, in order.

    Sliding-window layers are left out: they are cheap as they are. The model is left as it was. On the meta device only
    shapes are seen and nothing is proven, so a model that is refused for its numbers is not refused there.

    Where FSDP loads weights in the first process alone, all processes must call this: the first one proves its model
    for all.

    Raises:
        ValueError: the model cannot be served; the message names the first reason found.
    """
    return _share_verdict(model) if is_fsdp_enabled() else _probe(model)


def _share_verdict(model: PreTrainedModel) -> list[AttentionLayer]:
    """What the first process finds, on the model of every process; modules travel by name, functions are looked up."""
    verdict: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            if model.get_input_embeddings().weight.is_meta:
                raise ValueError("model must have weights in the first process of FSDP, got one on the meta device")
            verdict = [[_by_name(layer, model) for layer in _probe(model)]]
        except ValueError as error:
            verdict = [str(error)]
    dist.broadcast_object_list(verdict, src=0)
    if isinstance(verdict[0], str):
        raise ValueError(verdict[0])
    return [_by_module(layer, model) for layer in verdict[0]]


def _by_name(layer: AttentionLayer, model: PreTrainedModel) -> AttentionLayer:
    rotation = layer.rotation
    if rotation is not None:
        name = next(name for name, module in model.named_modules() if module is rotation.embedding)
        rotation = replace(rotation, function=None, embedding=name)
    return replace(layer, module=None, rotation=rotation)


def _by_module(layer: AttentionLayer, model: PreTrainedModel) -> AttentionLayer:
    module, rotation = model.get_submodule(layer.name), layer.rotation
    if rotation is not None:
        embedding = model.get_submodule(rotation.embedding)
        rotation = replace(rotation, function=_rotary_function(module), embedding=embedding)
    return replace(layer, module=module, rotation=rotation)


def _probe(model: PreTrainedModel) -> list[AttentionLayer]:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder-only causal language model, got {name}, an encoder-decoder")
    dense = dense_implementation(model)
    names = {module: key for key, module in model.named_modules()}
    with _watching(model) as spy:
        _forward(model)
        if not spy.calls:
            raise ValueError(
                f"model must call its attention through the transformers attention interface, got {name}, which does "
                "not; no layer can be attached to"
            )
        calls, spy.calls = spy.calls, []
        layers = [_prove(call, spy, names, model) for call in calls if not _is_windowed(call, model)]
    ignored = [key for key in ("softcap", "s_aux") if any(call[-1].get(key) is not None for call in calls)]
    if dense == "sdpa" and ignored:
        raise ValueError(
            f"model must be loaded with attn_implementation='eager', got 'sdpa', which ignores its {ignored[0]}"
        )
    if not layers:
        raise ValueError(f"model must have full-attention layers, got {name}, whose layers are all sliding-window")
    return layers


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs ``model`` with another attention implementation."""
    before = model.config._attn_implementation
    set_implementation(model, name)
    try:
        yield
    finally:
        set_implementation(model, before)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Switches the attention implementation of a model.

    Raises:
        ValueError: the architecture does not let it be switched.
    """
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"model must call its attention through the transformers attention interface, got {type(model).__name__}, "
            "which does not"
        )


@contextmanager
def _watching(model: PreTrainedModel) -> Iterator[_Spy]:
    spy = _Spy()
    token = _SPY.set(spy)

    def see_inputs(module: nn.Module, args: tuple, kwargs: dict) -> None:
        spy.inputs[module] = (args, kwargs)

    def see_tables(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        spy.tables.append((module, args, kwargs, output))

    with ExitStack() as stack:
        stack.callback(_SPY.reset, token)
        stack.enter_context(torch.no_grad())
        stack.enter_context(implementation(model, PROBE))
        for module in model.modules():
            if "position_embeddings" in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(see_inputs, with_kwargs=True).remove)
            elif any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False)):
                stack.callback(module.register_forward_hook(see_tables, with_kwargs=True).remove)
        yield spy


def _forward(model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings()
    ids = torch.arange(1, PROBE_TOKENS + 1, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    if not ids.is_meta:
        model(input_ids=ids, use_cache=False)
        return
    # Two things look at numbers: the search for packed documents, which a mask saves, and grouped experts in fp32.
    experts = model.config._experts_implementation
    if experts == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        if experts == "grouped_mm":
            model.set_experts_implementation(experts)


def _is_windowed(call: tuple, model: PreTrainedModel) -> bool:
    window = call[-1].get("sliding_window")
    return window is not None and window < model.config.get_text_config().max_position_embeddings


def _prove(call: tuple, spy: _Spy, names: dict[nn.Module, str], model: PreTrainedModel) -> AttentionLayer:
    module, query, key, value, mask, _ = call
    where = f"{type(model).__name__}, at {names[module]}"
    if not isinstance(mask, CallMask):
        raise ValueError(f"model must make its masks through the transformers mask interface, got {where}")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"model must have keys and values of one width, got {key.shape[-1]} and {value.shape[-1]} in {where}; "
            "multi-head latent attention is not supported"
        )
    _, kwargs = spy.inputs.get(module, ((), {}))
    tables = kwargs.get("position_embeddings")
    if not (
        isinstance(tables, tuple)
        and len(tables) == 2
        and all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in tables)
    ):
        raise ValueError(
            "attention modules must take rotary tables (cos, sin) as position_embeddings, "
            f"got {type(tables).__name__} in {where}"
        )
    for attribute in ("layer_idx", "head_dim", "num_key_value_groups"):
        if not hasattr(module, attribute):
            raise ValueError(f"attention modules must have the usual attribute {attribute!r}, which {where} lacks")
    if query.is_meta:
        rotation = replace(_whole_rotation(module, query, tables[0], spy, where), function=unproven)
    else:
        rotation = _prove_rotation(module, query, key, spy, where)
    return AttentionLayer(
        name=names[module],
        module=module,
        layer=module.layer_idx,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[-1],
        rotation=rotation,
    )


def _prove_rotation(module: nn.Module, query: Tensor, key: Tensor, spy: _Spy, where: str) -> Rotation | None:
    args, kwargs = spy.inputs[module]
    cos, sin = kwargs["position_embeddings"]
    still = (torch.ones_like(cos), torch.zeros_like(sin))
    module(*args, **kwargs | {"position_embeddings": still})
    _, raw_query, raw_key, *_ = spy.calls.pop()
    if torch.equal(raw_query, query) and torch.equal(raw_key, key):
        return None
    rotation = _find_rotation(module, query, cos, sin, spy, where)
    for turned, raw in ((query, raw_query), (key, raw_key)):
        error = (rotation.unrotate(turned, cos, sin) - raw.float()).abs().max() / raw.float().abs().max()
        if not error <= TOLERANCE[query.dtype]:
            raise ValueError(
                f"the rotary embedding must be undone exactly, got a relative error of {error:.1e} in {where}; "
                "the layer changes its queries or keys otherwise than by rotation"
            )
    return rotation


def _find_rotation(module: nn.Module, query: Tensor, cos: Tensor, sin: Tensor, spy: _Spy, where: str) -> Rotation:
    whole = _whole_rotation(module, query, cos, spy, where)
    x = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).to(query.device)
    for width in (whole.width, 2 * cos.shape[-1], cos.shape[-1]):
        if width > whole.width:
            continue
        rotation = replace(whole, width=width)
        try:
            turned = rotation.rotate(x, cos.float(), sin.float())
        except RuntimeError:  # the tables do not fit this width
            continue
        if turned.shape == x.shape and torch.allclose(rotation.unrotate(turned, cos, sin), x, atol=1e-4):
            return rotation
    raise ValueError(f"the rotary function must be undone by negating the sine, which {where} does not allow")


def _whole_rotation(module: nn.Module, query: Tensor, cos: Tensor, spy: _Spy, where: str) -> Rotation:
    """The rotation of all channels of a head; nothing of it is proven."""
    function = _rotary_function(module)
    if function is None:
        raise ValueError(f"the modeling file must have an apply_rotary_pos_emb, which {where} lacks")
    made = next((t for t in spy.tables if isinstance(t[3], tuple) and t[3][0] is cos), None)
    if made is None:
        raise ValueError(f"the rotary tables must come from a rotary module of the decoder, got others in {where}")
    embedding, args, kwargs, _ = made
    names = list(inspect.signature(embedding.forward).parameters)
    arguments = dict(zip(names, args)) | kwargs
    arguments = {key: value for key, value in arguments.items() if key not in (names[0], "position_ids")}
    return Rotation(function, query.shape[-1], embedding, arguments)


def _rotary_function(module: nn.Module) -> Callable | None:
    return getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)


def dense_implementation(model: PreTrainedModel) -> str:
    """Name of the implementation that ours replaces on ``model``.

    Raises:
        ValueError: it is one that ours cannot fall back on.
    """
    current = model.config._attn_implementation
    for dense, ours in IMPLEMENTATIONS.items():
        if current in (dense, ours):
            return dense
    raise ValueError(
        f"attn_implementation must be one of {list(IMPLEMENTATIONS)} before attaching, got {current!r}; "
        "load the model with attn_implementation='sdpa'"
    )
