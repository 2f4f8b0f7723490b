"""Forward and backward of attention as one call that can be timed, and the oracle that its gradients must match."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seerattn.bench.check import TOKENS, blocks_and_mask
from seerattn.bench.inputs import Shape, random_qkv
from seerattn.selection.block_indices import BlockIndices

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_and_backward(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Attention and the gradients of q, k and v as a call that can be timed; q, k, v as for the attention."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    # Whole eighths, which every dtype holds: the oracle gets the same numbers.
    dout = torch.randint(-16, 17, q.shape, generator=torch.Generator(q.device).manual_seed(2), device=q.device) / 8
    dout = dout.to(q.dtype)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, dout)


def check_sparse_gradients(
    attend: Callable[[Tensor, Tensor, Tensor, BlockIndices], Tensor],
    shape: Shape,
    device: torch.device,
    *,
    block_q: int,
    block_k: int,
    mask_heads: int,
    tokens: int = TOKENS,
) -> tuple[float, float]:
    """The worst error over its bound, and 1, of the gradients of a block-sparse attention at density 0.3.

    Args:
        attend: gets q, k, v and blocks.
        shape: heads and dtype of the inputs.
        device: where it runs.
        block_q: query block size in tokens.
        block_k: key block size in tokens.
        mask_heads: heads with lists of their own.
        tokens: length of the prompt.
    """
    sizes = {"tokens": tokens, "block_q": block_q, "block_k": block_k, "mask_heads": mask_heads}
    blocks, mask = blocks_and_mask(shape, device, **sizes)
    return _compare(lambda *x: attend(*x, blocks), shape, device, mask)


def check_dense_gradients(
    attend: Attend, shape: Shape, device: torch.device, *, tokens: int = TOKENS
) -> tuple[float, float]:
    """As `check_sparse_gradients`, of a dense causal attention."""
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    return _compare(attend, shape, device, mask)


def _compare(attend: Attend, shape: Shape, device: torch.device, mask: Tensor) -> tuple[float, float]:
    """A bound is twice the error of autograd in the same dtype, and one unit of the largest gradient."""

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype) @ v

    inputs = random_qkv(shape, mask.shape[-1], device, seed=1)
    actual, eager = (forward_and_backward(run, *inputs)() for run in (attend, masked))
    exact = forward_and_backward(masked, *(x.double() for x in inputs))()
    # NaN is the largest of all, wherever it stands.
    return float(torch.tensor([_ratio(*triple) for triple in zip(actual, eager, exact)]).max()), 1.0


def _ratio(actual: Tensor, eager: Tensor, exact: Tensor) -> float:
    own = float((eager.double() - exact).abs().max())
    # The log-sum-exp that backward passes start from is fp32; autograd does not round it.
    unit = torch.finfo(eager.dtype).eps + 16 * torch.finfo(torch.float32).eps
    bound = 2 * own + unit * float(exact.abs().max())
    return float((actual.double() - exact).abs().max()) / bound
