"""Proves, on the model at hand, what attachment assumes of its attention layers.

There is no table of architectures. A forward of 16 tokens through a recorder finds the layers that reach the attention
interface, and `seerattn.hf.proof` proves each. Two more forwards show what a layer does against a cache, and one at
positions beyond the original length what a RoPE that depends on the length does there.

Proofs need weights. A model on the meta device shows its layers and their shapes, enough for a plan; every layer then
counts as rotated, and its rotation refuses to be used.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from seerattn.hf.mask import CallMask, make_mask
from seerattn.hf.placement import dense_implementation, execution_device, implementation
from seerattn.hf.proof import (
    MARKER,
    RECORDER,
    Recorder,
    Seen,
    cached_reason,
    check_inputs,
    prove_attention,
    prove_rotation,
    rotary_function,
    rotary_tables,
    whole_rotation,
)
from seerattn.hf.rotary import unproven
from seerattn.hf.state import AttentionLayer
from seerattn.hf.tensor_parallel import part_of

PROBE = "seer_probe"
PROBE_TOKENS = 16
# What models raise that cannot be called with a cache or with positions.
_CALL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    reached = kwargs.pop(MARKER, None) == id(module)
    RECORDER.get().calls.append(Seen(module, query, key, value, attention_mask, kwargs, reached))
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _probed_mask(**arguments: Any) -> CallMask | Tensor | None:
    return make_mask(dense=RECORDER.get().dense, **arguments)


AttentionInterface.register(PROBE, _probed_attention)
AttentionMaskInterface.register(PROBE, _probed_mask)


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
            if execution_device(model.get_input_embeddings()).type == "meta":
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
        rotation = replace(rotation, function=rotary_function(module), embedding=embedding)
    return replace(layer, module=module, rotation=rotation)


def _probe(model: PreTrainedModel) -> list[AttentionLayer]:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a decoder-only language model, got {name}, an encoder-decoder")
    dense = dense_implementation(model)
    names = {module: key for key, module in model.named_modules()}
    with _exact_products(), _watching(model, dense) as recorder:
        try:
            _forward(model, _ids(model))
        except _CALL_ERRORS as error:
            raise ValueError(
                f"model must run with an attention function and a mask that are not its own, got {name}, in which that "
                f"ends in {type(error).__name__}: {str(error)[:200]}"
            ) from error
        calls = recorder.take()
        if not calls:
            raise ValueError(
                f"model must call its attention through the transformers attention interface, got {name}, which does "
                "not; no layer can be attached to"
            )
        ignored = [key for key in ("softcap", "s_aux") if any(call.kwargs.get(key) is not None for call in calls)]
        if dense != "eager" and ignored:
            raise ValueError(
                f"model must be loaded with attn_implementation='eager', got {dense!r}, which ignores its {ignored[0]}"
            )
        full = [call for call in calls if not _is_windowed(call, model)]
        if not full:
            raise ValueError(f"model must have full-attention layers, got {name}, whose layers are all sliding-window")
        _check_numbers(full, names, name)
        layers = [_prove(call, recorder, names[call.module], name, dense) for call in full]
        layers = [
            replace(layer, part=part_of(model, layer.module, layer.num_heads, layer.num_kv_heads)) for layer in layers
        ]
        if not full[0].query.is_meta:
            _prove_beyond(model, recorder, layers, name)
            layers = _prove_cached(model, recorder, layers, full)
    return layers


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of fp32 matrices in fp32, whatever the process allows.

    In TF32 two ways of computing one attention differ by 5e-4 (SmolLM2 on an H200), and neither proves the other.
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _check_numbers(calls: list[Seen], names: dict[nn.Module, str], model: str) -> None:
    """Layers are told apart by their numbers, and every one must be a module of its own."""
    for what, counts in (
        ("be called once a forward", Counter(names[call.module] for call in calls)),
        ("have a layer_idx of their own", Counter(getattr(call.module, "layer_idx", None) for call in calls)),
    ):
        found, times = counts.most_common(1)[0]
        if times > 1 or found is None or (isinstance(found, int) and found < 0):
            raise ValueError(f"attention modules must {what}, got {found} for {times} of them in {model}")


def _prove(call: Seen, recorder: Recorder, name: str, model: str, dense: str) -> AttentionLayer:
    where = f"{model}, at {name}"
    check_inputs(call, where)
    if call.query.is_meta:
        tables = rotary_tables(call, recorder, where)
        rotation = (
            None if tables is None else replace(whole_rotation(call, tables[0], recorder, where), function=unproven)
        )
    else:
        prove_attention(call, dense, where)
        rotation = prove_rotation(call, recorder, where)
    return AttentionLayer(
        name=name,
        module=call.module,
        layer=call.module.layer_idx,
        num_heads=call.query.shape[1],
        num_kv_heads=call.key.shape[1],
        head_dim=call.query.shape[-1],
        rotation=rotation,
    )


def _prove_beyond(model: PreTrainedModel, recorder: Recorder, layers: list[AttentionLayer], name: str) -> None:
    """Proves rotations that depend on the length once more, where the model rotates long calls."""
    by_module = {layer.module: layer for layer in layers if layer.rotation and layer.rotation.depends_on_length}
    if not by_module:
        return
    original = max(layer.rotation.original_length for layer in by_module.values())
    ids = _ids(model)
    _forward(model, ids, position_ids=original + torch.arange(ids.shape[1], device=ids.device)[None])
    for call in recorder.take():
        if call.module in by_module:
            prove_rotation(call, recorder, f"{name}, at {by_module[call.module].name} beyond {original} tokens")


def _prove_cached(
    model: PreTrainedModel, recorder: Recorder, layers: list[AttentionLayer], whole: list[Seen]
) -> list[AttentionLayer]:
    """Finds, of every layer, why it could not be followed against a cache."""
    first, second = _ids(model).tensor_split(2, dim=1)
    reasons: dict[nn.Module, str | None] = {}
    try:
        cache = getattr(_forward(model, first, use_cache=True), "past_key_values", None)
        recorder.take()
        if cache is not None:
            _forward(model, second, use_cache=True, past_key_values=cache)
            calls = {call.module: call for call in recorder.take()}
            for layer, one_shot in zip(layers, whole):
                if layer.module in calls:
                    reasons[layer.module] = cached_reason(layer, calls[layer.module], one_shot, recorder)
    except _CALL_ERRORS as error:
        recorder.take()
        reasons = {layer.module: f"{type(error).__name__}: {str(error)[:100]}" for layer in layers}
    return [replace(layer, not_cached=reasons.get(layer.module, "it keeps no cache")) for layer in layers]


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[None]:
    """Leaves frequencies and counters of rotary modules as they were; some follow the length of the last call."""
    kinds = (dict, set)
    before = [{key: copy(x) if isinstance(x, kinds) else x for key, x in vars(module).items()} for module in modules]
    tensors = [x for module in modules for x in (*vars(module).values(), *module._buffers.values())]
    values = [(x, x.clone()) for x in tensors if isinstance(x, Tensor)]
    try:
        yield
    finally:
        for module, attributes in zip(modules, before):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for tensor, value in values:
            tensor.copy_(value)


@contextmanager
def _watching(model: PreTrainedModel, dense: str) -> Iterator[Recorder]:
    recorder = Recorder(dense)
    token = RECORDER.set(recorder)

    def see_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        recorder.inputs[module] = (args, kwargs)
        return args, kwargs | {MARKER: id(module)}

    def see_tables(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        recorder.tables.append((module, args, kwargs, output))

    with ExitStack() as stack:
        stack.callback(RECORDER.reset, token)
        stack.enter_context(torch.no_grad())
        stack.enter_context(implementation(model, PROBE))
        stack.enter_context(_kept([module for module in model.modules() if _is_rotary(module)]))
        for module in model.modules():
            parameters = inspect.signature(module.forward).parameters.values()
            takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
            if _is_rotary(module):
                stack.callback(module.register_forward_hook(see_tables, with_kwargs=True).remove)
            elif takes_more and (
                hasattr(module, "layer_idx") or "position_embeddings" in inspect.signature(module.forward).parameters
            ):
                stack.callback(module.register_forward_pre_hook(see_inputs, with_kwargs=True).remove)
        yield recorder


def _is_rotary(module: nn.Module) -> bool:
    return any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False))


def _ids(model: PreTrainedModel) -> Tensor:
    embedding = model.get_input_embeddings()
    ids = torch.arange(1, PROBE_TOKENS + 1) % embedding.weight.shape[0]
    return ids[None].to(execution_device(embedding))


def _forward(model: PreTrainedModel, ids: Tensor, use_cache: bool = False, **options: Any) -> Any:
    if not ids.is_meta:
        return model(input_ids=ids, use_cache=use_cache, **options)
    # Two things look at numbers: the search for packed documents, which a cache saves, and grouped experts in fp32.
    experts = model.config._experts_implementation
    if experts == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    try:
        return model(input_ids=ids, use_cache=True)
    finally:
        if experts == "grouped_mm":
            model.set_experts_implementation(experts)


def _is_windowed(call: Seen, model: PreTrainedModel) -> bool:
    window = call.kwargs.get("sliding_window")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window is not None and (longest is None or window < longest)
