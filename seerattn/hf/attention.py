"""The attention function: dense as the model would run it, or gate, selection and block-sparse attention.

transformers calls it for every attention layer of a model whose ``attn_implementation`` is one of `IMPLEMENTATIONS`.
A hook before each layer that was attached to adds a `LayerCall` as the keyword ``seer``. Every other layer, and every
decode step without a policy of its own, runs the attention function and the mask that the model used before, so its
result is the same bit for bit. With one a decode step goes on in `seerattn.hf.decode`, or in `seerattn.hf.fixed_step`
where CUDA graphs repeat it.

The first layer of a forward finds those that run dense whatever comes, with nobody looking on (`_is_untouched`). Their
hook adds nothing, and what takes no mask is called at once, so that a short prompt takes hardly longer than in the
unpatched model.

What is no part of a prompt is decoded: one token, and also several against a cache that are fewer than a query block.
So the tokens that speculative decoding verifies at once are chosen by the attention that chooses one token.

Continuous batching calls the same function, with the rows of many requests: `seerattn.hf.paged`.
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

from seerattn.hf.banded import BANDED
from seerattn.hf.call import LayerCall, Prefill
from seerattn.hf.context_parallel import spread_attention
from seerattn.hf.decode import decode, is_untouched
from seerattn.hf.fixed_step import FIXED
from seerattn.hf.gate_cache import choose, recall_of
from seerattn.hf.mask import CallMask, Row, Unservable, make_mask
from seerattn.hf.meters import attend_counted, count_dense, density_meters, time_meter
from seerattn.hf.paged import PAGED, is_paged, paged_attention
from seerattn.hf.parts import PARTS
from seerattn.hf.state import Kind, LayerState
from seerattn.ops.crossover import prefer_dense
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import Selector, needs_length

logger = logging.getLogger(__name__)

# Name of our implementation by the one that it replaces. "flash" and "sdpa" in a name would make transformers look
# for those libraries.
IMPLEMENTATIONS = {"sdpa": "seer_attention", "eager": "seer_attention_eager", BANDED: "seer_attention_banded"}
# Tokens of a prompt from which on windows of SDPA are worth a word: what they hide takes longer than what they show.
_LONG = 8192
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def add_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an attention module that was attached to; not a closure, so that a copy has its own state."""
    state, mask = module._seer, kwargs.get("attention_mask")
    if isinstance(mask, CallMask):
        if state.found in mask.untouched:
            return None
    else:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if hidden is not None and hidden.shape[1] == 1 and not is_paged(kwargs):
            # The attribute first: where no policy ever decoded, that is all that a step pays, 30 ns a layer.
            if not state.attachment.decodes or not (state.decodes or FIXED.get()):
                return None
            if is_untouched(state, kwargs):
                return None
            if FIXED.get():
                return args, kwargs | {"seer": LayerCall(state, kwargs.get("position_embeddings"), None)}
        else:
            _check_implementation(module)
    recall = recall_of(state.attachment.gate_cache, module, state.layer, kwargs)
    call = LayerCall(state, kwargs.get("position_embeddings"), kwargs.get("position_ids"), None, recall)
    return args, kwargs | {"seer": call}


def _check_implementation(module: nn.Module) -> None:
    """Warns, once, where an attention module runs another implementation than ours and so sees no selector.

    A mask of ours shows as much. Asking takes 3 us, as configs of transformers are slow to be read.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is not None and name not in (*IMPLEMENTATIONS.values(), *PAGED.values()):
        _warn_of_implementation(name)


def seer_attention(
    dense: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CallMask | Tensor | None,
    seer: LayerCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, after ``dense`` in the signature of `transformers.AttentionInterface`.

    Args:
        dense: the implementation that this one replaces.
        module: the attention module.
        query: post-RoPE ``[B, H, T, D]``.
        key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
        value: ``[B, HKV, S, D]``.
        attention_mask: the `CallMask` of the forward, or a finished 4-D mask of the caller's own.
        seer: set where the layer was attached to, unless it is known to run dense.
        kwargs: what the architecture passes on: scaling, softcap, s_aux, sliding_window, dropout and others.

    Returns:
        ``[B, T, H, D]`` and None, or the attention weights where the replaced implementation returns them.

    Raises:
        ValueError: a call that sparse attention cannot follow, unless "auto" may run it dense.
    """
    if seer is None and isinstance(attention_mask, CallMask) and dense in attention_mask.plain:
        return attention_mask.plain[dense](module, query, key, value, None, **kwargs)
    parts = PARTS.get()
    if parts is not None:
        attend = partial(_attention, dense, module)
        return spread_attention(parts, attend, query, key, value, attention_mask, seer, kwargs)
    return _attention(dense, module, query, key, value, attention_mask, seer, **kwargs)


