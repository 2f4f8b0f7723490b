"""The public op: what it takes, and its checks.

The reference of this op is not here but in torch modules: un-rotation, `AttnGate` and a `Policy`, one after the other,
as `seerattn.gate_selector.GateSelector` runs them with ``impl="reference"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from seerattn.ops.checks import check_qkv
from seerattn.ops.resolve import implementation
from seerattn.selection.block_indices import BlockIndices


class GateForm(Protocol):
    """Form of a gate; see `seerattn.gate.AttnGateConfig`, which fits."""

    block_q: int
    block_k: int
    q_pooling: tuple[str, ...]
    k_pooling: tuple[str, ...]
    q_linear: bool
    rope: bool
    qk_norm: bool
    query_subblocks: int
    key_subblocks: int
    target_keys: str
    target_power: float | None
    normalize_subblocks: bool
    distance_bias: int
    share: str
    q_size: int
    k_size: int


class Pairs(Protocol):
    """Which channels of gate vectors rotate together; see `seerattn.gate.Pairing`, which fits."""

    width: int
    interleaved: bool


class Gate(Protocol):
    """A gate with its weights; see `seerattn.gate.AttnGate`, which fits."""

    config: GateForm
    q_salience: Tensor | None
    k_salience: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor
    q_norm: nn.Module
    k_norm: nn.Module
    inv_freq: Tensor | None
    pairing: Pairs
    mask_heads: int
    gate_dim: int


class Rotary(Protocol):
    """How q and k were rotated; see `seerattn.selection.RotaryTables`, which fits."""

    cos: Tensor | None
    sin: Tensor | None
    width: int
    interleaved: bool
    column_step: int


@dataclass(frozen=True)
class Rule:
    """Which blocks to keep, beside the diagonal.

    Attributes:
        kind: "count" keeps so many blocks of every row, "share" such a share of every row's causal blocks, rounded
            up; both count forced blocks. "softmax" keeps blocks whose softmax over the row's keys exceeds a level,
            "score" those whose score does, "mass" the fewest blocks that hold such a share of the softmax.
        setting: the number, share, level or mass: one for all heads or one a head.
        sink_blocks: first key blocks that every row keeps.
        last_rows_dense: last rows of the call that keep every block.
        forced_scored: whether blocks that are kept anyway take part in a softmax.
    """

    kind: Literal["count", "share", "softmax", "score", "mass"]
    setting: float | tuple[float, ...]
    sink_blocks: int = 1
    last_rows_dense: int = 0
    forced_scored: bool = True


@dataclass(eq=False)
class KeyVectors:
    """Gate keys from call to call of the same sequences, as the kernels hold them.

    Attributes:
        blocks: finished key blocks whose gate keys it has, beginning with the first one; no key of them is read.
        vectors: fp16 ``[planes, B, h, windows, width]``, whole tiles of windows in the order of the kernels; None has
            nothing.
        scales: fp32 ``[B, h, blocks]``, of the same blocks.
        layout: of `vectors`, as the implementation says it; one that is made otherwise is made anew.
    """

    blocks: int = 0
    vectors: Tensor | None = None
    scales: Tensor | None = None
    layout: tuple = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(x.nbytes for x in (self.vectors, self.scales) if x is not None)

    def rows(self, numbers: Tensor) -> KeyVectors:
        """The same of batch rows ``numbers [B]``."""
        if self.vectors is None:
            return self
        return replace(self, vectors=self.vectors[:, numbers], scales=self.scales[numbers])


def select_blocks(
    q: Tensor,
    k: Tensor,
    gate: Gate,
    rule: Rule,
    rotary: Rotary,
    inv_freq: Tensor | None = None,
    keys: KeyVectors | None = None,
) -> BlockIndices:
    """Scores the blocks of one unpadded call with a gate and chooses some (arXiv 2410.13276, section 3).

    One pass over q and k un-rotates, pools, projects and rotates; a second kernel multiplies, reduces to blocks and
    chooses. Nothing is differentiable.

    Args:
        q: queries after RoPE ``[B, H, T, D]``, fp16, bf16 or fp32; the last query is the last key.
        k: keys after RoPE ``[B, HKV, S, D]`` of the same dtype, ``T <= S``.
        gate: the gate of the layer.
        rule: what to keep.
        rotary: tables of the positions ``0 .. S``.
        inv_freq: fp32 ``[DG / 2]``, frequencies of this call in place of the gate's own.
        keys: gate keys of finished blocks by an earlier call, of the same gate and frequencies; those of this call are
            put into it. Of ``k`` only what follows them is read.

    Returns:
        Lists of ``gate.mask_heads`` heads.

    Raises:
        ValueError: arguments that do not fit each other, or that the kernels do not serve.
    """
    check_qkv(q, k, k)
    heads = gate.mask_heads
    if isinstance(rule.setting, tuple) and len(rule.setting) != heads:
        raise ValueError(f"a setting per head must have {heads} values a layer, got {len(rule.setting)}")
    module = implementation("gate_scores", "triton", q.device, q, k, gate, rule, rotary)
    return module.select_blocks(q, k, gate, rule, rotary, inv_freq, keys)


def pool_windows(
    x: Tensor, *, size: int, start: int, kinds: tuple[str, ...], rotary: Rotary, salience: Tensor | None = None
) -> Tensor:
    """Un-rotates and pools windows of ``size`` tokens in one pass over ``x``; nothing is differentiable.

    Args:
        x: queries or keys after RoPE ``[B, h, N, D]``, the tokens at positions ``start .. start + N``.
        size: window length in tokens; windows are ``position // size``.
        start: position of the first token.
        kinds: which of "avg", "max", "min" and "salient", in the order of their concatenation.
        rotary: tables of the positions ``0 .. start + N``.
        salience: fp32 ``[h, D]`` for "salient": a token weighs the softmax over its window of its product with it.

    Returns:
        fp32 ``[B, h, W, len(kinds) * D]``, what `seerattn.gate.pooling.pool_blocks` gives of the un-rotated tokens.

    Raises:
        ValueError: the kernel does not serve the call, or salience does not fit it.
    """
    if "salient" in kinds and (salience is None or salience.shape != (x.shape[1], x.shape[3])):
        got = None if salience is None else list(salience.shape)
        raise ValueError(f"salience must be {[x.shape[1], x.shape[3]]} for salient pooling, got {got}")
    with torch.no_grad():
        return implementation("pool_windows", "triton", x.device, x, rotary).pool_windows(
            x, size=size, start=start, kinds=kinds, rotary=rotary, salience=salience
        )
