"""The attention function: dense as the model would run it, or gate, selection and block-sparse attention.

transformers calls it for every attention layer of a model whose ``attn_implementation`` is one of `IMPLEMENTATIONS`.
A layer with a selector also gets a `LayerCall` through the keyword ``seer``; every other layer, and every decode step,
runs the attention function and the mask that the model used before, so its result is the same bit for bit.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seerattn.gate.attn_gate import AttnGate
from seerattn.hf.mask import CallMask, make_mask
from seerattn.hf.rotary import Rotation
from seerattn.ops.block_sparse_attention import block_sparse_attention
from seerattn.ops.crossover import prefer_dense
from seerattn.ops.resolve import IMPLS
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import AttentionContext, RotaryTables, Selector

if TYPE_CHECKING:
    from seerattn.hf.meters import DensityMeter, TimeMeter

logger = logging.getLogger(__name__)

# Name of our implementation by the one that it replaces. "flash" and "sdpa" in a name would make transformers look
# for those libraries.
IMPLEMENTATIONS = {"sdpa": "seer_attention", "eager": "seer_attention_eager"}


@dataclass(eq=False)
class LayerState:
    """What one attention layer needs beside its inputs; the same object for the life of an attachment.

    Attributes:
        layer: index of the decoder layer.
        heads: query heads.
        rotation: how the layer rotates, None without RoPE.
        selector: chooses the blocks; None runs dense.
        gate: the gate to train, if the layer has one.
        impl: implementation of `block_sparse_attention`; "auto" may also choose dense attention, "sparse" is "auto"
            without that.
        meters: those that count this layer's blocks at the moment.
        timer: what takes this layer's times at the moment.
    """

    layer: int
    heads: int
    rotation: Rotation | None
    selector: Selector | None = None
    gate: AttnGate | None = None
    impl: str = "auto"
    meters: list[DensityMeter] = field(default_factory=list)
    timer: TimeMeter | None = None

    def timed(self, part: Literal["index", "attention"], query: Tensor) -> AbstractContextManager[None]:
        """What takes the time of a part of a call, if somebody asked for it."""
        return nullcontext() if self.timer is None else self.timer.measure(self.layer, part, query)


def check_attached_impl(impl: str) -> None:
    """Refuses what `LayerState.impl` cannot be."""
    names = ("auto", "sparse", *IMPLS["block_sparse_attention"])
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}, got {impl!r}")


def layer_states(model: nn.Module) -> list[LayerState]:
    """The states of all attention layers of ``model`` that were attached to, in order of the layers."""
    states = (module.__dict__.get("_seer") for module in model.modules())
    return sorted((s for s in states if s is not None), key=lambda s: s.layer)


def check_implementation(module: nn.Module) -> None:
    """Warns, once, where an attention module runs another implementation than ours and so sees no selector."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is not None and name not in IMPLEMENTATIONS.values():
        _warn_of_implementation(name)


