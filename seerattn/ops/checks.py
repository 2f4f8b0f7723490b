"""Checks that the attention ops share."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

HEAD_DIMS = (32, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of ``q [B, H, T, D]`` and ``k, v [B, HKV, S, D]``."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, heads, tokens, D], got {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k must share B and D, got {list(q.shape)} and {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of the {k.shape[1]} heads of k, got {q.shape[1]}")
    if not HEAD_DIMS[0] <= q.shape[3] <= HEAD_DIMS[1]:
        raise ValueError(f"the head dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {q.shape[3]}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(f"q must have 1 to S = {k.shape[2]} tokens, got {q.shape[2]}; the last query is the last key")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


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
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float32).max


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
