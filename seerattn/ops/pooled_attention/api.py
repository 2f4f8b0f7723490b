"""The public ops: check what the arguments mean, then hand over to an implementation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.checks import check_lengths, check_logits, check_qkv, check_sinks
from seerattn.ops.pooled_attention.maps import AttentionMaps
from seerattn.ops.resolve import check_impl, implementation


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense causal attention and its block map, the target of gates (arXiv 2410.13276, section 4).

    The map holds the maximum of the true softmax probabilities over every tile of ``block_q`` x ``block_k``, every
    row then divided by its sum. Nothing is differentiable: the results carry no graph. Scratch is bounded, ``T x S``
    is never held.

    Args:
        q: queries ``[B, H, T, D]``, fp16, bf16, fp32 or fp64, ``32 <= D <= 256``; the last query is the last key.
        k: keys ``[B, HKV, S, D]`` of the same dtype, ``H % HKV == 0``, ``T <= S``.
        v: values ``[B, HKV, S, D]``.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        scale: factor of q.k, by default ``D ** -0.5``; one that is not positive is left to `reference`.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the softmax.
        sinks: ``[H]`` logits of one more key without a value per head; it takes probability but has no block.
        lengths: int ``[B]``, real tokens of every row of a left-padded batch; by default all ``S``.
        segment_ids: int ``[B, S]``, documents of packed rows; a query attends to keys of its own document alone.
        impl: "auto" or the name of an implementation.

    Returns:
        The output ``[B, H, T, D]`` in the dtype of q, zero at padding, and the target fp32 ``[B, H, Nq, Nk]`` on the
        content-relative grid of the longest row; rows without a query are zero.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown ``impl``.
    """
    maps = _run(q, k, v, block_q, block_k, scale, softcap, sinks, lengths, segment_ids, impl, target=True, mass=False)
    return maps.out, maps.target


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
    return_target: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Where the attention mass lies, for measuring recall: the share of every block in the probability of its row.

    Shares are averaged over the queries of a query block. Arguments are those of `pooled_attention`.

    Args:
        return_target: also return the target map of `pooled_attention`, from the same walk.

    Returns:
        fp32 ``[B, H, Nq, Nk]``; rows sum to 1, rows without a query are zero. With ``return_target`` a pair of these.
    """
    maps = _run(
        q, k, None, block_q, block_k, scale, softcap, sinks, lengths, segment_ids, impl, target=return_target, mass=True
    )
    return (maps.mass, maps.target) if return_target else maps.mass


def pooled_targets(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    *,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    segment_ids: Tensor | None = None,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """The target map of `pooled_attention` for some query blocks only, at the cost of their share of q.k.

    For training that does not compute dense attention anyway. Whole sequences of one length, ``T == S``; the other
    arguments are those of `pooled_attention`.

    Args:
        rows: int32 or int64 ``[R]``, query blocks in ascending order, the same ones for the whole batch and all heads.
            Keep them on the CPU: reading them from a GPU waits for it.

    Returns:
        fp32 ``[B, H, R, Nk]``, without a graph.

    Raises:
        ValueError: as `pooled_attention`, and for rows that do not ascend, repeat or do not exist.
    """
    return _run(
        q, k, None, block_q, block_k, scale, softcap, sinks, None, segment_ids, impl, target=True, mass=False, rows=rows
    ).target


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    lengths: Tensor | None,
    segment_ids: Tensor | None,
    impl: str,
    *,
    target: bool,
    mass: bool,
    rows: Tensor | None = None,
) -> AttentionMaps:
    check_impl("pooled_attention", impl)
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
    call = {
        "block_q": block_q,
        "block_k": block_k,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "lengths": k_len,
        "segment_ids": segment_ids,
        "softcap": softcap,
        "sinks": sinks,
        "target": target,
        "mass": mass,
        "rows": None if rows is None else _check_rows(q, k, rows, block_q),
    }
    module = implementation("pooled_attention", impl, q.device, q, k, v, **call)
    # Autocast would turn the fp32 products inside into half-precision ones.
    with torch.autocast(q.device.type, enabled=False):
        return module.attention_maps(q, k, v, **call)


def _check_rows(q: Tensor, k: Tensor, rows: Tensor, block_q: int) -> list[int]:
    """Query blocks of whole sequences, on the host."""
    tokens = q.shape[2]
    if tokens != k.shape[2]:
        raise ValueError(f"q must have all S = {k.shape[2]} tokens of k for targets of some query blocks, got {tokens}")
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64) or not len(rows):
        raise ValueError(f"rows must be int32 or int64 [R] with R > 0, got {rows.dtype} {list(rows.shape)}")
    blocks, count = rows.tolist(), -(-tokens // block_q)
    for block, before in zip(blocks, [-1, *blocks]):
        if not 0 <= block < count:
            raise ValueError(f"rows must be 0 to {count - 1}, the query blocks of {tokens} tokens, got {block}")
        if block <= before:
            raise ValueError(f"rows must ascend and not repeat, got {block} after {before}; pass rows.unique()")
    return blocks