class GateTraining(Protocol):
    """What attends in the layers with a gate while the gates learn; it goes through the model's forward."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: CallMask, call: LayerCall, logits: dict[str, Any]
    ) -> Tensor | None:
        """Attention of one layer ``[B, H, T, D]``, or None to leave it to the model's own dense attention.

        Args:
            query: post-RoPE ``[B, H, T, D]``.
            key: post-RoPE ``[B, HKV, S, D]``.
            value: ``[B, HKV, S, D]``.
            mask: of the forward.
            call: of the layer.
            logits: scale, softcap and sinks, under the names of our ops.
        """
        ...


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer with a selector or a gate: its state and what only its module saw.

    Attributes:
        state: of the layer.
        position_embeddings: the model's rotary tables (cos, sin) of the call.
        position_ids: positions of the call's tokens.
        training: attends in place of the selector while the layer's gate learns.
    """

    state: LayerState
    position_embeddings: tuple[Tensor, Tensor] | None
    position_ids: Tensor | None
    training: GateTraining | None = None

    def part(self, row: int, begin: int, end: int) -> LayerCall:
        """The call that would hold tokens ``begin .. end`` of one batch row alone."""
        tables = self.position_embeddings
        if tables is not None:
            tables = tuple((x[row : row + 1] if x.shape[0] > 1 else x)[:, begin:end] for x in tables)
        return replace(self, position_embeddings=tables, position_ids=None)

    def tables(self, row: int | None, q_len: int, k_len: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of the content positions ``0 .. k_len`` of one row, or of all where ``row`` is None."""
        cos, sin = self.position_embeddings
        if row is not None and cos.shape[0] > 1:
            cos, sin = cos[row : row + 1], sin[row : row + 1]
        if k_len <= cos.shape[1]:
            return cos[:, cos.shape[1] - k_len :], sin[:, sin.shape[1] - k_len :]
        # Keys of earlier calls: the tables are made again from their positions, which precede those of this call.
        ids = self.position_ids
        if ids is None:
            raise ValueError(
                "position_ids must reach the attention layers of a prefill against a cache, got None; "
                "this architecture does not pass them on"
            )
        if row is not None and ids.shape[0] > 1:
            ids = ids[row : row + 1]
        steps = torch.arange(k_len, device=ids.device)
        positions = ids[:, -1:] - (k_len - 1) + steps
        if not torch.equal(ids[:, -q_len:], positions[:, -q_len:]):
            raise ValueError(
                "position_ids must count up by one along a prompt, got resetting or skipping ones; "
                "pass packed documents one by one"
            )
        return self.state.rotation.tables(positions, cos)

    def context(
        self,
        *,
        row: int | None,
        q_len: int,
        k_len: int,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> AttentionContext:
        """What a selector may know of the call."""
        state, rotary = self.state, RotaryTables()
        if state.rotation is None:
            unrotate: Callable[[Tensor, int], Tensor] = lambda x, start: x.float()  # noqa: E731
        else:
            cos, sin = self.tables(row, q_len, k_len)
            rotary = state.rotation.as_tables(cos, sin)

            def unrotate(x: Tensor, start: int) -> Tensor:
                end = start + x.shape[2]
                return state.rotation.unrotate(x, cos[:, start:end], sin[:, start:end])

        return AttentionContext(
            layer=state.layer, scale=scale, softcap=softcap, sinks=sinks, unrotate=unrotate, rotary=rotary
        )


def seer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CallMask | Tensor | None,
    *,
    dense: str,
    seer: LayerCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the signature of `transformers.AttentionInterface`.

    Args:
        module: the attention module.
        query: post-RoPE ``[B, H, T, D]``.
        key: post-RoPE ``[B, HKV, S, D]``, a static cache in full.
        value: ``[B, HKV, S, D]``.
        attention_mask: the `CallMask` of the forward, or a finished 4-D mask of the caller's own.
        dense: the implementation that this one replaces.
        seer: set where the layer has a selector or a gate.
        kwargs: what the architecture passes on: scaling, softcap, s_aux, sliding_window, dropout and others.

    Returns:
        ``[B, T, H, D]`` and None, or the attention weights where the replaced implementation returns them.

    Raises:
        ValueError: a mask that sparse attention cannot follow.
    """
    # Layers without a gate see it pass by.
    kwargs.pop("seer_training", None)
    windowed = kwargs.get("sliding_window") is not None and kwargs["sliding_window"] < key.shape[2]
    backends, timed = nullcontext(), nullcontext()
    if seer is not None and not windowed:
        if seer.training is not None:
            mask, logits = _check_mask(attention_mask), _logits(query, kwargs)
            if kwargs.get("dropout"):
                raise ValueError(f"attention dropout must be 0 while gates learn, got {kwargs['dropout']}")
            out = seer.training.attend(query, key, value, mask, seer, logits)
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
        elif query.shape[2] > 1 and seer.state.selector is not None:
            out = _sparse(query, key, value, attention_mask, seer, kwargs)
            if out is not None:
                return out, None
            backends = _fastest_backends(query)
        if query.shape[2] > 1 and seer.state.timer is not None and seer.training is None:
            backends, timed = _fastest_backends(query), seer.state.timed("attention", query)
    if isinstance(attention_mask, CallMask):
        attention_mask = attention_mask.tensor
        attention_mask = None if attention_mask is None else attention_mask.to(query.device)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(dense, eager)
    with backends, timed:
        return attend(module, query, key, value, attention_mask, **kwargs)


def _fastest_backends(query: Tensor) -> AbstractContextManager[None]:
    """Lets scaled_dot_product_attention try cuDNN first where it is faster than FlashAttention-2.

    On an H100 it is 1.7 times as fast from 8k tokens on, yet torch 2.11 prefers FlashAttention-2. Short prompts, where
    entering the context would show, stay as they are.
    """
    if query.device.type != "cuda" or query.shape[2] < 1024 or torch.cuda.get_device_capability(query.device) < (9, 0):
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _sparse(
    query: Tensor, key: Tensor, value: Tensor, mask: CallMask | Tensor | None, seer: LayerCall, kwargs: dict[str, Any]
) -> Tensor | None:
    """Sparse prefill ``[B, T, H, D]``, or None where "auto" finds dense attention faster."""
    state = seer.state
    # None where only the selection can tell.
    expected = getattr(getattr(state.selector, "policy", None), "nominal_density", None)
    mask = _check_mask(mask)
    if state.impl == "auto" and expected in mask.dense_densities and not state.meters:
        return None
    if not mask.is_causal:
        raise ValueError(
            "attention_mask must be causality and left padding alone for sparse attention, got packed documents or an "
            "overlay; pass documents one by one, or set_policy(model, None) to run dense"
        )
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout must be 0 for sparse attention, got {kwargs['dropout']}")
    q_len, k_len, lengths = query.shape[2], mask.k_len, mask.lengths
    if q_len < k_len and getattr(getattr(state.selector, "policy", None), "follows_chunks", False):
        _warn_of_chunks()
    if state.impl == "auto":
        dense = partial(prefer_dense, q_len=q_len, k_len=k_len, device=query.device)
        if dense(density=expected or 0.0):
            mask.dense_densities.add(expected)
            _log_dense(k_len)
            _count_dense(state, lengths or [k_len] * query.shape[0], q_len, query.shape[1])
            return None
    key, value = key[:, :, :k_len], value[:, :, :k_len]
    logits = _logits(query, kwargs)
    context = partial(seer.context, **logits)
    with state.timed("index", query):
        if lengths is None:
            blocks = state.selector.select(query, key, context(row=None, q_len=q_len, k_len=k_len))
        else:
            rows = []
            for b, n in enumerate(lengths):
                t = min(q_len, n)
                q, k = query[b : b + 1, :, q_len - t :], key[b : b + 1, :, k_len - n :]
                rows.append(state.selector.select(q, k, context(row=b, q_len=t, k_len=n)))
            blocks = BlockIndices.stack(rows)
    if state.impl == "auto" and expected is None and dense(density=float(blocks.density().mean()), selected=True):
        _count_dense(state, lengths or [k_len] * query.shape[0], q_len, query.shape[1])
        return None
    for meter in state.meters:
        meter.add(state.layer, state.heads, blocks)
    with state.timed("attention", query):
        out = block_sparse_attention(
            query,
            key,
            value,
            blocks,
            **logits,
            lengths=None if lengths is None else torch.tensor(lengths),
            impl="auto" if state.impl == "sparse" else state.impl,
        )
    return out.transpose(1, 2).contiguous()


def _logits(query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What makes attention logits of q and k, under the names of our ops."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return {"scale": scale, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}


def _check_mask(mask: CallMask | Tensor | None) -> CallMask:
    if not isinstance(mask, CallMask):
        got = "None" if mask is None else f"shape {list(mask.shape)}"
        raise ValueError(
            f"attention_mask must be a 2-D padding mask [B, S] or None, got {got}; sparse attention cannot follow a "
            "finished mask, set_policy(model, None) runs dense"
        )
    return mask


def _count_dense(state: LayerState, lengths: list[int], q_len: int, heads: int) -> None:
    if not state.meters:
        return
    config = None if state.gate is None else state.gate.config
    sizes = {"block_q": 64, "block_k": 64} if config is None else {"block_q": config.block_q, "block_k": config.block_k}
    rows = [BlockIndices.dense(batch=1, heads=heads, q_len=min(q_len, n), k_len=n, **sizes) for n in lengths]
    for meter in state.meters:
        meter.add(state.layer, heads, BlockIndices.stack(rows))


@functools.cache
def _warn_of_chunks() -> None:
    # Two books of 8192 tokens at density .1: perplexity 22.6 and 29.7 at once or with the length, 27.8 and 36.5 in
    # chunks of 2048.
    logger.warning(
        "TopK takes its number of blocks from the tokens so far, so the first chunks of a long prompt keep few; where "
        "a prompt comes in chunks give its whole length: TopK(density=..., length=...)"
    )


@functools.cache
def _warn_of_implementation(name: str) -> None:
    logger.warning(
        "attention runs dense, because its implementation was changed to %r after gates or a selector were attached; "
        "model.set_attn_implementation(%r) brings them back",
        name,
        IMPLEMENTATIONS["eager" if name == "eager" else "sdpa"],
    )


@functools.cache
def _log_dense(k_len: int) -> None:
    logger.info('a prefill of %d keys runs dense, which impl="auto" expects to be faster here', k_len)


for _dense, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, partial(seer_attention, dense=_dense))
    AttentionMaskInterface.register(_name, partial(make_mask, dense=_dense))
