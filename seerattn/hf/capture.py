"""Watching the attention of a model that runs as always: what searches and profiles over a model are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from seerattn.hf.attention import IMPLEMENTATIONS, logits_of, seer_attention
from seerattn.hf.mask import CallMask, make_mask
from seerattn.hf.placement import dense_implementation, implementation
from seerattn.hf.probe import probe
from seerattn.hf.state import attachment_of

# "flash" and "sdpa" in a name would make transformers look for those libraries.
_WATCHED = {dense: f"{ours}_watched" for dense, ours in IMPLEMENTATIONS.items()}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a full-attention layer and what came out of it.

    Attributes:
        layer: index of the decoder layer.
        query: post-RoPE ``[B, H, T, D]``; the last query is the last key.
        key: post-RoPE ``[B, HKV, S, D]``.
        value: ``[B, HKV, S, D]``.
        output: ``[B, T, H, D]``, the very tensor that the layer goes on with, in the autograd graph if there is one.
        scale: factor of q.k before the softmax.
        softcap: tanh soft cap of the logits, or None.
        sinks: ``[H]`` logits of one more key without a value, or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


See = Callable[[AttentionCall], None]


@contextmanager
def watch_attention(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Shows every attention call of more than one query inside the ``with``; the model computes what it always does.

    Seen are the layers that `attach` would make sparse, so no sliding-window layers. Under gradient checkpointing a
    call is seen again when the backward pass runs it again.

    Args:
        model: a causal language model without gates or selectors; it is left as it was.
        see: called after each attention, before the layer goes on.

    Raises:
        ValueError: the model cannot be served or has selectors; inside the ``with``, a batch with padding, packed
            documents, or another mask than causality.
    """
    if attachment_of(model) is not None:
        raise ValueError("model must have no gates or selectors to be watched, got one with some; detach them first")
    layers = probe(model)
    with ExitStack() as stack:
        stack.enter_context(implementation(model, _WATCHED[dense_implementation(model)]))
        for layer in layers:
            hook = partial(_show_to, layer=layer.layer, see=see)
            stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _show_to(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], *, layer: int, see: See
) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | {"seer_watch": (layer, see)}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CallMask | Tensor | None,
    *,
    dense: str,
    seer_watch: tuple[int, See] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    out, weights = seer_attention(module, query, key, value, attention_mask, dense=dense, **kwargs)
    if seer_watch is not None and query.shape[2] > 1:
        mask = attention_mask
        if not isinstance(mask, CallMask) or not mask.is_whole or not mask.is_causal:
            raise ValueError(
                "attention_mask must be None, or ones, while attention is watched, got padding, packed documents or "
                "an overlay; run rows one by one"
            )
        layer, see = seer_watch
        key, value = key[:, :, : mask.k_len], value[:, :, : mask.k_len]
        see(AttentionCall(layer, query, key, value, out, **logits_of(query, kwargs)))
    return out, weights


for _dense, _name in _WATCHED.items():
    AttentionInterface.register(_name, partial(_attend, dense=_dense))
    AttentionMaskInterface.register(_name, partial(make_mask, dense=_dense))
