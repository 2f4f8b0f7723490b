"""Losses of tokens from the backbone's hidden states, without logits of all tokens times the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

# Logits held at once, in elements: 256 MiB in fp32.
LOGITS_ELEMENTS = 1 << 26


def head_losses(model: PreTrainedModel, hidden: Tensor, labels: Tensor, *, elements: int = LOGITS_ELEMENTS) -> Tensor:
    """Negative log-likelihood of labels, fp32 ``[B, T]``, 0 where the label is -100.

    The model's own head, with whatever scaling or capping follows it, runs on pieces of the hidden states; with
    gradients each piece runs again in the backward pass.

    Args:
        model: a causal language model.
        hidden: hidden states of its backbone ``[B, T, hidden]``.
        labels: int64 ``[B, T]``.
        elements: logits held at once.
    """
    backbone = model.base_model

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        with _backbone_output(backbone, hidden):
            logits = model(input_ids=labels.clamp_min(0), use_cache=False).logits
        # Flat, so that the classes are contiguous: along a stride torch sums them one after the other, and the fp32
        # rounding made every loss on a CPU 1.6e-5 too small.
        flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view_as(labels)

    size = max(1, elements // (labels.shape[0] * model.config.get_text_config().vocab_size))
    pieces = []
    for piece in zip(hidden.split(size, 1), labels.split(size, 1)):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(losses, *piece, use_reentrant=False))
        else:
            pieces.append(losses(*piece))
    return torch.cat(pieces, dim=1)


@contextmanager
def _backbone_output(backbone: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Lets the backbone return these hidden states instead of computing any; models of experts ask for more fields."""

    def forward(*args, **kwargs) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    before = vars(backbone).get("forward")
    backbone.forward = forward
    try:
        yield
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
