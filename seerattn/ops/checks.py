"""Checks that the attention ops share."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from seerattn.selection.block_indices import BlockIndices

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (32, 256)
FP32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of ``q [B, H, T, D]`` and ``k, v [B, HKV, S, D]``."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, heads, tokens, D], got {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k must share B and D, got {list(q.shape)} and {list(k.shape)}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(f"q must have 1 to S = {k.shape[2]} tokens, got {q.shape[2]}; the last query is the last key")
    check_heads(q.shape[1], k.shape[1], q, k, v)


def check_sinks(q: Tensor, sinks: Tensor | None) -> None:
    """One logit a query head."""
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [{q.shape[1]}], one logit a query head, got {list(sinks.shape)}")


def check_logits(scale: float | None, softcap: float | None) -> None:
    """What makes logits of q.k: any finite scale, of either sign, and a cap above 0."""
    if scale is not None and not _is_finite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r:.40}; leave it out for D ** -0.5")
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a finite number above 0 or None, got {softcap!r:.40}; None caps nothing")


def _is_finite(value: object) -> bool:
    # Kernels compute in fp32. A comparison also serves integers that no float can hold, and refuses NaN.
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= FP32_MAX


def scale_refusal(scale: float, softcap: float | None = None) -> str | None:
    """Why a kernel that masks logits before it scales them cannot serve a call; None if it can.

    With a soft cap the scale lies within the cap, and what is masked is scaled by the cap alone.
    """
    return None if scale > 0 or softcap is not None else f"it takes positive scales, got {scale}"


def check_lengths(k: Tensor, lengths: Tensor | None) -> list[int]:
    """Real keys of every row, on the host."""
    batch, k_tokens = k.shape[0], k.shape[2]
    if lengths is None:
        return [k_tokens] * batch
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"lengths must be int [{batch}], got {lengths.dtype} {list(lengths.shape)}")
    rows = lengths.tolist()
    if not all(0 <= n <= k_tokens for n in rows):
        raise ValueError(f"lengths must be 0 to S = {k_tokens}, got {rows}")
    return rows


def check_cu_seqlens(q: Tensor, k: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> list[int] | None:
    """Bounds of the sequences that lie one after the other in a batch of one, on the host."""
    if cu_seqlens is None:
        return None
    if lengths is not None:
        raise ValueError("lengths must be None with cu_seqlens, which says where sequences end, got both")
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(f"cu_seqlens needs a batch of 1 with T == S, got {list(q.shape)} and {list(k.shape)}")
    bounds = cu_seqlens.tolist() if cu_seqlens.ndim == 1 and not cu_seqlens.is_floating_point() else []
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != q.shape[2] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must be int [N + 1], ascending from 0 to T = {q.shape[2]}, got {bounds}")
    return bounds


def check_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    """Shapes, dtypes and devices of ``q [T, H, D]``, ``k_cache, v_cache [pages, size, HKV, D]`` and their table."""
    if q.ndim != 3 or k_cache.ndim != 4:
        raise ValueError(
            f"q must be [T, H, D] and k_cache [pages, page_size, HKV, D], got {list(q.shape)} and {list(k_cache.shape)}"
        )
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, got {list(v_cache.shape)}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"q and k_cache must share D, got {list(q.shape)} and {list(k_cache.shape)}")
    check_heads(q.shape[1], k_cache.shape[2], q, k_cache, v_cache)
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"k_cache and v_cache must have adjacent channels, got strides {k_cache.stride()} and {v_cache.stride()}"
        )
    if block_table.ndim != 2 or block_table.dtype != torch.int32 or block_table.device != q.device:
        raise ValueError(
            f"block_table must be int32 [B, P] on {q.device}, got {block_table.dtype} {list(block_table.shape)} on "
            f"{block_table.device}"
        )


def check_heads(heads: int, kv_heads: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Numbers of heads; head dim, dtypes and devices of ``q, k, v [.., D]``."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of k, got {heads}")
    if not HEAD_DIMS[0] <= q.shape[-1] <= HEAD_DIMS[1]:
        raise ValueError(f"the head dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {q.shape[-1]}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_per_row(name: str, numbers: Tensor, size: int, device: torch.device) -> None:
    """An int32 tensor of one number a row, on the device of the call; what it holds is not looked at."""
    if numbers.shape != (size,) or numbers.dtype != torch.int32 or numbers.device != device:
        raise ValueError(
            f"{name} must be int32 [{size}] on {device}, got {numbers.dtype} {list(numbers.shape)} on {numbers.device}"
        )


def check_block_sizes(blocks: BlockIndices) -> None:
    """Sizes that there are kernels for."""
    for name in ("block_q", "block_k"):
        if getattr(blocks, name) not in BLOCK_SIZES:
            raise ValueError(f"blocks.{name} must be one of {BLOCK_SIZES}, got {getattr(blocks, name)}")


def check_list_heads(q: Tensor, kv_heads: int, indices: Tensor, rows: int) -> None:
    """Lists ``[rows, Hm, ..]`` of ``H`` or ``HKV`` heads on the device of ``q``."""
    if indices.device != q.device:
        raise ValueError(f"blocks must be on the device of q, {q.device}, got {indices.device}")
    if indices.shape[1] not in (q.shape[1], kv_heads):
        raise ValueError(f"blocks must have {q.shape[1]} or {kv_heads} heads, got {indices.shape[1]}")
    if len(indices) != rows:
        raise ValueError(f"blocks must have {rows} batch rows, got {len(indices)}")
