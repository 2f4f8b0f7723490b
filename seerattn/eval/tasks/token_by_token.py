"""Decoding token by token after prompts of one length, and what a model says of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# From the number of a token and logits [B, V] to the next tokens [B].
Pick = Callable[[int, Tensor], Tensor]


class Decoded(NamedTuple):
    """Tokens after a prompt.

    Attributes:
        tokens: int64 ``[B, N]``.
        losses: negative log-likelihood of each, fp32 ``[B, N]``.
        choices: the most probable token at each place, int64 ``[B, N]``.
    """

    tokens: Tensor
    losses: Tensor
    choices: Tensor


@torch.no_grad()  # not inference_mode, in which the keys of a cache would be compared in every step
def decode(
    model: PreTrainedModel, last: Tensor, cache: DynamicCache, pick: Pick, *, tokens: int, ends: frozenset[int]
) -> Decoded:
    """Decodes token by token, until every sequence has an end token.

    Args:
        model: a causal language model.
        last: int64 ``[B]``, the last token of each prompt.
        cache: holds what comes before it, equally much of each sequence; what is read is added.
        pick: chooses the next tokens.
        tokens: at most so many are written.
        ends: end tokens.
    """
    written, losses, choices = [], [], []
    over = torch.zeros_like(last, dtype=torch.bool)
    for number in range(tokens):
        logits = model(input_ids=last[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
        last = pick(number, logits)
        losses.append(-logits.log_softmax(-1).gather(1, last[:, None])[:, 0])
        choices.append(logits.argmax(-1))
        written.append(last)
        for end in ends:
            over = over | (last == end)
        if ends and bool(over.all()):
            break
    return Decoded(*(torch.stack(of, 1).cpu() for of in (written, losses, choices)))


def greedily(number: int, logits: Tensor) -> Tensor:
    """The most probable tokens."""
    return logits.argmax(-1)


def drawn(temperature: float, seeds: Sequence[int]) -> Pick:
    """Draws tokens, those of each sequence by a seed of its own; it does not depend on what runs beside it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def pick(number: int, logits: Tensor) -> Tensor:
        shares = (logits.double() / temperature).softmax(-1).cpu()
        rows = [torch.multinomial(row, 1, generator=of) for row, of in zip(shares, generators)]
        return torch.cat(rows).to(logits.device)

    return pick


def given(text: Tensor) -> Pick:
    """Goes on with a text ``[B, N]``, whatever the logits are."""
    return lambda number, logits: text[:, number].to(logits.device)


@torch.no_grad()
def read_prompts(model: PreTrainedModel, prompts: Tensor) -> DynamicCache:
    """A cache with all but the last token of prompts ``[B, T]`` of one length."""
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=prompts[:, :-1], past_key_values=cache, use_cache=True)
    return cache


def until_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """A text up to its first end token, and with it."""
    size = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:size])


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """What ends an answer, as the model's own generation settings say it."""
    config = getattr(model, "generation_config", None)
    found = None if config is None else config.eos_token_id
    found = model.config.get_text_config().eos_token_id if found is None else found
    return frozenset([found] if isinstance(found, int) else found or ())
