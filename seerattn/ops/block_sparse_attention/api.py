"""The public op: checks what the arguments mean, then hands over to an implementation."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.block_sparse_attention import reference
from seerattn.ops.checks import (
    check_block_sizes,
    check_cu_seqlens,
    check_lengths,
    check_list_heads,
    check_logits,
    check_qkv,
    check_sinks,
)
from seerattn.ops.launch import needs_gradients, without_autocast
from seerattn.ops.resolve import check_impl, implementation
from seerattn.selection.block_indices import BlockIndices, num_query_blocks


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndices,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Literal["auto", "gluon", "triton", "flash4", "reference"] = "auto",
    return_lse: bool = False,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention over the listed key blocks only; differentiable in q, k, v and sinks.

    The last query is the last key. With all causal blocks listed this is dense causal attention. Scores and softmax
    are fp32 (fp64 for fp64 inputs); formulas are in the README beside this file.

    Args:
        q: queries ``[B, H, T, D]``, fp16, bf16, fp32 or fp64, ``32 <= D <= 256``.
        k: keys ``[B, HKV, S, D]`` of the same dtype, ``H % HKV == 0``, ``T <= S``. Never expanded to ``H`` heads.
        v: values ``[B, HKV, S, D]``.
        blocks: lists of ``Hm = H`` or ``HKV`` heads for just these tokens: row ``b`` must have
            ``q_start + q_len == lengths[b]`` and ``q_len == min(T, lengths[b])``. With a ``skip_threshold`` blocks that
            are negligible beside those before them are skipped once their scores are known, and there is no gradient.
        scale: factor of q.k, by default ``D ** -0.5``; one that is not positive is left to `reference`.
        lengths: int ``[B]``, real tokens of every row of a left-padded batch; by default all ``S``. Row ``b`` uses
            its last ``lengths[b]`` keys and last ``min(T, lengths[b])`` queries.
        cu_seqlens: int ``[N + 1]``, ascending from 0 to ``T``: the only batch row holds ``N`` sequences one after the
            other, sequence ``n`` the tokens ``cu_seqlens[n] .. cu_seqlens[n + 1]``, with ``T == S``. ``blocks`` then
            has a row for each sequence. Excludes ``lengths``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax.
        sinks: ``[H]`` logits of one more key without a value per head.
        impl: "auto" or the name of an implementation.
        return_lse: also return the log-sum-exp of every softmax row, the sink included.
        return_counts: also return how many blocks of each list were computed in full: all, less those that were
            skipped.

    Returns:
        ``[B, H, T, D]`` in the dtype of q, zero at padding; with ``return_lse`` also fp32 ``[B, H, T]``, -inf at
        padding; with ``return_counts`` at the end int32 ``[B, H, Nq]``, where ``B`` counts the rows of ``blocks``.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown ``impl``.
    """
    check_impl("block_sparse_attention", impl)
    check_qkv(q, k, v)
    check_sinks(q, sinks)
    check_logits(scale, softcap)
    bounds = check_cu_seqlens(q, k, lengths, cu_seqlens)
    rows = check_lengths(k, lengths) if bounds is None else [end - begin for begin, end in pairwise(bounds)]
    _check_blocks(q, k, blocks, rows)
    grad = needs_gradients(q, k, v, sinks)
    if grad and blocks.skip_threshold is not None:
        raise ValueError(
            f"blocks must have no skip_threshold where gradients are taken, got {blocks.skip_threshold:g}; call it "
            "under torch.no_grad(), or with lists that skip nothing"
        )
    call = {
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "lengths": rows,
        "cu_seqlens": bounds,
        "softcap": softcap,
        "sinks": sinks,
        "return_lse": return_lse,
    }
    counts = None
    if return_counts:
        counts = blocks.counts.repeat_interleave(q.shape[1] // blocks.num_heads, 1)
        if blocks.skip_threshold is not None:
            call["counts"] = counts
    module = implementation("block_sparse_attention", impl, q.device, q, k, v, blocks, **call)
    # Autocast would turn the fp32 products inside into half-precision ones.
    with without_autocast(q.device):
        if grad and module is not reference:
            from seerattn.ops.block_sparse_attention import autograd  # which needs Triton

            out, lse = autograd.block_sparse_attention(module.block_sparse_attention, q, k, v, blocks, **call)
        else:
            out, lse = module.block_sparse_attention(q, k, v, blocks, **call)
    found = (out, *([lse] if return_lse else []), *([counts] if return_counts else []))
    return found if len(found) > 1 else out


def _check_blocks(q: Tensor, k: Tensor, blocks: BlockIndices, lengths: list[int]) -> None:
    q_tokens = q.shape[2]
    check_block_sizes(blocks)
    check_list_heads(q, k.shape[1], blocks.indices, len(lengths))
    starts, tokens = torch.stack((blocks.q_start, blocks.q_len)).tolist()
    expected = [(n - min(q_tokens, n), min(q_tokens, n)) for n in lengths]
    if list(zip(starts, tokens)) != expected:
        raise ValueError(
            f"blocks must have (q_start, q_len) = {expected} for T = {q_tokens} and keys {lengths}, "
            f"got {list(zip(starts, tokens))}; build them with the lengths of this call"
        )
    rows = max((num_query_blocks(s, t, blocks.block_q) for s, t in expected), default=0)
    if blocks.num_q_blocks != rows:
        raise ValueError(f"blocks must have {rows} rows for T = {q_tokens}, got {blocks.num_q_blocks}")
