"""`impl="reference"`: the pages of every row are gathered, and `block_sparse_attention` computes it in plain torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from seerattn.ops.block_sparse_attention.reference import block_sparse_attention
from seerattn.selection.block_indices import BlockIndices, num_query_blocks


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
) -> tuple[Tensor, Tensor | None]:
    """See `api.paged_attention`, which validates the arguments. Lengths are read on the host."""
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32, device=q.device) if return_lse else None
    call = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
    for b, ((begin, end), n) in enumerate(zip(pairwise(cu_seqlens_q.tolist()), k_lens.tolist())):
        if begin == end:
            continue
        queries = q[begin:end].transpose(0, 1)[None]
        keys, values = (_gathered(x, block_table[b], n) for x in (k_cache, v_cache))
        start = n - (end - begin)
        rows = num_query_blocks(start, end - begin, blocks.block_q)
        lists = replace(
            blocks,
            indices=blocks.indices[b : b + 1, :, :rows],
            counts=blocks.counts[b : b + 1, :, :rows],
            q_start=torch.tensor([start]),
            q_len=torch.tensor([end - begin]),
        )
        part, part_lse = block_sparse_attention(queries, keys, values, lists, lengths=[n], **call)
        out[begin:end] = part[0].transpose(0, 1)
        if lse is not None:
            lse[:, begin:end] = part_lse[0]
    return out, lse


def _gathered(cache: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """The keys or values ``[1, HKV, tokens, D]`` of a row, from ``cache [pages, page_size, HKV, D]``."""
    held = pages[: -(-tokens // cache.shape[1])].long()
    return cache[held].flatten(0, 1)[:tokens].transpose(0, 1)[None]