def _attention(
    dense: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CallMask | Tensor | None,
    seer: LayerCall | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """See `seer_attention`, of all tokens."""
    if is_paged(kwargs):
        return paged_attention(partial(_as_unpatched, dense, module), module, query, key, value, seer, kwargs)
    if query.shape[2] == 1 and (fixed := FIXED.get()):
        if seer is None or _is_windowed(key, kwargs):
            raise Unservable("gates or selectors must have been attached to every layer, and none may have a window")
        return fixed.attend(seer, query, key, value, kwargs), None
    if seer is None or _is_windowed(key, kwargs):
        if dense == "sdpa" and query.shape[2] >= _LONG and _is_windowed(key, kwargs):
            _warn_of_windows()
        return _as_unpatched(dense, module, query, key, value, attention_mask, kwargs)
    if query.shape[2] == 1:
        out = decode(module, query, key, value, attention_mask, seer, kwargs, _log_unservable)
        if out is not None:
            return out, None
        return _as_unpatched(dense, module, query, key, value, attention_mask, kwargs)
    call = Prefill.of(module, query, key, value, attention_mask, seer, kwargs)
    if _is_untouched(call):
        return _as_unpatched(dense, module, query, key, value, attention_mask, kwargs)
    out = _sparse(call) if call.capture is None else call.capture.attend(call)
    if out is not None:
        return out.transpose(1, 2).contiguous(), None
    backends, timed = _dense_contexts(call)
    with backends, timed:
        out, weights = _as_unpatched(dense, module, query, key, value, attention_mask, kwargs)
    if call.capture is not None:
        call.capture.see(call, out)
    return out, weights


def _as_unpatched(
    dense: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CallMask | Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention of the unpatched model."""
    if isinstance(mask, CallMask):
        mask = mask.tensor
        mask = None if mask is None else mask.to(query.device)
    try:
        attend = ALL_ATTENTION_FUNCTIONS[dense]
    except KeyError:
        attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return attend(module, query, key, value, mask, **kwargs)


def _is_untouched(call: Prefill) -> bool:
    """Whether a layer runs as in the unpatched model; found for all layers by the first one of a forward.

    Nothing chooses for them, or "auto" expects dense attention to be faster, and nobody captures, counts or times them.
    """
    mask, attachment = call.mask, call.state.attachment
    if not isinstance(mask, CallMask):
        return False
    if attachment not in mask.settled:
        mask.settled.add(attachment)
        _settle(call, mask)
    return call.state.found in mask.untouched


def _settle(call: Prefill, mask: CallMask) -> None:
    """Tells the mask of a forward which layers are untouched in it, and what they may call at once.

    Nothing, where a prompt is spread over processes: the layers of a part are no layers of the model.
    """
    attachment = call.state.attachment
    if call.capture is not None or time_meter(attachment) is not None:
        return
    unseen = call.auto and not density_meters(attachment) and not _tries_cudnn(call.query)
    for kind, layers in call.running.kinds(attachment.layers).items():
        if not kind.chooses(call.q_len, call.k_len) or (unseen and _dense_is_faster(call, kind)):
            mask.untouched |= layers
    attend = ALL_ATTENTION_FUNCTIONS.get(attachment.dense)
    if attend and call.state.found in mask.untouched and mask.tensor is None:
        # Three calls of Python less, 5 us a layer on a CPU.
        mask.plain[attachment.dense] = attend


def _is_windowed(key: Tensor, kwargs: dict[str, Any]) -> bool:
    window = kwargs.get("sliding_window")
    return window is not None and window < key.shape[2]


def _dense_contexts(call: Prefill) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """In what dense attention runs where it could be sparse: at its fastest if it was compared or is timed."""
    compared = call.selector is not None or time_meter(call.state.attachment) is not None
    backends = sdpa_kernel(CUDNN_FIRST, set_priority=True) if compared and _tries_cudnn(call.query) else nullcontext()
    return backends, _timed(call.state, "attention", call.query)


def _tries_cudnn(query: Tensor) -> bool:
    """Whether scaled_dot_product_attention is to try cuDNN first, because it is faster than FlashAttention-2.

    On an H100 it is 1.7 times as fast from 8k tokens on, yet torch 2.11 prefers FlashAttention-2. It saves 80 us of 2k
    tokens of 32 heads of 128. It takes the host 200 us more, which shows with less work. Of heads of 64 it is no
    faster: SmolLM2 took 30.1 ms with it and 24.0 without at 8k tokens on an H200, 48.7 and 47.6 at 16k.
    """
    work = query.numel() * query.shape[2]
    if query.device.type != "cuda" or query.shape[3] <= 64 or work < 32 * 128 * 2048**2:
        return False
    return torch.cuda.get_device_capability(query.device) >= (9, 0)


def _sparse(call: Prefill) -> Tensor | None:
    """Sparse prefill ``[B, H, T, D]``, or None where the call is dense.

    Nothing selects, or "auto" runs it so: it is faster, or nothing else can follow.
    """
    selector = call.selector
    if selector is None:
        return None
    try:
        sparse = _decide(call)
        blocks = _select(call, selector) if sparse else []
        if blocks and call.auto and call.kind.expected is None:
            sparse = _decide_again(call, blocks)
    except Unservable as reason:
        if not call.auto:
            raise ValueError(f"{reason}; or set_policy(model, None) to run dense") from None
        _log_unservable(str(reason))
        sparse = False
    if not sparse:
        _count_dense(call)
        return None
    for meter in density_meters(call.state.attachment):
        for lists in blocks:
            meter.add(call.state.layer, call.state.heads, lists)
    return _attend(call, blocks)


def _decide(call: Prefill) -> bool:
    """Whether a call runs sparse, before its blocks are known: not where "auto" expects dense to be faster.

    Of a selector that tells no density only what choosing costs counts.

    Raises:
        Unservable: sparse attention cannot follow the call.
    """
    if call.auto and _dense_is_faster(call, call.kind):
        return False
    _check_servable(call)
    return True


def _dense_is_faster(call: Prefill, kind: Kind) -> bool:
    """Whether "auto" expects it of layers of a kind in this forward, which asks once."""
    found = call.mask.dense_is_faster if isinstance(call.mask, CallMask) else {}
    if kind not in found:
        found[kind] = prefer_dense(**call.shape_of(kind), density=kind.expected or 0.0)
        if found[kind]:
            _log_dense(call.k_len)
    return found[kind]


def _decide_again(call: Prefill, blocks: list[BlockIndices]) -> bool:
    """Whether "auto" runs a call sparse by the density of its blocks, which the selector did not tell before."""
    density = sum(float(b.density().mean()) for b in blocks) / len(blocks)
    return not prefer_dense(**call.shape_of(call.kind), density=density, selected=True)


def _check_servable(call: Prefill) -> None:
    """Refuses what sparse attention cannot follow.

    Raises:
        Unservable: the call is of another kind, in a sentence.
    """
    mask = call.described_mask
    if not getattr(call.module, "is_causal", True) or call.kwargs.get("is_causal") is False:
        raise Unservable("attention must be causal, got a module with is_causal=False")
    if not mask.is_causal:
        raise Unservable(
            "attention_mask must be causality and padding alone, got packed documents or a pattern of the model's own, "
            "such as that of images; pass documents one by one"
        )
    if call.kwargs.get("dropout"):
        raise Unservable(f"attention dropout must be 0, got {call.kwargs['dropout']}")
    not_cached = call.state.found.not_cached
    if call.q_len < call.k_len and not_cached is not None:
        raise Unservable(
            f"a prompt must come in one call, got {call.q_len} tokens against a cache, with which layer "
            f"{call.state.layer} cannot be followed ({not_cached})"
        )


def _select(call: Prefill, selector: Selector) -> list[BlockIndices]:
    """Lists of the whole batch, or one by one of the rows of a batch that is padded elsewhere than on the left.

    Raises:
        Unservable: nobody can tell how the keys of earlier calls were rotated.
    """
    mask, q_len, k_len, rows = call.mask, call.q_len, call.k_len, call.mask.rows
    if q_len < k_len and needs_length(selector):
        _warn_of_chunks()
    query, key = call.query, call.key[:, :, :k_len]
    context = partial(call.seer.context, **call.logits, mask=mask)
    with _timed(call.state, "index", query):
        if rows is not None:
            return [
                choose(call, selector, *_real(row, query, key), context(**of_row, slots=row.keys), row.row)
                for row in rows
                for of_row in [{"row": row.row, "q_len": len(row.queries), "k_len": len(row.keys)}]
            ]
        if mask.lengths is None:
            return [choose(call, selector, query, key, context(row=None, q_len=q_len, k_len=k_len))]
        chosen = []
        for b, n in enumerate(mask.lengths):
            t = min(q_len, n)
            q, k = query[b : b + 1, :, q_len - t :], key[b : b + 1, :, k_len - n :]
            chosen.append(choose(call, selector, q, k, context(row=b, q_len=t, k_len=n), b))
        return [BlockIndices.stack(chosen)]


def _attend(call: Prefill, blocks: list[BlockIndices]) -> Tensor:
    """Attention ``[B, H, T, D]`` over the lists of `_select`; what is padding has zeros."""
    query, mask, k_len = call.query, call.mask, call.k_len
    key, value = call.key[:, :, :k_len], call.value[:, :, :k_len]
    counting = {"layer": call.state.layer, "meters": density_meters(call.state.attachment)}
    options = call.logits | {"impl": call.running.op_impl} | counting
    with _timed(call.state, "attention", query):
        if mask.rows is None:
            lengths = None if mask.lengths is None else torch.tensor(mask.lengths)
            return attend_counted(query, key, value, blocks[0], lengths=lengths, **options)
        outs = {}
        for row, lists in zip(mask.rows, blocks):
            q, k = _real(row, query, key)
            v = value[row.row : row.row + 1, :, row.keys.to(value.device)]
            found = attend_counted(q, k, v, lists, **options)
            outs[row.row] = torch.zeros_like(query[:1]).index_copy(2, row.queries.to(query.device), found)
        padding = torch.zeros_like(query[:1])
        return torch.cat([outs.get(b, padding) for b in range(query.shape[0])])


def _real(row: Row, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one row without its padding."""
    b = slice(row.row, row.row + 1)
    return query[b, :, row.queries.to(query.device)], key[b, :, row.keys.to(key.device)]


def _timed(state: LayerState, part: Literal["index", "attention"], query: Tensor) -> AbstractContextManager[None]:
    """What takes the time of a part of a call, if somebody asked for it."""
    meter = time_meter(state.attachment)
    return nullcontext() if meter is None else meter.measure(state.layer, part, query)


def _count_dense(call: Prefill) -> None:
    """Counts every causal block of a call that runs dense."""
    meters = density_meters(call.state.attachment)
    if not meters:
        return
    mask, q_len = call.mask, call.q_len
    rows = [(q_len, call.k_len)] * call.query.shape[0]
    if isinstance(mask, CallMask):
        try:
            if mask.rows is not None:
                rows = [(len(row.queries), len(row.keys)) for row in mask.rows]
            elif mask.lengths is not None:
                rows = [(min(q_len, n), n) for n in mask.lengths]
        except Unservable:
            pass  # a mask that says nothing of its rows: all of them count in full
    count_dense(meters, call.running, call.state, rows, call.query.device)


@functools.cache
def _warn_of_chunks() -> None:
    # Two books of 8192 tokens at density .1: perplexity 22.6 and 29.7 at once or with the length, 27.8 and 36.5 in
    # chunks of 2048.
    logger.warning(
        "TopK takes its number of blocks from the tokens so far, so the first chunks of a long prompt keep few; where "
        "a prompt comes in chunks give its whole length: TopK(density=..., length=...)"
    )


@functools.cache
def _warn_of_windows() -> None:
    # Gemma 3 270M at 32k tokens on an H200: .45 s a sequence, .16 in bands; full attention takes .009 of either.
    logger.warning(
        "layers with a sliding window compute what it hides, which takes most of a long prompt; load the model with "
        "attn_implementation=%r, or call model.set_attn_implementation(%r) before gates are attached",
        BANDED,
        BANDED,
    )


@functools.cache
def _warn_of_implementation(name: str) -> None:
    logger.warning(
        "attention runs dense, because its implementation was changed to %r after gates or a selector were attached; "
        "model.set_attn_implementation(%r) brings them back",
        name,
        IMPLEMENTATIONS.get(name, IMPLEMENTATIONS["sdpa"]),
    )


@functools.cache
def _log_unservable(reason: str) -> None:
    logger.warning('a call runs dense, as impl="auto" does with what sparse attention cannot follow: %s', reason)


@functools.cache
def _log_dense(k_len: int) -> None:
    logger.info('a prefill of %d keys runs dense, which impl="auto" expects to be faster here', k_len)


for _dense, _name in (*IMPLEMENTATIONS.items(), *PAGED.items()):
    AttentionInterface.register(_name, partial(seer_attention, _dense))
    AttentionMaskInterface.register(_name, partial(make_mask, dense=_dense))
