"""The public op: checks what the arguments mean, then hands over to an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.attention_map.maps import AttentionMaps
from seerattn.ops.checks import check_lengths, check_logits, check_qkv, check_sinks
from seerattn.ops.launch import without_autocast
from seerattn.ops.resolve import check_impl, implementation
from seerattn.selection.map_form import PUBLISHED, MapForm


def attention_map(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    form: MapForm | Sequence[MapForm] = PUBLISHED,
    query_blocks: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> AttentionMaps:
    """What dense causal attention looks like at block resolution, and with v the attention itself, from one walk.

    A map reduces the true softmax probabilities of every tile of ``block_q`` x ``block_k`` as its form says, every row
    then divided by its sum. Nothing is differentiable: the results carry no graph. Scratch is bounded, ``T x S`` is
    never held.

    Args:
        q: queries ``[B, H, T, D]``, fp16, bf16, fp32 or fp64, ``32 <= D <= 256``; the last query is the last key.
        k: keys ``[B, HKV, S, D]`` of the same dtype, ``H % HKV == 0``, ``T <= S``.
        v: values ``[B, HKV, S, D]``; without them there is no output.
        form: which map, or several; by default the published target of gates (arXiv 2410.13276, section 4).
        query_blocks: int32 or int64 ``[R]``, ascending: the rows of the map that are wanted, the same ones for the
            whole batch and all heads, at the cost of their share of q.k. Of whole sequences of one length
            (``T == S``), without v. Keep them on the CPU: reading them from a GPU waits for it.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        scale: factor of q.k, by default ``D ** -0.5``; one that is not positive is left to `reference`.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax.
        sinks: ``[H]`` logits of one more key without a value per head; it takes probability but has no block.
        lengths: int ``[B]``, real tokens of every row of a left-padded batch; by default all ``S``.
        segment_ids: int ``[B, S]``, documents of packed rows; a query attends to keys of its own document alone.
        impl: "auto" or the name of an implementation.

    Returns:
        The output and the maps, on the content-relative grid of the longest row, or their ``R`` rows.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown ``impl``.
    """
    check_impl("attention_map", impl)
    check_qkv(q, k, k if v is None else v)
    check_sinks(q, sinks)
    check_logits(scale, softcap)
    k_len = check_lengths(k, lengths)
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    if segment_ids is not None and (segment_ids.shape != k.shape[:1] + k.shape[2:3] or segment_ids.is_floating_point()):
        expected = [k.shape[0], k.shape[2]]
        raise ValueError(f"segment_ids must be int {expected}, got {segment_ids.dtype} {list(segment_ids.shape)}")
    if max(k_len, default=0) == 0:
        raise ValueError("lengths must hold at least one real token, got none in the whole batch")
    forms = tuple(form) if isinstance(form, (tuple, list)) else (form,)
    if not forms or not all(isinstance(one, MapForm) for one in forms):
        raise ValueError(f"form must be a MapForm or several, got {form!r:.40}; use one such as MapForm('sum', 2)")
    if query_blocks is not None and (v is not None or lengths is not None):
        raise ValueError(
            f"query_blocks must come without v and lengths, got {'v' if v is not None else 'lengths'}; leave them out, "
            "or take rows of the whole map"
        )
    call = {
        "forms": forms,
        "query_blocks": None if query_blocks is None else _check_query_blocks(q, k, query_blocks, block_q),
        "block_q": block_q,
        "block_k": block_k,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "lengths": k_len,
        "segment_ids": segment_ids,
        "softcap": softcap,
        "sinks": sinks,
    }
    module = implementation("attention_map", impl, q.device, q, k, v, **call)
    # Autocast would turn the fp32 products inside into half-precision ones.
    with without_autocast(q.device):
        return module.attention_maps(q, k, v, **call)


def _check_query_blocks(q: Tensor, k: Tensor, query_blocks: Tensor, block_q: int) -> list[int]:
    """Query blocks of whole sequences, on the host."""
    tokens = q.shape[2]
    if tokens != k.shape[2]:
        raise ValueError(f"q must have all S = {k.shape[2]} tokens of k for some query blocks alone, got {tokens}")
    if query_blocks.ndim != 1 or query_blocks.dtype not in (torch.int32, torch.int64) or not len(query_blocks):
        got = f"{query_blocks.dtype} {list(query_blocks.shape)}"
        raise ValueError(f"query_blocks must be int32 or int64 [R] with R > 0, got {got}")
    blocks, count = query_blocks.tolist(), -(-tokens // block_q)
    for block, before in zip(blocks, [-1, *blocks]):
        if not 0 <= block < count:
            raise ValueError(f"query_blocks must be 0 to {count - 1}, those of {tokens} tokens, got {block}")
        if block <= before:
            raise ValueError(
                f"query_blocks must ascend and not repeat, got {block} after {before}; pass query_blocks.unique()"
            )
    return blocks
