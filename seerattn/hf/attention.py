"""The attention function: dense as the model would run it, or gate, selection and block-sparse attention.

transformers calls it for every attention layer of a model whose ``attn_implementation`` is one of `IMPLEMENTATIONS`.
A hook before each layer that was attached to adds a `LayerCall` as the keyword ``seer``. Every other layer, and every
decode step, runs the attention function and the mask that the model used before, so its result is the same bit for bit.

What is no part of a prompt is decoded: one token, and also several against a cache that are fewer than a query block.
So the tokens that speculative decoding verifies at once are chosen by the attention that chooses one token.
"""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.gate.attn_gate import AttnGate
from seerattn.hf.call import LayerCall
from seerattn.hf.mask import CallMask, Row, Unservable, make_mask
from seerattn.hf.meters import density_meters, time_meter
from seerattn.hf.state import LEARNING, LayerState, Learning, Running, check_filled
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.crossover import prefer_dense
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import Selector

logger = logging.getLogger(__name__)

# Name of our implementation by the one that it replaces. "flash" and "sdpa" in a name would make transformers look
# for those libraries.
IMPLEMENTATIONS = {"sdpa": "seer_attention", "eager": "seer_attention_eager"}
# Query block of selectors that have no gate to ask.
_BLOCK_Q = 64


def add_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention module that was attached to; not a closure, so that a copy has its own state."""
    _check_implementation(module)
    call = LayerCall(module._seer, kwargs.get("position_embeddings"), kwargs.get("position_ids"))
    return args, kwargs | {"seer": call}


def _check_implementation(module: nn.Module) -> None:
    """Warns, once, where an attention module runs another implementation than ours and so sees no selector."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is not None and name not in IMPLEMENTATIONS.values():
        _warn_of_implementation(name)


def seer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CallMask | Tensor | None,
    *,
    dense: str,
    seer: LayerCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the signature of `transformers.AttentionInterface`.

    Args:
        module: the attention module.
        query: post-RoPE ``[B, H, T, D]``.
        key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
        value: ``[B, HKV, S, D]``.
        attention_mask: the `CallMask` of the forward, or a finished 4-D mask of the caller's own.
        dense: the implementation that this one replaces.
        seer: set where the layer was attached to.
        kwargs: what the architecture passes on: scaling, softcap, s_aux, sliding_window, dropout and others.

    Returns:
        ``[B, T, H, D]`` and None, or the attention weights where the replaced implementation returns them.

    Raises:
        ValueError: a call that sparse attention cannot follow, unless "auto" may run it dense.
    """
    windowed = kwargs.get("sliding_window") is not None and kwargs["sliding_window"] < key.shape[2]
    backends, timed = nullcontext(), nullcontext()
    if seer is not None and query.shape[2] > 1 and not windowed:
        mask, state, seer = attention_mask, seer.state, seer.on(query.device)
        own = isinstance(mask, CallMask)
        running = mask.running(state.attachment) if own else state.attachment.now()
        learning = mask.learning if own else LEARNING.get()
        if state.layer in running.gates:
            check_filled(running.gates[state.layer], state.layer)
        if learning is not None:
            if state.gate is not None:
                out = _learn(query, key, value, attention_mask, seer, learning, kwargs)
                if out is not None:
                    return out, None
        else:
            selector = running.selectors.get(state.layer)
            if selector is not None and not _continues(query, key, attention_mask, running.gates.get(state.layer)):
                out = _sparse(module, query, key, value, attention_mask, seer, selector, running, kwargs)
                if out is not None:
                    return out, None
                backends = _fastest_backends(query)
            meter = time_meter(state.attachment)
            if meter is not None:
                backends, timed = _fastest_backends(query), meter.measure(state.layer, "attention", query)
    if isinstance(attention_mask, CallMask):
        attention_mask = attention_mask.tensor
        attention_mask = None if attention_mask is None else attention_mask.to(query.device)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(dense, eager)
    with backends, timed:
        return attend(module, query, key, value, attention_mask, **kwargs)


def _learn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CallMask | Tensor | None,
    seer: LayerCall,
    learning: Learning,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Attention ``[B, T, H, D]`` while gates learn, or None where it is the model's own."""
    learning.reached = True
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout must be 0 while gates learn, got {kwargs['dropout']}")
    out = learning.training.attend(query, key, value, _check_mask(mask), seer, logits_of(query, kwargs))
    return None if out is None else out.transpose(1, 2).contiguous()


