"""Attention of transformers' continuous batching: one packed forward of many requests over a paged cache.

A forward holds rows: the new tokens of one request each, one after the other, with all keys of that request. A row of a
prompt goes sparse, a row that is decoded goes dense, by the attention that the model had before, or by a decode policy
(`seerattn.hf.paged_decode`). Each gets what it would get alone, so that nothing of a request reaches another one, not
even its failure (`seerattn.hf.faults`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from seerattn.hf.banded import BANDED
from seerattn.hf.call import LayerCall, logits_of
from seerattn.hf.meters import attend_counted, count_dense
from seerattn.hf.paged_decode import decode_alone, decode_together, recall, row_context
from seerattn.hf.pages import EDITS_KEYWORDS, Pages, Row, is_left_in_pages
from seerattn.hf.requests import BATCHING, Batching, Request
from seerattn.hf.state import LayerState, check_filled
from seerattn.ops.crossover import LayerShape, prefer_dense
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import AttentionContext, Selector

logger = logging.getLogger(__name__)

_PREFIX = "" if EDITS_KEYWORDS else "paged|"
# Names under which continuous batching knows our implementations, by the one that they replace. With "flash" in it
# transformers makes no mask of all requests by all keys; with a 2 or 3 behind it, it would call FlashAttention.
_NAMES = {"sdpa": "seer_flash_attention", "eager": "seer_flash_attention_eager", BANDED: "seer_flash_attention_banded"}
PAGED = {dense: f"{_PREFIX}{name}" for dense, name in _NAMES.items()}
# Keywords of a packed forward, of no use to the attention of one row.
_PACKED = ("cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args", "use_cache")
_PACKED += tuple(f"{name}_{side}" for name in ("cu_seq_lens", "max_seqlen", "max_length") for side in "qk")
_PACKED += ("position_ids", "k_cache", "v_cache")

# Attention of one row by the implementation that ours replaced: of q, k, v, mask and keywords.
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], tuple[Tensor, Tensor | None]]


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether an attention function was called by continuous batching."""
    return "cu_seq_lens_q" in kwargs and isinstance(kwargs.get("cache"), PagedAttentionCache)


