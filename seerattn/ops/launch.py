"""What the launches of kernels share on the host."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Where fp32 products stay fp32; to leave what nobody entered takes 20 us of the host."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def power_of_2(number: int) -> int:
    """The least power of two that is no less; Triton's own function, which kernels may call too, takes 3 us."""
    return 1 << max(0, number - 1).bit_length()


def tma_fits(x: Tensor) -> bool:
    """Whether a tensor descriptor takes ``x [B, h, n, D]``: 16-byte strides and base, contiguous channels."""
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    return x.stride(3) == 1 and all(s > 0 and s % 16 == 0 for s in strides) and x.data_ptr() % 16 == 0


def tma_ready(x: Tensor) -> Tensor:
    """``x [B, h, n, D]`` as a tensor descriptor takes it, see `tma_fits`; a copy only if it must be."""
    return x if tma_fits(x) else x.clone(memory_format=torch.contiguous_format)


def new_output(q: Tensor, *, padded: bool) -> Tensor:
    """An output of the shape of ``q``, in memory ``[B, T, H, D]``: zero where a kernel leaves padding out."""
    batch, heads, tokens, dim = q.shape
    make = torch.zeros if padded else torch.empty
    return make(batch, tokens, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def row_geometry(q_tokens: int, k_tokens: int, lengths: list[int]) -> list[tuple[int, int, int, int]]:
    """Of every left-padded row: first query slot, first key slot, position of the first query, queries."""
    q_len = [min(q_tokens, n) for n in lengths]
    return [(q_tokens - t, k_tokens - n, n - t, t) for n, t in zip(lengths, q_len)]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; for the interpreter one, so that little is split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=256)  # layer after layer asks for the same, and a copy to the device waits for it
def on_device(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, or tuples of numbers; nobody writes to it."""
    return torch.tensor(values, dtype=dtype, device=device)