def _continues(query: Tensor, key: Tensor, mask: CallMask | Tensor | None, gate: AttnGate | None) -> bool:
    """Whether a call goes on with an answer, as decoding does: fewer queries than a block against a cache."""
    k_len = mask.k_len if isinstance(mask, CallMask) else key.shape[2]
    return query.shape[2] < min(k_len, _BLOCK_Q if gate is None else gate.config.block_q)


def _fastest_backends(query: Tensor) -> AbstractContextManager[None]:
    """Lets scaled_dot_product_attention try cuDNN first where it is faster than FlashAttention-2.

    On an H100 it is 1.7 times as fast from 8k tokens on, yet torch 2.11 prefers FlashAttention-2. Short prompts, where
    entering the context would show, stay as they are.
    """
    if query.device.type != "cuda" or query.shape[2] < 1024 or torch.cuda.get_device_capability(query.device) < (9, 0):
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _sparse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CallMask | Tensor | None,
    seer: LayerCall,
    selector: Selector,
    running: Running,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Sparse prefill ``[B, T, H, D]``, or None where "auto" runs dense: it is faster, or nothing else can follow."""
    state, auto = seer.state, running.impl == "auto"
    # None where only the selection can tell.
    expected = getattr(getattr(selector, "policy", None), "nominal_density", None)
    own = isinstance(mask, CallMask)
    k_len = mask.k_len if own else key.shape[2]
    meters = density_meters(state.attachment)
    if auto:
        if own and expected in mask.dense_densities and not meters:
            return None
        if prefer_dense(q_len=query.shape[2], k_len=k_len, density=expected or 0.0, device=query.device):
            if own:
                mask.dense_densities.add(expected)
            _log_dense(k_len)
            _count_dense(state, running, query, mask, k_len)
            return None
    try:
        blocks = _choose(module, query, key, mask, seer, selector, kwargs)
    except Unservable as reason:
        if not auto:
            raise ValueError(f"{reason}; or set_policy(model, None) to run dense") from None
        _log_unservable(str(reason))
        _count_dense(state, running, query, mask, k_len)
        return None
    if auto and expected is None:
        density = sum(float(b.density().mean()) for b in blocks) / max(1, len(blocks))
        shape = {"q_len": query.shape[2], "k_len": k_len, "density": density}
        if blocks and prefer_dense(**shape, device=query.device, selected=True):
            _count_dense(state, running, query, mask, k_len)
            return None
    for meter in meters:
        for lists in blocks:
            meter.add(state.layer, state.heads, lists)
    impl = "auto" if running.impl == "sparse" else running.impl
    with _timed(state, "attention", query):
        out = _attend(query, key[:, :, :k_len], value[:, :, :k_len], mask, blocks, logits_of(query, kwargs), impl)
    return out.transpose(1, 2).contiguous()


def _choose(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: CallMask | Tensor | None,
    seer: LayerCall,
    selector: Selector,
    kwargs: dict[str, Any],
) -> list[BlockIndices]:
    """Lists of the whole batch, or one by one of the rows of a batch that is padded elsewhere than on the left.

    Raises:
        Unservable: the call is not of a kind that sparse attention can follow.
    """
    mask = _check_mask(mask)
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise Unservable("attention must be causal, got a module with is_causal=False")
    if not mask.is_causal:
        raise Unservable(
            "attention_mask must be causality and padding alone, got packed documents or a pattern of the model's own, "
            "such as that of images; pass documents one by one"
        )
    if kwargs.get("dropout"):
        raise Unservable(f"attention dropout must be 0, got {kwargs['dropout']}")
    q_len, k_len, rows = query.shape[2], mask.k_len, mask.rows
    if q_len < k_len and seer.state.found.not_cached is not None:
        raise Unservable(
            f"a prompt must come in one call, got {q_len} tokens against a cache, with which layer {seer.state.layer} "
            f"cannot be followed ({seer.state.found.not_cached})"
        )
    if q_len < k_len and getattr(getattr(selector, "policy", None), "follows_chunks", False):
        _warn_of_chunks()
    key = key[:, :, :k_len]
    context = partial(seer.context, **logits_of(query, kwargs), mask=mask)
    with _timed(seer.state, "index", query):
        if rows is not None:
            return [
                selector.select(*_real(row, query, key), context(row=row.row, q_len=q, k_len=k, slots=row.keys))
                for row in rows
                for q, k in [(len(row.queries), len(row.keys))]
            ]
        if mask.lengths is None:
            return [selector.select(query, key, context(row=None, q_len=q_len, k_len=k_len))]
        chosen = []
        for b, n in enumerate(mask.lengths):
            t = min(q_len, n)
            q, k = query[b : b + 1, :, q_len - t :], key[b : b + 1, :, k_len - n :]
            chosen.append(selector.select(q, k, context(row=b, q_len=t, k_len=n)))
        return [BlockIndices.stack(chosen)]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: CallMask, blocks: list[BlockIndices], logits: dict, impl: str
) -> Tensor:
    """Attention ``[B, H, T, D]`` over the lists of `_choose`; what is padding has zeros."""
    if mask.rows is None:
        lengths = None if mask.lengths is None else torch.tensor(mask.lengths)
        return block_sparse_attention(query, key, value, blocks[0], **logits, lengths=lengths, impl=impl)
    outs = {}
    for row, lists in zip(mask.rows, blocks):
        q, k = _real(row, query, key)
        v = value[row.row : row.row + 1, :, row.keys.to(value.device)]
        found = block_sparse_attention(q, k, v, lists, **logits, impl=impl)
        outs[row.row] = torch.zeros_like(query[:1]).index_copy(2, row.queries.to(query.device), found)
    padding = torch.zeros_like(query[:1])
    return torch.cat([outs.get(b, padding) for b in range(query.shape[0])])


def _real(row: Row, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one row without its padding."""
    b = slice(row.row, row.row + 1)
    return query[b, :, row.queries.to(query.device)], key[b, :, row.keys.to(key.device)]


