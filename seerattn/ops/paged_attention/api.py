"""The public op: checks what can be checked without waiting for the device, then hands over to an implementation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.checks import (
    check_block_sizes,
    check_list_heads,
    check_logits,
    check_pages,
    check_per_row,
    check_sinks,
)
from seerattn.ops.launch import without_autocast
from seerattn.ops.resolve import check_impl, implementation
from seerattn.selection.block_indices import BlockIndices


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: BlockIndices,
    *,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    k_lens: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` of many sequences, or chunks of them, whose keys and values lie in pages.

    The queries of row ``b`` are the last ones of its ``k_lens[b]`` keys, whose pages the table names in their order.
    With all causal blocks listed a row has dense causal attention. What the tensors hold is not looked at on the host,
    so that a call can be part of a CUDA graph: it is the caller who sees that it fits together.

    Args:
        q: queries ``[T, H, D]``, packed, fp16, bf16, fp32 or fp64, ``32 <= D <= 256``.
        k_cache: keys ``[pages, page_size, HKV, D]`` of the same dtype, ``H % HKV == 0``, adjacent channels and any
            other strides: views of other layouts will do, and nothing is copied. Pages have any size, and rows may
            share them.
        v_cache: values, as ``k_cache``.
        blocks: lists of ``Hm = H`` or ``HKV`` heads, a batch element a row, whose ``q_start`` and ``q_len`` are not
            looked at: row ``b`` has ``cu_seqlens_q[b + 1] - cu_seqlens_q[b]`` queries that end with its keys. There
            must be as many query blocks as the longest row has.
        block_table: int32 ``[B, P]``, the pages of every row. Entries behind its last key may be anything.
        cu_seqlens_q: int32 ``[B + 1]``, ascending from 0, where the queries of the rows begin and end. Rows without a
            query are skipped. Queries behind the last row get an undefined output.
        k_lens: int32 ``[B]``, keys of every row, at least its queries.
        scale: factor of q.k, by default ``D ** -0.5``; one that is not positive is left to `reference`.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax.
        sinks: ``[H]`` logits of one more key without a value per head.
        impl: "auto" or the name of an implementation.
        return_lse: also return the log-sum-exp of every softmax row, the sink included.

    Returns:
        ``[T, H, D]`` in the dtype of q; with ``return_lse`` also fp32 ``[H, T]``. There is no gradient.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown ``impl``.
    """
    check_impl("paged_attention", impl)
    check_pages(q, k_cache, v_cache, block_table)
    rows = len(block_table)
    check_per_row("cu_seqlens_q", cu_seqlens_q, rows + 1, q.device)
    check_per_row("k_lens", k_lens, rows, q.device)
    check_sinks(q, sinks)
    check_logits(scale, softcap)
    check_block_sizes(blocks)
    check_list_heads(q, k_cache.shape[2], blocks.indices, rows)
    call = {
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
        "k_lens": k_lens,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
        "sinks": sinks,
        "return_lse": return_lse,
    }
    module = implementation("paged_attention", impl, q.device, q, k_cache, v_cache, blocks, **call)
    # Autocast would turn the fp32 products inside into half-precision ones.
    with without_autocast(q.device):
        out, lse = module.paged_attention(q, k_cache, v_cache, blocks, **call)
    return (out, lse) if return_lse else out
