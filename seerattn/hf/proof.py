"""The proofs of one attention layer: what it computes is what our ops compute, and its rotation can be undone.

Each runs on what a recorder saw of a short forward and refuses with the reason that it found.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.hf.call import LayerCall, logits_of
from seerattn.hf.mask import CallMask, Unservable
from seerattn.hf.rotary import Rotation
from seerattn.hf.state import Attachment, AttentionLayer, LayerState, Tables
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.checks import HEAD_DIMS
from seerattn.selection.block_indices import BlockIndices

# Keyword that shows whether keywords of an attention module reach its attention function.
MARKER = "seer_marker"
# Largest error of an un-rotated vector relative to the largest entry: rounding of the vectors themselves, with room.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# The same of an attention's output, which adds the rounding of logits and probabilities.
OUTPUT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class Seen(NamedTuple):
    """One call of an attention function, and whether keywords of its module reached it."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: dict[str, Any]
    reached: bool


@dataclass
class Recorder:
    """What forwards showed, of a model whose attention was ``dense`` before."""

    dense: str
    calls: list[Seen] = field(default_factory=list)
    inputs: dict[nn.Module, tuple[tuple, dict]] = field(default_factory=dict)
    tables: list[tuple[nn.Module, tuple, dict, Any]] = field(default_factory=list)

    def take(self) -> list[Seen]:
        """The calls so far, which are then forgotten."""
        calls, self.calls = self.calls, []
        return calls


RECORDER: ContextVar[Recorder] = ContextVar("seerattn_recorder")


def check_inputs(call: Seen, where: str) -> None:
    """Refuses a layer whose kind of attention ours is not.

    Raises:
        ValueError: names the first reason.
    """
    module, query, key, value = call.module, call.query, call.key, call.value
    if not isinstance(call.mask, CallMask):
        raise ValueError(f"model must make its masks through the transformers mask interface, got {where}")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"model must have keys and values of one width, got {key.shape[-1]} and {value.shape[-1]} in {where}; "
            "attention whose values have another width, such as multi-head latent attention, is not supported"
        )
    if not HEAD_DIMS[0] <= query.shape[-1] <= HEAD_DIMS[1]:
        raise ValueError(f"the head dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {query.shape[-1]} in {where}")
    if not call.reached:
        raise ValueError(f"attention modules must pass keywords on to their attention function, which {where} does not")
    if not getattr(module, "is_causal", True) or call.kwargs.get("is_causal") is False:
        raise ValueError(f"attention must be causal, got is_causal=False in {where}; bidirectional models stay dense")
    if not query.is_meta and not all(bool(x.isfinite().all()) for x in (query, key, value)):
        raise ValueError(
            f"queries, keys and values must be finite, got an overflow in {query.dtype} in {where}; "
            "load the model in bfloat16 or float32"
        )


def prove_attention(call: Seen, dense: str, where: str) -> None:
    """Proves that every block listed gives what the layer's own attention gives.

    Raises:
        ValueError: it gives something else.
    """
    query, kwargs = call.query, call.kwargs | ({"dropout": 0.0} if "dropout" in call.kwargs else {})
    eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(dense, eager)
    expected = attend(call.module, query, call.key, call.value, call.mask.tensor, **kwargs)[0].transpose(1, 2)
    sizes = {"batch": query.shape[0], "heads": query.shape[1], "q_len": query.shape[2], "k_len": call.key.shape[2]}
    blocks = BlockIndices.dense(**sizes, block_q=64, block_k=64, device=query.device)
    found = block_sparse_attention(
        query, call.key, call.value, blocks, **logits_of(query, call.kwargs), impl="reference"
    )
    error = _error(found, expected)
    if not error <= OUTPUT_TOLERANCE[query.dtype]:
        raise ValueError(
            "attention must be the softmax of scaled products over all keys up to the query's own, got a result that "
            f"differs by {error:.1e} in {where}; a mask or a bias of the model's own is not supported"
        )


def prove_rotation(call: Seen, recorder: Recorder, where: str) -> Rotation | None:
    """Finds how a layer rotates and proves that it can be undone; None if it does not rotate.

    Raises:
        ValueError: the layer rotates in a way that cannot be found or undone.
    """
    tables = rotary_tables(call, recorder, where)
    if tables is None:
        _prove_still(call, recorder, where)
        return None
    cos, sin = tables
    raw = _again(call, recorder, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)))
    if torch.equal(raw.query, call.query) and torch.equal(raw.key, call.key):
        return None
    rotation = _find_rotation(call, cos, sin, recorder, where)
    for turned, still in ((call.query, raw.query), (call.key, raw.key)):
        error = _error(rotation.unrotate(turned, cos, sin), still)
        if not error <= TOLERANCE[turned.dtype]:
            raise ValueError(
                f"the rotary embedding must be undone exactly, got a relative error of {error:.1e} in {where}; "
                "the layer changes its queries or keys otherwise than by rotation"
            )
    return rotation


