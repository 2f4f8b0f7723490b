"""The public op: what a choice for single tokens is in plain numbers, and the call. Its reference are torch modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seerattn.ops.checks import check_per_row
from seerattn.ops.decode_select.table import KeyTable
from seerattn.ops.resolve import refusal
from seerattn.selection.decode_blocks import DecodeBlocks, share_of


@dataclass(frozen=True)
class TokenRule:
    """How a token's blocks are scored and chosen, in plain numbers.

    Attributes:
        block_k: key block size in tokens.
        pieces: gate keys of a block.
        over_pieces: how scores of the pieces of a block become one: "max", or "sum" by their log-sum-exp.
        kind: "count" keeps so many blocks of every row, "share" this share of the blocks up to that of the token,
            rounded up; forced blocks count.
        setting: the number or the share.
        sink_blocks: first blocks that are always kept, as that of the token is.
        unscored: first blocks whose scores mean nothing and take part in no softmax.
        biased: whether the gate adds a bias by distance.
    """

    block_k: int
    pieces: int
    over_pieces: Literal["max", "sum"]
    kind: Literal["count", "share"]
    setting: float
    sink_blocks: int = 1
    unscored: int = 0
    biased: bool = False

    def most(self, number: int) -> int:
        """How many of ``number`` blocks a row keeps at most."""
        count = share_of(number, self.setting) if self.kind == "share" else math.ceil(self.setting)
        return min(number, max(count, min(self.sink_blocks, number - 1) + 1))


@torch.no_grad()
def select_blocks(
    gate_q: Tensor,
    gate_k: Tensor | KeyTable,
    rule: TokenRule,
    *,
    kv_heads: int,
    width: int,
    lengths: Tensor | None = None,
    tokens: int = 0,
) -> DecodeBlocks:
    """Chooses the blocks of the last token of every sequence, for the heads of a KV group together, on a GPU.

    It is what `AttnGate.token_scores`, `group_scores` and `choose_blocks` give, in one launch. Nothing that the
    tensors hold is looked at on the host, and the launch follows from shapes: a call can be part of a CUDA graph.

    Args:
        gate_q: fp32 ``[B, Hm, DG]``, projected and rotated queries of the tokens.
        gate_k: fp32 or 16-bit ``[B, h, W, DG]``, gate keys of at least the finished blocks; ``h`` is ``HKV`` or ``Hm``.
            Adjacent channels, any other strides. What lies behind the finished blocks of a sequence may be anything.
            Where each sequence has a tensor of its own, a `KeyTable` of them, on the device of the queries.
        rule: see `TokenRule`.
        kv_heads: ``HKV``, which divides ``Hm`` and ``h``.
        width: entries of a list, at least as many as any row keeps.
        lengths: int32 ``[B]``, keys of every sequence, that of the token included; a sequence without keys has an empty
            list. None where all have ``tokens``.
        tokens: keys of all sequences.

    Returns:
        Lists ``[B, HKV, width]``.

    Raises:
        ValueError: arguments that do not fit each other, or a call that the kernel does not serve.
    """
    sizes = gate_q.shape[::2]
    if gate_q.ndim != 3 or len(gate_k.shape) != 4 or sizes != (gate_k.shape[0], gate_k.shape[3]):
        raise ValueError(
            f"gate_q must be [B, Hm, DG] and gate_k [B, h, W, DG], got {list(gate_q.shape)} and {list(gate_k.shape)}"
        )
    if gate_q.shape[1] % kv_heads or gate_k.shape[1] not in (kv_heads, gate_q.shape[1]):
        raise ValueError(
            f"gate_q must have a multiple of {kv_heads} heads and gate_k {kv_heads} or as many, got {gate_q.shape[1]} "
            f"and {gate_k.shape[1]}"
        )
    if isinstance(gate_k, Tensor) and gate_k.stride(3) != 1:
        raise ValueError(f"gate_k must have adjacent channels, got strides {gate_k.stride()}")
    if lengths is not None:
        check_per_row("lengths", lengths, len(gate_q), gate_q.device)
    most = rule.most(gate_k.shape[2] // rule.pieces + 1)
    if width < most:
        raise ValueError(f"width must be at least {most}, what a row may keep, got {width}")
    reason = refusal("decode_select", "triton", gate_q.device, gate_k.shape[2], rule)
    if reason is not None:
        raise ValueError(f"blocks of single tokens cannot be chosen by the kernel: {reason}; use the torch modules")
    from seerattn.ops.decode_select import triton_one

    return triton_one.select_blocks(
        gate_q, gate_k, rule, kv_heads=kv_heads, width=width, lengths=lengths, tokens=tokens
    )
