"""The public op: what it takes, and its checks. Its reference are torch modules, `AttnGate.token_queries`."""

from __future__ import annotations

import torch
from torch import Tensor

from seerattn.ops.checks import check_per_row
from seerattn.ops.gate_scores.api import Gate, Rotary
from seerattn.ops.resolve import refusal


@torch.no_grad()
def gate_queries(q: Tensor, rotary: Rotary, gate: Gate, *, lengths: Tensor | None = None, tokens: int = 0) -> Tensor:
    """Gate queries of the last token of every sequence, on a GPU.

    It is what un-rotation and `AttnGate.token_queries` give, up to roundings of fp32. Nothing that the tensors hold is
    looked at on the host, so a call can be part of a CUDA graph.

    Args:
        q: ``[B, H, D]``, after RoPE; adjacent channels, any other strides.
        rotary: how they were rotated; its tables have one row for every sequence, ``[1 or B, 1, columns]``.
        gate: with its weights; those of the keys are not read.
        lengths: int32 ``[B]``, keys of every sequence, that of the token included; None where all have ``tokens``.
        tokens: keys of all sequences.

    Returns:
        fp32 ``[B, Hm, DG]``.

    Raises:
        ValueError: arguments that do not fit each other, or a call that the kernel does not serve.
    """
    if q.ndim != 3 or q.shape[1] % gate.mask_heads:
        raise ValueError(
            f"q must be [B, H, D] with a multiple of {gate.mask_heads} heads, as the gate has, got {list(q.shape)}"
        )
    if rotary.cos is not None and (rotary.cos.shape[0] not in (1, len(q)) or rotary.cos.shape[1] != 1):
        raise ValueError(f"rotary tables must be [1 or {len(q)}, 1, columns], got {list(rotary.cos.shape)}")
    if lengths is not None:
        check_per_row("lengths", lengths, len(q), q.device)
    reason = refusal("gate_query", "triton", q.device, q, rotary)
    if reason is not None:
        raise ValueError(f"gate queries cannot be made by the kernel: {reason}; use the torch modules")
    from seerattn.ops.gate_query import triton_one

    return triton_one.gate_queries(q, rotary, gate, lengths, tokens)
