"""Attention of others, to compare with: PyTorch's SDPA backends, flash-attn-4, and FlexAttention with a block mask."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from seerattn.selection.block_indices import PAD, BlockIndices

# "flash" is FlashAttention-2 as PyTorch ships it; "sdpa" is whatever PyTorch picks by itself.
BACKENDS = {"sdpa": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BASELINES = (*BACKENDS, "flash4", "flex")
# The tile of FlexAttention's kernel; block masks must consist of whole ones.
FLEX_BLOCK = 128


def default_baselines(device: torch.device) -> list[str]:
    """What can be compared with on a device."""
    if device.type != "cuda":
        return ["sdpa"]
    return ["flash", "cudnn", *(["flash4"] if _has_flash4() else []), "flex"]


def default_backends(device: torch.device) -> list[str]:
    """The SDPA backends to compare whole models with on a device."""
    return ["flash", "cudnn"] if device.type == "cuda" else ["sdpa"]


def _has_flash4() -> bool:
    # FlashAttention-2 installs under the same name, without the part below it.
    names = ("flash_attn", "flash_attn.cute")
    return all(importlib.util.find_spec(name) is not None for name in names)


@contextmanager
def sdpa_backend(name: str, device: torch.device) -> Iterator[None]:
    """Lets PyTorch's SDPA use one backend alone.

    Raises:
        ValueError: there is no such backend, or not on this device.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cudnn" and device.type != "cuda":
        raise ValueError(f"cudnn must run on a CUDA device, got {device}")
    with nullcontext() if BACKENDS[name] is None else sdpa_kernel(BACKENDS[name]):
        yield


def dense_attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense causal attention of these tensors as a call that can be timed; what prepares its inputs is done already.

    Args:
        name: one of `BASELINES`.
        q: ``[B, H, T, D]``.
        k: ``[B, HKV, T, D]``.
        v: ``[B, HKV, T, D]``.

    Raises:
        ValueError: the name is unknown, or its library is not installed.
    """
    if name == "flash4":
        return _flash4(q, k, v)
    if name == "flex":
        # One list a head, as for sparse masks, whose compiled kernel then serves both.
        sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": FLEX_BLOCK, "block_k": FLEX_BLOCK}
        blocks = BlockIndices.dense(batch=1, heads=q.shape[1], device=q.device, **sizes)
        return flex_attention(q, k, v, blocks)
    if name not in BACKENDS:
        raise ValueError(f"baselines must be among {', '.join(BASELINES)}, got {name!r}")

    def run() -> Tensor:
        with sdpa_backend(name, q.device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return run


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    if q.device.type != "cuda" or not _has_flash4():
        raise ValueError("flash-attn-4 must be installed and needs a CUDA device; pip install 'seerattn[flash4]'")
    from flash_attn.cute import flash_attn_func

    # Its own layout is [B, T, H, D].
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def run() -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def flex_attention(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndices) -> Callable[[], Tensor]:
    """FlexAttention over the listed blocks as a call that can be timed; the first one compiles.

    Raises:
        ValueError: the device is no GPU, or the blocks are finer than its kernel allows.
    """
    if q.device.type != "cuda":
        # Uncompiled it holds the whole map and does not look at the lists.
        raise ValueError(f"FlexAttention needs a CUDA device, got {q.device}")
    if blocks.block_q % FLEX_BLOCK or blocks.block_k % FLEX_BLOCK:
        raise ValueError(
            f"FlexAttention needs blocks of multiples of {FLEX_BLOCK} tokens, got {blocks.block_q} x {blocks.block_k}"
        )
    mask, kernel = flex_block_mask(blocks, q.shape[1]), _compiled_flex()
    return lambda: kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flex_block_mask(blocks: BlockIndices, heads: int) -> BlockMask:
    """The lists as a `BlockMask` of FlexAttention, for square blocks and one unpadded prompt.

    Diagonal blocks are the partial ones, which FlexAttention masks; the others are full.
    """
    members = heads // blocks.num_heads
    counts = blocks.counts.repeat_interleave(members, 1)
    indices = blocks.indices.repeat_interleave(members, 1)
    columns = blocks.num_k_blocks
    indices = F.pad(indices, (0, columns - indices.shape[-1]), value=PAD)
    rows = torch.arange(blocks.num_q_blocks, device=indices.device, dtype=torch.int32)
    diagonal = rows[:, None].expand(*counts.shape, 1)
    # The diagonal is the last of every row's ascending list.
    full = indices.masked_fill((indices == diagonal) | (indices == PAD), 0)
    return BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        F.pad(diagonal, (0, columns - 1)).contiguous(),
        counts - 1,
        full,
        BLOCK_SIZE=(blocks.block_q, blocks.block_k),
        mask_mod=_causal,
        seq_lengths=(int(blocks.q_len[0]), int((blocks.q_start + blocks.q_len)[0])),
    )


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention, dynamic=False)
