"""`impl="triton"`: the kernel of `block_sparse_attention`, whose keys lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattn.ops.block_sparse_attention.triton_kernel import Launch, Pages, forward, list_refusal
from seerattn.ops.launch import new_output
from seerattn.selection.block_indices import BlockIndices


def refusal(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    softcap: float | None = None,
    **_: object,
) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    return list_refusal(q, blocks, scale, softcap)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    blocks: BlockIndices,
    *,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    k_lens: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `api.paged_attention`, which validates the arguments."""
    queries = q.transpose(0, 1)[None]
    out = new_output(queries, padded=False)
    lse = None
    if return_lse:
        lse = torch.empty(1, q.shape[1], len(q), dtype=torch.float32, device=q.device)
    if out.numel() and blocks.indices.numel():
        forward(
            queries,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            out,
            lse,
            blocks,
            table=cu_seqlens_q.contiguous(),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            cut=True,
            launch=launch,
            pages=Pages(block_table.contiguous(), k_lens.contiguous(), k_cache.shape[1]),
        )
    return out[0].transpose(0, 1), None if lse is None else lse[0]
