"""Watching the attention of a model that runs dense: what searches, calibrations and measurements of maps are made of.

One way leads to the attention of a model: a `seerattn.hf.state.Capture`, which takes the place of the selectors for the
length of a ``with`` and is shown every call that they could choose for. Gates learn by one (`seerattn.hf.distillation`,
`seerattn.hf.finetuning`), and `watch_attention` is another, for all that only looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from seerattn.hf.attach import attach, detach
from seerattn.hf.capturing import Capture, capturing
from seerattn.hf.mask import CallMask
from seerattn.hf.state import Attachment, attachment_of
from seerattn.selection.selector import AttentionContext

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from seerattn.hf.call import Prefill


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a full-attention layer and what came out of it.

    Attributes:
        query: post-RoPE ``[B, H, T, D]``; the last query is the last key.
        key: post-RoPE ``[B, HKV, S, D]``.
        value: ``[B, HKV, S, D]``.
        output: ``[B, T, H, D]``, the very tensor that the layer goes on with, in the autograd graph if there is one.
        context: what a selector would know of the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    context: AttentionContext

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return self.context.layer

    @property
    def scale(self) -> float:
        """Factor of q.k before the softmax."""
        return self.context.scale

    @property
    def softcap(self) -> float | None:
        """Tanh soft cap of the logits, or None."""
        return self.context.softcap

    @property
    def sinks(self) -> Tensor | None:
        """``[H]`` logits of one more key without a value, or None."""
        return self.context.sinks


See = Callable[[AttentionCall], None]


@contextmanager
def watch_attention(model: PreTrainedModel | PeftModel, see: See) -> Iterator[None]:
    """Shows every attention call of more than one query inside the ``with``, in which the model runs dense.

    Seen are the layers that `attach` would make sparse, so no sliding-window layers. Gates and selectors that the model
    has choose nothing meanwhile; a model that has none computes what it always does. Under gradient checkpointing a
    call is seen again when the backward pass runs it again.

    Args:
        model: a causal language model; it is left as it was.
        see: called after each attention, before the layer goes on.

    Raises:
        ValueError: the model cannot be served; inside the ``with``, a batch with padding, packed documents, or another
            mask than causality.
    """
    plain = attachment_of(model) is None
    if plain:
        attach(model, lambda layer: None)
    try:
        with capturing(_Watching(attachment_of(model), see)):
            yield
    finally:
        if plain:
            detach(model)


@dataclass(frozen=True, eq=False)
class _Watching(Capture):
    attachment: Attachment
    show: See

    def see(self, call: Prefill, output: Tensor) -> None:
        if call.state.attachment is not self.attachment:
            return  # another model that runs meanwhile
        mask, k_len = call.mask, call.k_len
        if not isinstance(mask, CallMask) or not mask.is_whole or not mask.is_causal:
            raise ValueError(
                "attention_mask must be None, or ones, while attention is watched, got padding, packed documents or "
                "an overlay; run rows one by one"
            )
        context = call.seer.context(row=None, q_len=call.q_len, k_len=k_len, mask=mask, **call.logits)
        self.show(AttentionCall(call.query, call.key[:, :, :k_len], call.value[:, :, :k_len], output, context))