def logits_of(query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What makes attention logits of q and k, under the names of our ops."""
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return {"scale": scale, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def _timed(state: LayerState, part: Literal["index", "attention"], query: Tensor) -> AbstractContextManager[None]:
    """What takes the time of a part of a call, if somebody asked for it."""
    meter = time_meter(state.attachment)
    return nullcontext() if meter is None else meter.measure(state.layer, part, query)


def _check_mask(mask: CallMask | Tensor | None) -> CallMask:
    if not isinstance(mask, CallMask):
        got = "None" if mask is None else f"shape {list(mask.shape)}"
        raise Unservable(
            f"attention_mask must be a 2-D padding mask [B, S] or None, got {got}; sparse attention cannot follow a "
            "finished mask"
        )
    return mask


def _count_dense(
    state: LayerState, running: Running, query: Tensor, mask: CallMask | Tensor | None, k_len: int
) -> None:
    """Counts every causal block of a call that runs dense."""
    meters = density_meters(state.attachment)
    if not meters:
        return
    gate = running.gates.get(state.layer)
    sizes = (_BLOCK_Q, 64) if gate is None else (gate.config.block_q, gate.config.block_k)
    shape = {"batch": 1, "heads": state.heads, "block_q": sizes[0], "block_k": sizes[1], "device": query.device}
    q_len, rows = query.shape[2], [(query.shape[2], k_len)] * query.shape[0]
    if isinstance(mask, CallMask):
        try:
            if mask.rows is not None:
                rows = [(len(row.queries), len(row.keys)) for row in mask.rows]
            elif mask.lengths is not None:
                rows = [(min(q_len, n), n) for n in mask.lengths]
        except Unservable:
            pass  # a mask that says nothing of its rows: all of them count in full
    for q, k in rows:
        for meter in meters:
            meter.add(state.layer, state.heads, BlockIndices.dense(q_len=q, k_len=k, **shape))


@functools.cache
def _warn_of_chunks() -> None:
    # Two books of 8192 tokens at density .1: perplexity 22.6 and 29.7 at once or with the length, 27.8 and 36.5 in
    # chunks of 2048.
    logger.warning(
        "TopK takes its number of blocks from the tokens so far, so the first chunks of a long prompt keep few; where "
        "a prompt comes in chunks give its whole length: TopK(density=..., length=...)"
    )


@functools.cache
def _warn_of_implementation(name: str) -> None:
    logger.warning(
        "attention runs dense, because its implementation was changed to %r after gates or a selector were attached; "
        "model.set_attn_implementation(%r) brings them back",
        name,
        IMPLEMENTATIONS["eager" if name == "eager" else "sdpa"],
    )


@functools.cache
def _log_unservable(reason: str) -> None:
    logger.warning('a call runs dense, as impl="auto" does with what sparse attention cannot follow: %s', reason)


@functools.cache
def _log_dense(k_len: int) -> None:
    logger.info('a prefill of %d keys runs dense, which impl="auto" expects to be faster here', k_len)


for _dense, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(seer_attention, dense=_dense))
    AttentionMaskInterface.register(_name, partial(make_mask, dense=_dense))