def paged_attention(
    dense: Dense,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seer: LayerCall | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed forward.

    Args:
        dense: attention of one row by the implementation that ours replaced.
        module: the attention module.
        query: post-RoPE ``[1, H, T, D]``, the new tokens of all requests.
        key: the same of the keys ``[1, HKV, T, D]``.
        value: and of the values.
        seer: set where the layer was attached to.
        kwargs: what the architecture passes on, and what continuous batching does.

    Returns:
        ``[1, T, H, D]`` and None.

    Raises:
        ValueError: the manager was not made by ``model.init_continuous_batching``.
    """
    batching = BATCHING.get()
    if batching is None:
        raise ValueError(
            "continuous batching must begin with model.init_continuous_batching or model.generate_batch where gates "
            "or selectors are attached, got a manager that was made otherwise"
        )
    own = {name: x for name, x in kwargs.items() if name not in _PACKED}
    if is_left_in_pages(kwargs["cache"]):
        return _over_pages(dense, batching, module, query, key, value, seer, own, kwargs), None
    window = kwargs.get("sliding_window")
    key, value, cu_k = _update(module, key, value, kwargs, is_windowed=window is not None)
    out = []
    for number, row in enumerate(batching.forward(kwargs["cu_seq_lens_q"], cu_k, window is not None)):
        if row.begin < row.end:
            q = query[:, :, row.begin : row.end]
            k, v = (x[:, :, row.k_begin : row.k_end] for x in (key, value))
            out += _alone(dense, batching, number, row, seer, q, lambda k=k, v=v: (k, v), window, own)
    return torch.cat(out, 1), None


def _over_pages(
    dense: Dense,
    batching: Batching,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seer: LayerCall | None,
    own: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention ``[1, T, H, D]`` of a layer whose keys are left in their pages; such layers have no windows."""
    cache = kwargs["cache"]
    layout = batching.layout(kwargs["cu_seq_lens_q"], cache)
    _update(module, key, value, kwargs, is_windowed=False)
    pages = Pages.of(cache, module.layer_idx, layout)
    together = pages.decode(query, logits_of(query, own))
    parts, done = ([], []) if together is None else ([(layout.together(layout.decoded), together)], layout.decoded)
    parts += decode_together(batching, pages, done, seer, query, own)
    if parts and parts[0][0].places is None:
        return parts[0][1][None]
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for rows, part in parts:
        out[0, rows.places] = part
    done = {number for rows, _ in parts for number in rows.numbers}
    for number, row in enumerate(layout.rows):
        if number not in done:
            new = slice(row.begin, row.end)
            whole = (key[:, :, new], value[:, :, new])
            keys = partial(pages.row, number) if row.start else lambda whole=whole: whole
            parts = _alone(dense, batching, number, row, seer, query[:, :, new], keys, None, own)
            out[:, new] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out


def _alone(
    dense: Dense,
    batching: Batching,
    number: int,
    row: Row,
    seer: LayerCall | None,
    q: Tensor,
    keys: Callable[[], tuple[Tensor, Tensor]],
    window: int | None,
    own: dict[str, Any],
) -> list[Tensor]:
    """Attention of one row in parts ``[1, t, H, D]``; zeros where it fails, or did in a layer before."""
    state = batching.rows()[number].state
    if state.request_id not in batching.failed:
        try:
            return _attend(dense, batching, number, row, batching.request(state), seer, q, *keys(), window, own)
        # Whatever a selector, a policy or a kernel raises is the fault of this request alone.
        except Exception as error:
            logger.error("attention of request %s failed", state.request_id, exc_info=error)
            batching.failed[state.request_id] = error.with_traceback(None)
    return [q.new_zeros(1, q.shape[2], q.shape[1], q.shape[3])]


def _attend(
    dense: Dense,
    batching: Batching,
    number: int,
    row: Row,
    request: Request,
    seer: LayerCall | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """Attention of one row, in parts ``[1, t, H, D]``: what is of the prompt, and what was written behind it."""
    tokens = row.end - row.begin
    told = 0  # tokens that ran sparse
    # A prompt of one token is decoded, as in `generate`.
    if seer is not None and request.prompt > 1 and (window is None or window >= request.prompt):
        told = min(tokens, max(0, request.prompt - row.start))
    out = []
    if seer is not None and window is None and request.writes(row):
        decoded = decode_alone(batching, number, row, request, seer, q, k, v, kwargs)
        if decoded is not None:
            return [decoded]
    if told:
        short = row._replace(end=row.begin + told, k_end=row.k_end - (tokens - told))
        at = short.k_end - row.k_begin
        part = _sparse(batching, number, short, request, seer, q[:, :, :told], k[:, :, :at], v[:, :, :at], kwargs)
        if part is not None:
            out.append(part.transpose(1, 2))
            if told == tokens:
                return out
            q = q[:, :, told:]
    if _needs_no_mask(batching.attachment.dense, q, k, window, kwargs):
        out.append(_ends_with_keys(q, k, v, kwargs))
    else:
        out.append(dense(q, k, v, _dense_mask(batching.attachment.dense, q, k, window), kwargs)[0])
    return out


def _update(
    module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any], *, is_windowed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values ``[1, HKV, S, D]`` of the requests once the new ones are in the cache, and where they end."""
    cache, states = kwargs["cache"], {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if EDITS_KEYWORDS:
        edited = dict(kwargs)
        key, value = cache.update(**states, kwargs=edited)
        return key, value, edited["cu_seq_lens_k"]
    key, value = cache.update(**states, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    ends = kwargs["cu_seq_lens_k"]
    if isinstance(ends, dict):
        ends = ends["sliding_attention" if is_windowed else "full_attention"]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], ends


def _sparse(
    batching: Batching,
    number: int,
    row: Row,
    request: Request,
    seer: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Sparse attention ``[1, H, t, D]`` of the tokens of a prompt, or None where its request runs them dense."""
    state, running = seer.state, request.running
    selector = running.selectors.get(state.layer)
    if selector is None:
        return None
    if state.layer in running.gates:
        check_filled(running.gates[state.layer], state.layer)
    if running.impl == "auto" and _dense_is_faster(state, request, q):
        count_dense(request.meters, running, state, [(q.shape[2], row.k_end - row.k_begin)], q.device)
        return None
    logits = logits_of(q, kwargs)
    context = row_context(batching, number, row, seer, q, k, logits)
    blocks = _select(selector, request, state.layer, q, k, context)
    for meter in request.meters:
        meter.add(state.layer, state.heads, blocks)
    counting = {"layer": state.layer, "meters": request.meters}
    return attend_counted(q, k, v, blocks, impl=running.op_impl, **counting, **logits)


def _select(
    selector: Selector, request: Request, layer: int, q: Tensor, k: Tensor, context: AttentionContext
) -> BlockIndices:
    """Lists of a part of a prompt; what the selector keeps for its next part goes with the last one."""
    tokens, past = k.shape[2], k.shape[2] - q.shape[2]
    decodes = layer in request.running.decoders
    if tokens == request.prompt and not past and not decodes:
        return selector.select(q, k, context)
    memory = recall(request, layer, past)
    blocks = selector.select(q, k, replace(context, memory=memory))
    if tokens < request.prompt or decodes:
        request.kept[layer] = (tokens, memory.kept)
    return blocks


def _dense_is_faster(state: LayerState, request: Request, q: Tensor) -> bool:
    """Whether "auto" expects it of the whole prompt, however it is cut.

    Of a selector that tells no density only what choosing costs counts: a part of a prompt does not show that of all.
    """
    kind = request.running.kind(state.found)
    shape = LayerShape(1, *kind.sizes)
    return prefer_dense(
        q_len=request.prompt, k_len=request.prompt, device=q.device, shape=shape, density=kind.expected or 0.0
    )


def _needs_no_mask(dense: str, q: Tensor, k: Tensor, window: int | None, kwargs: dict[str, Any]) -> bool:
    """Whether a part of a prompt that runs dense is left to a kernel that knows where its queries stand.

    Its mask would have a number for every query and key, 1 GiB of 8k tokens behind 120k, and with one
    scaled_dot_product_attention has no fast kernel and copies the keys of a group for each of its heads.
    """
    is_part = 1 < q.shape[2] < k.shape[2] and (window is None or k.shape[2] <= window)
    return dense != "eager" and is_part and q.device.type == "cuda" and kwargs.get("s_aux") is None


def _ends_with_keys(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Dense causal attention ``[1, t, H, D]`` of queries of which the last one is the last key."""
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=causal_lower_right(q.shape[2], k.shape[2]),
        scale=logits_of(q, kwargs)["scale"],
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _dense_mask(dense: str, q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """The mask of one row for the implementation that ours replaced; None where it makes its own, or needs none."""
    t, s = q.shape[2], k.shape[2]
    hides = window is not None and s > window
    if not hides and (t == 1 or (dense != "eager" and t == s)):
        return None
    at = torch.arange(s, device=q.device)
    behind = at[s - t :, None] - at[None]
    seen = behind >= 0
    if hides:
        seen &= behind < window
    if dense != "eager":
        return seen[None, None]
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)[None, None]