def rotary_tables(call: Seen, recorder: Recorder, where: str) -> Tables | None:
    """The rotary tables that a module was given, None if it takes none.

    Raises:
        ValueError: it was given something else.
    """
    tables = recorder.inputs[call.module][1].get("position_embeddings")
    if tables is not None and not (
        isinstance(tables, tuple)
        and len(tables) == 2
        and all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in tables)
    ):
        raise ValueError(
            "attention modules must take rotary tables (cos, sin) as position_embeddings, "
            f"got {type(tables).__name__} in {where}"
        )
    return tables


def cached_reason(layer: AttentionLayer, call: Seen, one_shot: Seen, recorder: Recorder) -> str | None:
    """Why a layer cannot be followed against a cache; None if cached keys are those of one call, and tell their tables.

    Args:
        layer: what was proven of it.
        call: of the second half of the tokens, against a cache of the first.
        one_shot: of all tokens.
        recorder: what the second half showed.
    """
    if call.key.shape != one_shot.key.shape or not isinstance(call.mask, CallMask):
        return f"its cache gives keys {list(call.key.shape)} for {list(one_shot.key.shape)}"
    if not _error(call.key, one_shot.key) <= OUTPUT_TOLERANCE[call.key.dtype]:
        return "its cache holds other keys than one call has"
    _, kwargs = recorder.inputs[layer.module]
    state = LayerState(layer, Attachment(recorder.dense, {layer.layer: layer}))
    again = LayerCall(state, kwargs.get("position_embeddings"), kwargs.get("position_ids"))
    lengths = {"row": None, "q_len": call.query.shape[2], "k_len": call.key.shape[2]}
    try:
        again.context(**lengths, **logits_of(call.query, call.kwargs), mask=call.mask)
    except Unservable as reason:
        return str(reason)
    return None


def _prove_still(call: Seen, recorder: Recorder, where: str) -> None:
    """Proves that a layer that is given no rotary tables does not rotate by itself."""
    rotary = [name for name, _ in call.module.named_buffers() if name.endswith(("inv_freq", "embed_positions"))]
    _, kwargs = recorder.inputs[call.module]
    ids = kwargs.get("position_ids")
    moved = {} if ids is None else {"position_ids": ids + 7}
    again = _again(call, recorder, **moved)
    if rotary or not (torch.equal(again.query, call.query) and torch.equal(again.key, call.key)):
        raise ValueError(
            f"attention modules must take rotary tables (cos, sin) as position_embeddings, got {where}, which makes "
            "its own"
        )


def _again(call: Seen, recorder: Recorder, **changed: Any) -> Seen:
    """What the attention function is given when the module runs with other keywords."""
    args, kwargs = recorder.inputs[call.module]
    before = recorder.take()
    call.module(*args, **kwargs | changed)
    found = recorder.take()[-1]
    recorder.calls = before
    recorder.inputs[call.module] = (args, kwargs)
    return found


def _find_rotation(call: Seen, cos: Tensor, sin: Tensor, recorder: Recorder, where: str) -> Rotation:
    whole = whole_rotation(call, cos, recorder, where)
    x = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(0)).to(call.query.device)
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


def whole_rotation(call: Seen, cos: Tensor, recorder: Recorder, where: str) -> Rotation:
    """The rotation of all channels of a head; nothing of it is proven."""
    function = rotary_function(call.module)
    if function is None:
        raise ValueError(f"the modeling file must have an apply_rotary_pos_emb, which {where} lacks")
    # A sharded model moves them to the device of a layer.
    made = next((t for t in recorder.tables if isinstance(t[3], tuple) and _same_tensor(t[3][0], cos)), None)
    if made is None:
        raise ValueError(f"the rotary tables must come from a rotary module of the decoder, got others in {where}")
    embedding, args, kwargs, _ = made
    names = list(inspect.signature(embedding.forward).parameters)
    arguments = dict(zip(names, args)) | kwargs
    arguments = {key: value for key, value in arguments.items() if key not in (names[0], "position_ids")}
    return Rotation(function, call.query.shape[-1], embedding, arguments)


def _same_tensor(made: Tensor, given: Tensor) -> bool:
    return made is given or (
        made.device != given.device and made.shape == given.shape and torch.equal(made.to(given.device), given)
    )


def rotary_function(module: nn.Module) -> Callable | None:
    """The modeling file's ``apply_rotary_pos_emb``."""
    return getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    expected = expected.float()
    return float((found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
