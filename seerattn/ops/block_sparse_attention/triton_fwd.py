"""`impl="triton"`: the forward pass by the kernel of `triton_kernel`, keys in one piece."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattn.ops.block_sparse_attention.triton_kernel import Launch, forward, list_refusal
from seerattn.ops.block_sparse_attention.triton_rows import row_table
from seerattn.ops.launch import new_output, tma_ready
from seerattn.selection.block_indices import BlockIndices


def refusal(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, scale: float, softcap: float | None = None, **_: object
) -> str | None:
    """Why this implementation cannot serve a call, in a sentence; None if it can."""
    return list_refusal(q, blocks, scale, softcap)


@torch.no_grad()
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float,
    lengths: list[int],
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    cu_seqlens: list[int] | None = None,
    counts: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `api.block_sparse_attention`, which validates the arguments.

    ``lengths`` holds the keys of every row; with ``cu_seqlens`` the rows lie one after the other in a batch of one.
    Where blocks may be skipped, ``counts`` int32 ``[rows, H, Nq]`` gets the number of those that were not. The output
    has the memory layout ``[B, T, H, D]``.
    """
    batch, heads, q_tokens, _ = q.shape
    table = row_table(q_tokens, k.shape[2], lengths, cu_seqlens, q.device)
    out = new_output(q, padded=table is not None and cu_seqlens is None)
    lse = None
    if return_lse:
        lse = torch.full((batch, heads, q_tokens), -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel():
        forward(
            q,
            tma_ready(k),
            tma_ready(v),
            out,
            lse,
            blocks,
            table=table,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            cut=cu_seqlens is not None,
            counts=counts,
            launch=launch,
        )
    return out, lse
