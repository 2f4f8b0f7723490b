"""Block-sparse attention that autograd records: a forward kernel with the backward pass of `triton_bwd`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from seerattn.ops.block_sparse_attention import triton_bwd
from seerattn.selection.block_indices import BlockIndices

Forward = Callable[..., tuple[Tensor, Tensor | None]]


def block_sparse_attention(
    forward: Forward, q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices, *, sinks: Tensor | None, **call: Any
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``forward``, an implementation of the op, differentiable in q, k, v and sinks."""
    return _BlockSparseAttention.apply(q, k, v, sinks, forward, blocks, call | {"return_lse": True})


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        forward: Forward,
        blocks: BlockIndices,
        call: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, blocks, sinks=sinks, **call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse, blocks.indices, blocks.counts)
        # The lists are saved above, where checkpointing and CPU offloading see them.
        ctx.geometry = replace(blocks, indices=blocks.indices[:0], counts=blocks.counts[:0])
        ctx.call = {name: call[name] for name in ("scale", "lengths", "cu_seqlens", "softcap")}
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, indices, counts = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        q = q if q.stride(3) == 1 else q.contiguous()
        blocks = replace(ctx.geometry, indices=indices, counts=counts)
        call = triton_bwd.Call(q, k, v, out, lse, blocks, **ctx.call)
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dsinks = triton_bwd.gradients(call, dout, dlse, sinks, needs_keys=any(ctx.needs_input_grad[1:3]))
        return dq, dk, dv, dsinks, None, None, None
