"""The public op: checks what can be checked without waiting for the device, then hands over to an implementation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.checks import (
    BLOCK_SIZES,
    check_heads,
    check_logits,
    check_pages,
    check_per_row,
    check_sinks,
)
from seerattn.ops.launch import without_autocast
from seerattn.ops.resolve import check_impl, implementation
from seerattn.selection.decode_blocks import DecodeBlocks


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    blocks: DecodeBlocks | None = None,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last token of every sequence over the listed key blocks (SeerAttention-R, arXiv 2506.08889).

    The token is the last key of its sequence, which a cache holds already. Nothing that the tensors hold is looked at
    on the host, so that a call can be part of a CUDA graph: it is the caller who sees that it fits together.

    Args:
        q: queries ``[B, H, D]``, fp16, bf16, fp32 or fp64, ``32 <= D <= 256``.
        k: keys ``[B, HKV, S, D]`` of the same dtype, ``H % HKV == 0``; with ``block_table`` pages
            ``[pages, page_size, HKV, D]`` of any size. Adjacent channels, any other strides; nothing is copied.
        v: values, as ``k``.
        lengths: int32 ``[B]``, keys of every sequence, the first ones of its row of ``k``, or those from ``starts`` on.
            A sequence without keys, as graphs are padded with, has an output of 0.
        blocks: lists for the heads of a KV group together; None reads all keys.
        block_table: int32 ``[B, P]``, the pages of every sequence. Entries behind its last key may be anything.
        starts: int32 ``[B]``, where the keys of every sequence begin in its row, as padding on the left has it; blocks
            are counted from there. Not with a ``block_table``.
        scale: factor of q.k, by default ``D ** -0.5``; one that is not positive is left to `reference`.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax.
        sinks: ``[H]`` logits of one more key without a value per head.
        impl: "auto" or the name of an implementation.
        return_lse: also return the log-sum-exp of every softmax row, the sink included.

    Returns:
        ``[B, H, D]`` in the dtype of q; with ``return_lse`` also fp32 ``[B, H]``, -inf where there is neither a key nor
        a sink. There is no gradient.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown ``impl``.
    """
    check_impl("decode_attention", impl)
    if block_table is None:
        _check_rows(q, k, v)
    else:
        check_pages(q, k, v, block_table)
        if len(block_table) != len(q):
            raise ValueError(f"block_table must have {len(q)} rows, one a query, got {len(block_table)}")
    check_per_row("lengths", lengths, len(q), q.device)
    if starts is not None:
        check_per_row("starts", starts, len(q), q.device)
        if block_table is not None:
            raise ValueError("starts must be None with a block_table, whose pages begin with a sequence, got both")
    check_sinks(q, sinks)
    check_logits(scale, softcap)
    if blocks is not None:
        _check_blocks(q, k.shape[1 if block_table is None else 2], blocks)
    call = {
        "lengths": lengths,
        "blocks": blocks,
        "block_table": block_table,
        "starts": starts,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "sinks": sinks,
    }
    module = implementation("decode_attention", impl, q.device, q, k, v, **call)
    # Autocast would turn the fp32 products inside into half-precision ones.
    with without_autocast(q.device):
        out, lse = module.decode_attention(q, k, v, **call)
    return (out, lse) if return_lse else out


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(f"q must be [B, H, D] and k [B, HKV, S, D], got {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k must share B and D, got {list(q.shape)} and {list(k.shape)}")
    check_heads(q.shape[1], k.shape[1], q, k, v)
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"k and v must have adjacent channels, got strides {k.stride()} and {v.stride()}")


def _check_blocks(q: Tensor, kv_heads: int, blocks: DecodeBlocks) -> None:
    if blocks.block_k not in BLOCK_SIZES:
        raise ValueError(f"blocks.block_k must be one of {BLOCK_SIZES}, got {blocks.block_k}")
    indices, counts, shape = blocks.indices, blocks.counts, (len(q), kv_heads)
    if indices.ndim != 3 or indices.shape[:2] != shape or counts.shape != shape:
        raise ValueError(
            f"blocks must have lists [{len(q)}, {kv_heads}, K] and counts [{len(q)}, {kv_heads}], got "
            f"{list(indices.shape)} and {list(counts.shape)}"
        )
    if not indices.dtype == counts.dtype == torch.int32 or not indices.device == counts.device == q.device:
        raise ValueError(
            f"blocks must be int32 on {q.device}, got {indices.dtype} and {counts.dtype} on {indices.device} and "
            f"{counts.device}"
        )
